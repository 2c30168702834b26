"""Other people's quantizers, run in environments of their own on the text that ours look at."""
