"""Which GGUF files of a repository make one model: by the type in their names, and in how many parts."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from quant.errors import BadSource

PART = re.compile(r"-(\d{5})-of-(\d{5})$")
TYPE = re.compile(
    r"(?i)(?<![a-z0-9])(?:ud-)?((?:iq|q|tq|mxfp)\d[a-z0-9_]*|bf16|f16|f32|fp16|fp32)(?![a-z0-9_])"
)
ASIDE = re.compile(r"(?i)mmproj|imatrix|-draft|(?:^|[-.])mtp")  # parts of other models, and no models


def gguf_types(names: Iterable[str]) -> set[str]:
    """Types that file names end with, in capitals."""
    return {kind for name in names if (kind := _type_of(name))}


def gguf_files(names: Iterable[str], wanted: str) -> tuple[str, ...]:
    """The file of that type, or its parts in order. Raises BadSource naming what there is."""
    names = list(names)
    found = sorted(name for name in names if _type_of(name) == wanted.upper())
    if not found:
        known = ", ".join(sorted(gguf_types(names))) or "none"
        raise BadSource(f"there is no GGUF file of type {wanted:.24} (there are: {known:.200})")
    models = {PART.sub("", _stem(name)) for name in found}
    if len(models) > 1:
        raise BadSource(f"several GGUF files are of type {wanted}: {', '.join(sorted(models)):.200}")
    return _in_order(found)


def siblings(first: str, names: Iterable[str]) -> tuple[str, ...]:
    """All parts of the file, itself included. Raises BadSource where one is missing."""
    if not PART.search(_stem(first)):
        return (first,)
    base = PART.sub("", _stem(first))
    return _in_order(sorted(name for name in names if PART.sub("", _stem(name)) == base))


def _in_order(parts: list[str]) -> tuple[str, ...]:
    match = PART.search(_stem(parts[0]))
    if match is None:
        return tuple(parts[:1])
    numbers = [int(found[1]) for part in parts if (found := PART.search(_stem(part)))]
    if numbers != list(range(1, int(match[2]) + 1)):
        raise BadSource(f"{PurePosixPath(parts[0]).name}: not all of its {int(match[2])} parts are there")
    return tuple(parts)


def _stem(name: str) -> str:
    return name.removesuffix(".gguf")


def _type_of(name: str) -> str | None:
    path = PurePosixPath(name)
    if path.suffix != ".gguf" or ASIDE.search(path.name):
        return None
    found = [kind.upper() for kind in TYPE.findall(PART.sub("", path.stem))]
    return {"FP16": "F16", "FP32": "F32"}.get(found[-1], found[-1]) if found else None
