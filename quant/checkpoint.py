"""A Hugging Face folder: which of its files count, and what is wrong with them, by headers only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import BadSource
from quant.files import read_json, shown
from quant.safetensors_header import TensorInfo, merge_headers

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXT_FILES = (
    CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
CONFIG_LIMIT, INDEX_LIMIT = 16 << 20, 64 << 20  # bytes
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]{1,100}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    config: Mapping[str, Any]
    architecture: str
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]  # all that a variant depends on


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check config, index and headers; no weight is read. Raises BadSource naming file and tensor."""
    config, architecture = read_config(folder)
    shards = _shards(folder)
    tensors = merge_headers(_inside(folder, name) for name in shards)
    _check_index(folder, tensors)
    _check_layers(config, len(tensors))
    if not (folder / TOKENIZER).exists():
        raise BadSource(f"{TOKENIZER} is missing")
    names = [name for name in (*TEXT_FILES, INDEX) if (folder / name).exists()]
    return Checkpoint(
        config, architecture, tensors, tuple(_inside(folder, name) for name in (*names, *shards))
    )


def checkpoint_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Where each tensor of the checkpoint lies. Raises BadSource."""
    return merge_headers(_inside(folder, name) for name in _shards(folder))


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """(config.json, architecture). Raises BadSource, also for code named by any of the folder's configs."""
    if not (folder / CONFIG).exists():
        raise BadSource(f"{CONFIG} is missing{_gguf_hint(folder)}")
    for path in sorted(folder.glob("*config*.json")):
        if _names_code(read_json(_inside(folder, path.name), CONFIG_LIMIT)):
            raise BadSource(f"{path.name} has an auto_map: code that comes with a model is never run")
    config = read_json(_inside(folder, CONFIG), CONFIG_LIMIT)
    match config.get("architectures"):
        case [str(name), *_] if _ARCHITECTURE.fullmatch(name):
            return config, name
        case _:
            raise BadSource(f"{CONFIG} names no architecture")


def weight_files(folder: Path, names: frozenset[str]) -> tuple[str, ...]:
    """Names of the files that hold the weights, of a folder that has or will have the files `names`.

    Raises BadSource where there are none, or only pickles.
    """
    if WEIGHTS in names:
        return (WEIGHTS,)
    if INDEX in names:
        return tuple(sorted(set(_weight_map(folder).values())))
    if pickles := sorted(name for name in names if Path(name).suffix in PICKLES):
        raise BadSource(f"{shown(pickles[0])} is a pickle, which is never opened; convert it to safetensors")
    raise BadSource(f"there is neither {WEIGHTS} nor {INDEX}")


def _shards(folder: Path) -> tuple[str, ...]:
    return weight_files(folder, frozenset(path.name for path in folder.iterdir()))


def _weight_map(folder: Path) -> dict[str, str]:
    """File of each tensor. Raises BadSource for names that are not those of plain files in the folder."""
    found = read_json(_inside(folder, INDEX), INDEX_LIMIT).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise BadSource(f"{INDEX} has no weight_map")
    for tensor, file in found.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise BadSource(
                f"{INDEX}: tensor {shown(tensor)} lies in {shown(file)}, no safetensors file of the folder"
            )
    return found


def _check_index(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    if (folder / WEIGHTS).exists():
        return
    promised = _weight_map(folder)
    for name, file in promised.items():
        if name not in tensors or tensors[name].file.name != file:
            raise BadSource(f"{file} lacks tensor {shown(name)}, which {INDEX} promises")
    for name, tensor in tensors.items():
        if name not in promised:
            raise BadSource(f"{tensor.file.name} holds tensor {shown(name)}, which {INDEX} does not name")


def _check_layers(config: Mapping[str, Any], tensors: int) -> None:
    layers = config.get("num_hidden_layers")
    if type(layers) is int and not 0 < layers <= tensors:
        raise BadSource(f"{CONFIG} claims {layers:,} layers, but the checkpoint has {tensors:,} tensors")


def _inside(folder: Path, name: str) -> Path:
    """The file `name`, which may be a link only into the blobs that belong to a hub snapshot."""
    path = folder / name
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BadSource(f"{name} is missing") from error
    if not any(real.is_relative_to(place) for place in allowed):
        raise BadSource(f"{name} is a link that leads out of the folder")
    return path


def _names_code(config: Mapping[str, Any]) -> bool:
    left: list[object] = [config]
    while left:  # no recursion: the nesting is the file's
        match left.pop():
            case dict() as table:
                if "auto_map" in table:
                    return True
                left.extend(table.values())
            case list() as values:
                left.extend(values)
    return False


def _gguf_hint(folder: Path) -> str:
    return "; for a GGUF model name the file" if any(folder.glob("*.gguf")) else ""
