"""An importance matrix of our own: a model reads a text while its matrices' input columns are watched.

The same sums as llama.cpp's llama-imatrix (tools/imatrix/imatrix.cpp), which also leaves out what is not in a
block (output, embedding): llama-quantize keeps those in larger types.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quant.errors import BadSource, BuildFailed
from quant.gguf.forward import Forward
from quant.gguf.graph import F32, Node, require_known_layout
from quant.gguf.imatrix import Sums


def collect(
    model: Path, texts: Sequence[Sequence[int]], *, progress: Callable[[int, int], None], threads: int | None
) -> Sums:
    """What flows through `model` (a GGUF file of any type) while it reads the texts, given as token ids.

    Raises BadSource (no GGUF that llama.cpp opens, experts), BuildFailed (not finite).
    """
    if not any(len(text) for text in texts):
        raise BadSource("an imatrix needs a calibration text, but there is none")
    watch = _Watch()
    with Forward(model, context=max(map(len, texts)), threads=threads, watch=watch) as forward:
        for done, text in enumerate(texts):
            progress(done, len(texts))
            forward(text)
            watch.reraise()
    progress(len(texts), len(texts))
    return watch.sums()


class _Watch:
    """The eval callback. What it raises cannot pass through C and is kept until the text is read."""

    def __init__(self) -> None:
        self._squares: dict[str, npt.NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}
        self._failure: BaseException | None = None
        self._layout_known = False

    def __call__(self, address: int, asked: bool) -> bool:
        try:
            return self._wants(address) if asked else self._add(Node.from_address(address))
        except BaseException as error:  # noqa: BLE001 - raised by `reraise`
            self._failure = self._failure or error
            return False

    def reraise(self) -> None:
        if self._failure:
            raise self._failure

    def sums(self) -> Sums:
        return Sums(
            squares={name: values.astype(np.float32) for name, values in sorted(self._squares.items())},
            counts=dict(self._counts),
        )

    def _wants(self, address: int) -> bool:
        if not self._layout_known:
            require_known_layout(address)
            self._layout_known = True
        node = Node.from_address(address)
        match node.operation:
            case "MUL_MAT_ID":
                raise BadSource("a mixture of experts, for which no imatrix can be collected here")
            case "MUL_MAT":
                weight: bytes = node.source(0).name
                return weight.startswith(b"blk.") and node.source(1).type == F32
        return False

    def _add(self, node: Node) -> bool:
        name, inputs = node.source(0).name.decode(), node.source(1).array(np.float32)
        rows = inputs.reshape(-1, inputs.shape[-1])
        squares = np.einsum("rc,rc->c", rows, rows)
        if not np.isfinite(squares).all():
            raise BuildFailed(f"what flows into {name} is not finite")
        self._squares[name] = self._squares.get(name, 0.0) + squares.astype(np.float64)
        self._counts[name] = self._counts.get(name, 0) + len(rows)
        return True
