"""How far the residual stream behind each decoder block is from the source's, on one text.

A block that is broken shows as a jump. Sources and variants may be files of either kind: the stream is the
same numbers in transformers ("model.layers.3") and in llama.cpp ("l_out-3").
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quant.gguf.forward import Forward
from quant.gguf.graph import Node, require_known_layout
from quant.gguf.header import read_header
from quant.measure.measurement import Block

States = dict[int, npt.NDArray[np.float32]]  # [tokens, width] behind each block
BEHIND = re.compile(rb"l_out-(\d+)")
IN_BLOCK = re.compile(r"(?:blk|layers|h)\.(\d+)\.")
MOST_TOKENS = 256


def block_errors(
    source: Path, variant: Path, tokens: Sequence[int], threads: int | None
) -> tuple[Block, ...]:
    """`source`, `variant`: folders or GGUF files. Raises BadSource, BuildFailed; ModuleNotFoundError for a
    checkpoint where torch is missing."""
    text = tokens[:MOST_TOKENS]
    ours, theirs = states(variant, text, threads), states(source, text, threads)
    errors = {
        number: _relative(ours[number], theirs[number]) for number in sorted(ours.keys() & theirs.keys())
    }
    fallbacks = _fallbacks(variant)
    before, found = 0.0, []
    for number, error in errors.items():
        found.append(
            Block(
                block=number,
                error=round(error, 6),
                added=round(error - before, 6),
                fallbacks=tuple(fallbacks.get(number, ())),
            )
        )
        before = error
    return tuple(found)


def states(path: Path, tokens: Sequence[int], threads: int | None) -> States:
    model = path / "model.gguf" if path.is_dir() else path
    return _gguf_states(model, tokens, threads) if model.is_file() else _torch_states(path, tokens, threads)


def _relative(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> float:
    """The median over tokens: the first token's stream is often a thousand times the others'."""
    lengths = np.linalg.norm(theirs, axis=1)
    return float(np.median(np.linalg.norm(ours - theirs, axis=1) / np.maximum(lengths, 1e-30)))


def _gguf_states(path: Path, tokens: Sequence[int], threads: int | None) -> States:
    watch = _Watch()
    with Forward(path, context=len(tokens), threads=threads, watch=watch) as forward:
        forward(tokens)
    if watch.failure is not None:
        raise watch.failure
    return watch.states


class _Watch:
    """The eval callback; it may not raise through C."""

    def __init__(self) -> None:
        self.states: States = {}
        self.failure: BaseException | None = None
        self._layout_known = False

    def __call__(self, address: int, asked: bool) -> bool:
        try:
            if not self._layout_known:
                require_known_layout(address)
                self._layout_known = True
            node = Node.from_address(address)
            found = BEHIND.fullmatch(node.name)
            if found and not asked:
                values = node.array(np.float32)
                self.states[int(found[1])] = values.reshape(-1, values.shape[-1]).copy()
        except BaseException as error:  # noqa: BLE001 - raised when the text is read
            self.failure = self.failure or error
            return False
        return bool(found) or not asked


def _torch_states(folder: Path, tokens: Sequence[int], threads: int | None) -> States:
    import torch

    from quant.checkpoint import read_config
    from quant.families import family_of
    from quant.measure.decoded import decoded_model

    model: Any = decoded_model(folder)
    blocks = model.get_submodule(family_of(read_config(folder)[1]).blocks)
    found: States = {}

    def keep(number: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            found[number] = stream.reshape(-1, stream.shape[-1]).float().numpy().copy()

        return hook

    for number, block in enumerate(blocks):
        block.register_forward_hook(keep(number))
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.inference_mode():
            model(torch.tensor([list(tokens)]), use_cache=False)
    finally:
        torch.set_num_threads(before)
    return found


def _fallbacks(variant: Path) -> Mapping[int, list[str]]:
    found: dict[int, list[str]] = {}
    named = _gguf_fallbacks(variant) if (variant / "model.gguf").is_file() else _torch_fallbacks(variant)
    for name, reason in named:
        if match := IN_BLOCK.search(name):
            found.setdefault(int(match[1]), []).append(f"{name}: {reason}")
    return found


def _torch_fallbacks(variant: Path) -> Iterator[tuple[str, str]]:
    try:
        modules = json.loads((variant / "quantization.json").read_bytes())["modules"]
    except (OSError, ValueError, KeyError):
        return
    for module in modules:
        if module.get("fallback"):
            yield module["module"], f"{module['method']}, since {module['fallback']}"


def _gguf_fallbacks(variant: Path) -> Iterator[tuple[str, str]]:
    """Matrices whose rows are no multiple of 256 are stored in types that hold 32 weights a block."""
    header = read_header(variant / "model.gguf")
    for tensor in header.tensors:
        shape = tuple(tensor.shape)
        asked = tensor.type.lower() == header.file_type
        if len(shape) == 2 and shape[0] % 256 and tensor.type.upper() in SMALL_BLOCKS and not asked:
            yield tensor.name, f"{tensor.type}, since its rows of {shape[0]} are no multiple of 256"


SMALL_BLOCKS = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"})
