"""Tokens to text while they arrive: never half a character, nothing lost, about a microsecond a push."""

from codecs import getincrementaldecoder
from collections.abc import Sequence

from server.text.vocabulary import Start, Vocabulary

Utf8 = getincrementaldecoder("utf-8")


class Detokenizer:
    """One text. The pushes and the flush, joined, are the joined bytes decoded with errors="replace".

    A character whose bytes have not all arrived is held back; bytes that can begin no character come out as
    U+FFFD at once. `begins` says that the tokens are a text of their own and do not continue one (a prompt
    that is completed): then the space that a tokenizer of the SentencePiece kind puts in front is dropped.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        show_control: bool = False,
        begins: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._pieces = vocabulary.pieces
        self._hidden: frozenset[int] = frozenset() if show_control else vocabulary.control - shown
        self._decode = Utf8("replace").decode
        self._start: Start = vocabulary.start if begins else "keep"

    def push(self, tokens: Sequence[int]) -> str:
        pieces, hidden = self._pieces, self._hidden
        try:
            data = b"".join([pieces[token] for token in tokens if token not in hidden])
        except IndexError:  # padding of the embedding beyond the vocabulary: no text
            tokens = [token for token in tokens if token < len(pieces)]
            data = b"".join([pieces[token] for token in tokens if token not in hidden])
        if self._start != "keep" and data:
            data = self._drop(data, tokens)
        return self._decode(data)

    def flush(self) -> str:
        """The end of the text: what was held back, as U+FFFD."""
        return self._decode(b"", True)

    def _drop(self, data: bytes, tokens: Sequence[int]) -> bytes:
        start, self._start = self._start, "keep"
        if start == "one":
            return data.removeprefix(b" ")
        head = next(self._pieces[t] for t in tokens if t not in self._hidden and self._pieces[t])
        return head.lstrip(b" ") + data[len(head) :]


def detokenize(vocabulary: Vocabulary, tokens: Sequence[int], *, show_control: bool = False) -> str:
    """A whole text at once."""
    detokenizer = Detokenizer(vocabulary, show_control=show_control)
    return detokenizer.push(tokens) + detokenizer.flush()
