"""What to do to a source, as data. Equal recipes have equal digests, which new fields never change."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from quant.errors import BadRecipe, BadSource
from quant.files import open_regular, shown
from quant.ggml import FILE_TYPES, FLOAT_TYPES, NEED_IMATRIX, OVERRIDE_TYPES, OVERRIDES_NEED_IMATRIX

Body = Mapping[str, str | list[list[str]]]

MOST_OVERRIDES = 64
_FIELDS = frozenset({"method", "format", "type", "overrides", "imatrix"})
# A small part of regular expressions: the native reader backtracks, so few repeats and none of a group.
_PATTERN = re.compile(r"[A-Za-z0-9_.^$|()\[\]\\*+?-]{1,200}")
_REPEAT = re.compile(r"[*+?]")
_REPEATED_GROUP = re.compile(r"\)[*+?]")
_MOST_REPEATS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Made by `parse_recipe`, which checks it. `imatrix` is a path; the digest sees the file's content."""

    method: str = "llama"
    format: str = "gguf"
    type: str
    overrides: tuple[tuple[str, str], ...] = ()  # (regular expression on tensor names, tensor type)
    imatrix: str | None = None

    @property
    def spec(self) -> Body:
        """What `parse_recipe(..., local=True)` turns into this recipe again. Defaults are left out."""
        body: dict[str, str | list[list[str]]] = {
            "method": self.method,
            "format": self.format,
            "type": self.type,
        }
        if self.overrides:
            body["overrides"] = [list(pair) for pair in self.overrides]
        if self.imatrix:
            body["imatrix"] = self.imatrix
        return body

    @property
    def body(self) -> Body:
        """The canonical form that is digested and written to manifests. Raises BadRecipe (imatrix gone)."""
        if self.imatrix is None:
            return self.spec
        return {**self.spec, "imatrix": f"sha256:{_content_digest(self.imatrix)}"}

    @property
    def digest(self) -> str:
        canonical = json.dumps(self.body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def name(self) -> str:
        if self.overrides or self.imatrix:
            return f"custom-{self.digest[:8]}"
        return self.type


PRESETS: Mapping[str, Recipe] = MappingProxyType(
    {name: Recipe(type=name) for name in FILE_TYPES if name not in NEED_IMATRIX}
)


def parse_recipe(spec: str | Mapping[str, object], *, local: bool = False) -> Recipe:
    """A name ("q4_k_m"), or the fields of a Recipe as JSON has them. Raises BadRecipe.

    Only callers on this machine (command line, build process) pass `local`: it lets the recipe name a file.
    """
    if isinstance(spec, str):
        return _named(spec)
    if unknown := sorted(shown(key) for key in spec if key not in _FIELDS):
        raise BadRecipe(f"a recipe has no field {', '.join(unknown)}; it has {', '.join(sorted(_FIELDS))}")
    for field, only in (("method", "llama"), ("format", "gguf")):
        if spec.get(field, only) != only:
            raise BadRecipe(f"{field} {shown(spec[field])} is unknown; there is {only}")
    imatrix = _imatrix(spec.get("imatrix"), local)
    kind = _type_name(spec.get("type"))
    if kind in NEED_IMATRIX and imatrix is None:
        raise BadRecipe(_needs_imatrix(kind))
    overrides = _overrides(spec.get("overrides", ()), kind, imatrix)
    return Recipe(type=kind, overrides=overrides, imatrix=imatrix)


def _named(spec: str) -> Recipe:
    kind = _type_name(spec)
    if kind in NEED_IMATRIX:
        raise BadRecipe(_needs_imatrix(kind))
    return PRESETS[kind]


def _type_name(value: object) -> str:
    if not isinstance(value, str):
        raise BadRecipe("a recipe needs a type, for example q4_k_m")
    if "/" in value or "\\" in value:
        raise BadRecipe("a recipe is a name such as q4_k_m, never a path or URL")
    name = value.strip().lower()
    if name not in FILE_TYPES:
        near = difflib.get_close_matches(name[:40], FILE_TYPES, n=3, cutoff=0.4) or ["q4_k_m", "q8_0", "f16"]
        raise BadRecipe(f"unknown recipe {shown(value[:40])}; did you mean {' or '.join(near)}?")
    return name


def _needs_imatrix(kind: str) -> str:
    return f"{kind} needs an importance matrix (imatrix), without which its output is noise"


def _imatrix(value: object, local: bool) -> str | None:
    if value is None:
        return None
    if not local:
        raise BadRecipe("an imatrix file can be named on the server's own command line only")
    if not isinstance(value, str) or not Path(value).is_file():
        raise BadRecipe("the imatrix is no file")
    return value


def _overrides(value: object, kind: str, imatrix: str | None) -> tuple[tuple[str, str], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or len(pairs) > MOST_OVERRIDES:
        raise BadRecipe(f"overrides are at most {MOST_OVERRIDES} pairs of tensor-name pattern and type")
    if pairs and kind in FLOAT_TYPES:
        raise BadRecipe(f"{kind} keeps every tensor as it is and takes no overrides")
    return tuple(_override(pair, imatrix) for pair in pairs)


def _override(pair: object, imatrix: str | None) -> tuple[str, str]:
    match pair:
        case [str(pattern), str(kind)]:
            pass
        case _:
            raise BadRecipe("an override is a pair of tensor-name pattern and type")
    if not _is_plain(pattern):
        raise BadRecipe(f"override pattern {shown(pattern)} is no plain regular expression on tensor names")
    name = kind.lower()
    if name not in OVERRIDE_TYPES:
        near = difflib.get_close_matches(name[:40], OVERRIDE_TYPES, n=3, cutoff=0.4) or ["q8_0", "f16"]
        raise BadRecipe(f"unknown tensor type {shown(kind[:40])}; did you mean {' or '.join(near)}?")
    if name in OVERRIDES_NEED_IMATRIX and imatrix is None:
        raise BadRecipe(_needs_imatrix(name))
    return pattern, name


def _is_plain(pattern: str) -> bool:
    if not _PATTERN.fullmatch(pattern) or _REPEATED_GROUP.search(pattern):
        return False
    if len(_REPEAT.findall(pattern)) > _MOST_REPEATS:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _content_digest(path: str) -> str:
    try:
        status = Path(path).stat()
        return _digest_of(path, status.st_size, status.st_mtime_ns, status.st_ino)
    except (OSError, BadSource) as error:
        raise BadRecipe("the imatrix file cannot be read") from error


@lru_cache(maxsize=64)
def _digest_of(path: str, size: int, mtime_ns: int, inode: int) -> str:
    with open_regular(Path(path)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
