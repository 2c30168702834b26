"""What weight-compression toolkits would have guessed: their metrics, of a model that reads some texts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from quant.errors import BuildFailed
from quant.gguf.forward import Forward
from quant.gguf.graph import F32, Node, require_known_layout
from quant.search.compared import Guesses
from quant.search.metrics import METRICS, Errors, Inputs
from quant.search.space import Group

MOST_TOKENS = 2048  # that are read


def guesses_of(
    base: Path, groups: Sequence[Group], texts: Iterable[Sequence[int]], threads: int | None
) -> Guesses:
    """`base`: the source as a float GGUF file, which reads the texts. A group is as sensitive as its most
    sensitive linear; those that no text reaches (experts, embeddings) are left out. Raises BadSource,
    BuildFailed."""
    reader = gguf.GGUFReader(base)
    name = _names(reader)
    wanted = {tensor: name(tensor) for group in groups for tensor in group.tensors}
    inputs = _inputs(base, frozenset(wanted.values()), texts, threads)
    weights = {tensor.name: tensor for tensor in reader.tensors}
    found = dict[str, Mapping[str, float]]()
    for group in groups:
        known = [wanted[tensor] for tensor in group.tensors if wanted[tensor] in inputs]
        errors = [Errors.of(_floats(weights[one])) for one in known]
        pairs = list(zip(errors, (inputs[one] for one in known), strict=True))
        if len(pairs) == len(group.tensors):
            found[group.name] = {
                name: float(f"{max(metric(*pair) for pair in pairs):.6g}") for name, metric in METRICS.items()
            }
    return found


# -- what enters the linears ----------------------------------------------------------------------


def _names(reader: gguf.GGUFReader) -> Callable[[str], str]:
    """From a group's tensor to the file's, where groups have transformers' names."""
    field = reader.fields["general.architecture"]
    arch = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == field.contents()), None)
    blocks = 1 + max(int(part[1]) for one in reader.tensors if (part := one.name.split("."))[0] == "blk")
    names = None if arch is None else gguf.get_tensor_name_map(arch, blocks)

    def found(tensor: str) -> str:
        other = names and names.get_name(tensor)
        return f"{other}.weight" if other else tensor

    return found


def _floats(tensor: gguf.ReaderTensor) -> np.ndarray:
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(values, np.float32).reshape(-1, int(tensor.shape[0]))


def _inputs(
    base: Path, wanted: frozenset[str], texts: Iterable[Sequence[int]], threads: int | None
) -> Mapping[str, Inputs]:
    some, left = list[Sequence[int]](), MOST_TOKENS
    for text in texts:
        if left > 0:
            some.append(text[:left])
            left -= len(text)
    watch = _Watch(wanted)
    with Forward(base, context=max(map(len, some)), threads=threads, watch=watch) as forward:
        for text in some:
            forward(text)
            if watch.failure is not None:
                raise watch.failure
    return watch.inputs


class _Watch:
    """The eval callback; it may not raise through C."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self.inputs = dict[str, Inputs]()
        self.failure: BaseException | None = None
        self._wanted = wanted
        self._layout_known = False

    def __call__(self, address: int, asked: bool) -> bool:
        try:
            if not self._layout_known:
                require_known_layout(address)
                self._layout_known = True
            return self._look(Node.from_address(address), asked)
        except BaseException as error:  # noqa: BLE001 - raised when the text is read
            self.failure = self.failure or error
            return False

    def _look(self, node: Node, asked: bool) -> bool:
        if asked and (node.operation != "MUL_MAT" or node.source(1).type != F32):
            return False
        name = node.source(0).name.decode()
        if asked:
            return name in self._wanted
        values = node.source(1).array(np.float32)
        found = Inputs.of(values.reshape(-1, values.shape[-1]))
        if not np.isfinite(found.squares).all():
            raise BuildFailed(f"what flows into {name} is not finite")
        self.inputs[name] = self.inputs[name] + found if name in self.inputs else found
        return True
