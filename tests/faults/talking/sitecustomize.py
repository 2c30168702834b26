"""A builder that says where it works, as a library's warning may."""

import sys

if "server.process.builder" in sys.orig_argv:
    sys.stderr.write(f"warning: {' '.join(sys.orig_argv)}\n")
