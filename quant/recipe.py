"""What to do to a source, as data. Equal recipes have equal digests, which new fields never change."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from quant.canonical import canonical_digest, content_digest
from quant.errors import BadRecipe, BadSource
from quant.files import quoted
from quant.ggml import FILE_TYPES, FLOAT_TYPES, NEED_IMATRIX, OVERRIDE_TYPES, OVERRIDES_NEED_IMATRIX
from quant.patterns import is_plain
from quant.torch_recipe import TORCH_PRESETS, TorchRecipe, parse_torch

__all__ = ["GGUF_PRESETS", "PRESETS", "TORCH_PRESETS", "GgufRecipe", "Recipe", "TorchRecipe", "parse_recipe"]

Body = Mapping[str, str | list[list[str]]]

MOST_OVERRIDES = 64
SELF = "self"  # an imatrix that the build collects, from text that the source writes
_FIELDS = frozenset({"method", "format", "type", "overrides", "imatrix"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufRecipe:
    """Made by `parse_recipe`; `imatrix`: SELF or a path; the digest sees a file's content."""

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
        if self.imatrix in {None, SELF}:
            return self.spec
        try:
            return {**self.spec, "imatrix": f"sha256:{content_digest(Path(self.imatrix or ''))}"}
        except (OSError, BadSource) as error:
            raise BadRecipe("the imatrix file cannot be read") from error

    @property
    def digest(self) -> str:
        return canonical_digest(self.body)

    @property
    def name(self) -> str:
        if self != GGUF_PRESETS.get(self.type):
            return f"custom-{self.digest[:8]}"
        return self.type


Recipe = GgufRecipe | TorchRecipe

GGUF_PRESETS: Mapping[str, GgufRecipe] = MappingProxyType(
    {name: GgufRecipe(type=name, imatrix=SELF if name in NEED_IMATRIX else None) for name in FILE_TYPES}
)
PRESETS: Mapping[str, Recipe] = MappingProxyType({**GGUF_PRESETS, **TORCH_PRESETS})


def parse_recipe(spec: str | Mapping[str, object], *, local: bool = False) -> Recipe:
    """A name ("q4_k_m", "gptq-w4g128"), or the fields of a recipe as JSON has them. Raises BadRecipe.

    Only callers on this machine (command line, build process) pass `local`: it lets the recipe name a file.
    """
    if isinstance(spec, str):
        return _named(spec)
    if "type" not in spec and (spec.get("method") or spec.get("format")):
        return parse_torch(spec, local=local)
    return _parse_gguf(spec, local)


def _parse_gguf(spec: Mapping[str, object], local: bool) -> GgufRecipe:
    if unknown := sorted(str(key) for key in spec if key not in _FIELDS):
        raise BadRecipe(f"unknown field{quoted(unknown[0])}; a recipe has {', '.join(sorted(_FIELDS))}")
    for field, only in (("method", "llama"), ("format", "gguf")):
        if spec.get(field, only) != only:
            raise BadRecipe(f"{field}{quoted(spec[field])} is unknown; there is {only}")
    kind = _type_name(spec.get("type"))
    imatrix = _imatrix(spec.get("imatrix"), local) or GGUF_PRESETS[kind].imatrix
    overrides = _overrides(spec.get("overrides", ()), kind, imatrix)
    return GgufRecipe(type=kind, overrides=overrides, imatrix=imatrix)


def _named(spec: str) -> Recipe:
    if preset := TORCH_PRESETS.get(spec.strip().lower()):
        return preset
    return GGUF_PRESETS[_type_name(spec)]


def _type_name(value: object) -> str:
    if not isinstance(value, str):
        raise BadRecipe("a recipe needs a type, for example q4_k_m")
    if "/" in value or "\\" in value:
        raise BadRecipe("a recipe is a name such as q4_k_m, never a path or URL")
    name = value.strip().lower()
    if name not in FILE_TYPES:
        known = [*FILE_TYPES, *TORCH_PRESETS]
        near = difflib.get_close_matches(name[:40], known, n=3, cutoff=0.4) or ["q4_k_m", "q8_0", "f16"]
        raise BadRecipe(f"unknown recipe{quoted(value[:40])}; did you mean {' or '.join(near)}?")
    return name


def _needs_imatrix(kind: str) -> str:
    return f"{kind} needs an importance matrix (imatrix), without which its output is noise"


def _imatrix(value: object, local: bool) -> str | None:
    if value is None or value == SELF:
        return SELF if value else None
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
    if not is_plain(pattern):
        raise BadRecipe(f"override pattern{quoted(pattern)} is no plain regular expression on tensor names")
    name = kind.lower()
    if name not in OVERRIDE_TYPES:
        near = difflib.get_close_matches(name[:40], OVERRIDE_TYPES, n=3, cutoff=0.4) or ["q8_0", "f16"]
        raise BadRecipe(f"unknown tensor type{quoted(kind[:40])}; did you mean {' or '.join(near)}?")
    if name in OVERRIDES_NEED_IMATRIX and imatrix is None:
        raise BadRecipe(_needs_imatrix(name))
    return pattern, name
