"""Recipes for the formats that PyTorch reads: method, format, scheme, and what fits what."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from quant.canonical import canonical_digest, content_digest
from quant.errors import BadRecipe, BadSource
from quant.files import quoted
from quant.patterns import is_plain
from quant.scheme import Scheme

MOST_OVERRIDES = 64
MOST_SAMPLES, MOST_LENGTH = 4096, 32768
_FIELDS = frozenset({"method", "format", "scheme", "overrides", "skip", "calibration", "options", "dtype"})
_OPTION = re.compile(r"[a-z][a-z0-9_]{0,39}")
DTYPES = ("bf16", "f16", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Which text a method sees. `length` None: 512 tokens, or the model's context if that is shorter."""

    kind: Literal["self", "corpus"] = "self"
    corpus: str | None = None  # path of a .txt or .jsonl file
    samples: int = 128
    length: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """What one format stores. `schemes` are (bits, symmetric); none for formats with one way only."""

    methods: frozenset[str]
    schemes: frozenset[tuple[int, bool]] = frozenset()
    groups: tuple[int | None, ...] = ()
    default: Scheme | None = None
    mixed: bool = False  # whether modules may have different schemes
    rounds_activations: bool = False  # whether the inputs of its modules are rounded to 8 bits, too


_GROUPS = (32, 64, 128)
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "compressed-tensors": Rule(
            frozenset({"rtn", "gptq", "awq", "awq+gptq", "best"}),
            frozenset({(4, True), (4, False), (8, True)}),
            (*_GROUPS, None),
            Scheme(bits=4),
            mixed=True,
        ),
        "compressed-tensors-int8": Rule(
            frozenset({"smoothquant", "rtn"}),
            frozenset({(8, True)}),
            (None,),
            Scheme(bits=8, group=None),
            rounds_activations=True,
        ),
        "awq": Rule(
            frozenset({"awq", "awq+gptq", "rtn"}),
            frozenset({(4, False)}),
            _GROUPS,
            Scheme(bits=4, symmetric=False),
        ),
        "gptq": Rule(
            frozenset({"gptq", "rtn", "best"}),
            frozenset({(4, True), (8, True)}),
            (*_GROUPS, None),
            Scheme(bits=4),
        ),
        "bnb4": Rule(frozenset({"nf4", "fp4"})),
        "bnb8": Rule(frozenset({"int8"})),
        "plain": Rule(frozenset({"copy"})),
    }
)
CALIBRATED = frozenset({"gptq", "awq", "awq+gptq", "best", "smoothquant"})
METHODS = frozenset().union(*(rule.methods for rule in RULES.values()))
# Options by method: name -> smallest and largest value. Left out, the method's own default holds.
_TRUTH = (0.0, 1.0)
_SEARCHED = {"tokens": (64.0, 1e6), "ratios": (1.0, 100.0)}  # by the search for scales
_SOLVED = {"damping": (1e-5, 1.0), "mse": (0.0, 2.0)}
OPTIONS: Mapping[str, Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "gptq": _SOLVED,
        "awq": {**_SEARCHED, "clip": _TRUTH},
        "awq+gptq": {**_SEARCHED, **_SOLVED},
        "best": {**_SEARCHED, **_SOLVED, "steps": (1.0, 1000.0), "batch": (64.0, 1e6)},
        "smoothquant": {"tokens": _SEARCHED["tokens"]},
        "nf4": {"double_quant": _TRUTH},
        "fp4": {"double_quant": _TRUTH},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRecipe:
    """Made by `parse_recipe`, which checks it. The corpus is a path; the digest sees the file's content."""

    method: str
    format: str
    scheme: Scheme | None = None
    overrides: tuple[tuple[str, Scheme | None], ...] = ()  # (regular expression on module names, scheme)
    skip: tuple[str, ...] = ()  # regular expressions: these modules keep their weights
    calibration: Calibration | None = None  # None for methods that look at no activations
    options: tuple[tuple[str, float], ...] = ()
    dtype: str | None = None  # of the plain format

    @property
    def spec(self) -> dict[str, Any]:
        """What `parse_recipe(..., local=True)` turns into this recipe again."""
        body: dict[str, Any] = {"method": self.method, "format": self.format}
        if self.scheme:
            body["scheme"] = _plain(self.scheme)
        if self.overrides:
            body["overrides"] = [[name, scheme and _plain(scheme)] for name, scheme in self.overrides]
        if self.skip:
            body["skip"] = list(self.skip)
        if self.calibration:
            body["calibration"] = _plain(self.calibration)
        if self.options:
            body["options"] = dict(self.options)
        if self.dtype:
            body["dtype"] = self.dtype
        return body

    @property
    def body(self) -> dict[str, Any]:
        """The canonical form that is digested and written to manifests. Raises BadRecipe (corpus gone)."""
        body = self.spec
        if self.calibration and self.calibration.corpus:
            body["calibration"]["corpus"] = f"sha256:{_content_of(self.calibration.corpus)}"
        return body

    @property
    def digest(self) -> str:
        return canonical_digest(self.body)

    @property
    def name(self) -> str:
        return _PRESET_NAMES.get(self) or f"custom-{self.digest[:8]}"

    def scheme_of(self, module: str) -> Scheme | Literal["keep"] | None:
        """What becomes of the linear of this name: a scheme, the format's one way (None), or "keep"."""
        if any(re.search(pattern, module) for pattern in self.skip):
            return "keep"
        for pattern, scheme in self.overrides:
            if re.search(pattern, module):
                return scheme or "keep"
        return self.scheme


def _plain(value: Scheme | Calibration) -> dict[str, Any]:
    named = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Scheme):
        return named  # group None says "channel", and must be said
    return {key: found for key, found in named.items() if found is not None}


def _content_of(corpus: str) -> str:
    try:
        return content_digest(Path(corpus))
    except (OSError, BadSource) as error:
        raise BadRecipe("the calibration corpus cannot be read") from error


def _preset(method: str, format: str, scheme: Scheme | None = None, **more: Any) -> TorchRecipe:
    calibration = Calibration() if method in CALIBRATED else None
    return TorchRecipe(method=method, format=format, scheme=scheme, calibration=calibration, **more)


_W4, _W8, _W8_CHANNEL = Scheme(bits=4), Scheme(bits=8), Scheme(bits=8, group=None)
TORCH_PRESETS: Mapping[str, TorchRecipe] = MappingProxyType(
    {
        "nf4": _preset("nf4", "bnb4"),
        "fp4": _preset("fp4", "bnb4"),
        "int8": _preset("int8", "bnb8"),
        "awq-w4g128": _preset("awq", "awq", Scheme(bits=4, symmetric=False)),
        "gptq-w4g128": _preset("gptq", "gptq", _W4),
        "gptq-w8g128": _preset("gptq", "gptq", _W8),
        "w4a16": _preset("awq+gptq", "compressed-tensors", _W4),
        "w8a16": _preset("rtn", "compressed-tensors", _W8_CHANNEL),
        "w8a8": _preset("smoothquant", "compressed-tensors-int8", _W8_CHANNEL),
        "best": _preset("best", "compressed-tensors", _W4),
    }
)
_PRESET_NAMES = {recipe: name for name, recipe in TORCH_PRESETS.items()}


def parse_torch(spec: Mapping[str, object], *, local: bool) -> TorchRecipe:
    """Raises BadRecipe for what no field allows, and for pairs that do not fit."""
    if unknown := sorted(str(key) for key in spec if key not in _FIELDS):
        raise BadRecipe(f"unknown field{quoted(unknown[0])}; a recipe has {', '.join(sorted(_FIELDS))}")
    method, format = _word(spec, "method"), _word(spec, "format")
    rule = _rule(method, format)
    return TorchRecipe(
        method=method,
        format=format,
        scheme=_scheme(spec.get("scheme"), format, rule),
        overrides=_overrides(spec.get("overrides", ()), format, rule),
        skip=_skip(spec.get("skip", ())),
        calibration=_calibration(spec, method, local),
        options=_options(spec.get("options", {}), method),
        dtype=_dtype(spec.get("dtype"), format),
    )


def _word(spec: Mapping[str, object], field: str) -> str:
    value = spec.get(field)
    if not isinstance(value, str):
        raise BadRecipe(f"a recipe needs a {field}, for example gptq")
    return value


def _rule(method: str, format: str) -> Rule:
    """What the format allows; the formats and methods of other packages judge for themselves."""
    if format not in RULES and format not in _foreign("quantserve.formats"):
        raise BadRecipe(f"format{quoted(format)} is unknown; there is {_listed(RULES)}")
    if method not in METHODS and method not in _foreign("quantserve.methods"):
        raise BadRecipe(f"method{quoted(method)} is unknown; there is {_listed(METHODS)}")
    rule = RULES.get(format, Rule(frozenset({method}), default=Scheme(bits=4), mixed=True))
    if method in METHODS and method not in rule.methods:
        raise BadRecipe(f"format {format} takes method {_listed(rule.methods, 'or')}, not {method}")
    return rule


def _foreign(group: str) -> frozenset[str]:
    return frozenset(point.name for point in entry_points(group=group))


def _listed(names: Iterable[str], last: str = "and") -> str:
    *first, end = sorted(names)
    return f"{', '.join(first)} {last} {end}" if first else end


def _scheme(value: object, format: str, rule: Rule) -> Scheme | None:
    if rule.default is None:
        if value is not None:
            raise BadRecipe(f"format {format} has one scheme only and takes none")
        return None
    if value is None:
        return rule.default
    if not isinstance(value, Mapping) or value.keys() - {"bits", "group", "symmetric"}:
        raise BadRecipe("a scheme has the fields bits, group and symmetric")
    scheme = Scheme(
        bits=_bits(value.get("bits")),
        group=_group(value.get("group", rule.default.group)),
        symmetric=_flag(value.get("symmetric", rule.default.symmetric)),
    )
    _require_stored(scheme, format, rule)
    return scheme


def _bits(value: object) -> int:
    if type(value) is not int or not 2 <= value <= 8:
        raise BadRecipe(f"bits is a number from 2 to 8{quoted(value, ', not ')}")
    return value


def _group(value: object) -> int | None:
    if value in (None, "channel"):
        return None
    if type(value) is not int or not 8 <= value <= 65536:
        raise BadRecipe(f"group is a number of columns, or null for whole rows{quoted(value, ', not ')}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise BadRecipe(f"symmetric is true or false{quoted(value, ', not ')}")
    return value


def _require_stored(scheme: Scheme, format: str, rule: Rule) -> None:
    if rule.schemes and (scheme.bits, scheme.symmetric) not in rule.schemes:
        known = _listed((_described(*pair) for pair in rule.schemes), "or")
        raise BadRecipe(f"format {format} stores {known} only")
    if rule.groups and scheme.group not in rule.groups:
        known = ", ".join("whole rows" if group is None else str(group) for group in rule.groups)
        raise BadRecipe(f"format {format} has groups of {known} only")


def _described(bits: int, symmetric: bool) -> str:
    return f"{bits} bits {'symmetric' if symmetric else 'asymmetric'}"


def _overrides(value: object, format: str, rule: Rule) -> tuple[tuple[str, Scheme | None], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or len(pairs) > MOST_OVERRIDES:
        raise BadRecipe(f"overrides are at most {MOST_OVERRIDES} pairs of module-name pattern and scheme")
    return tuple(_override(pair, format, rule) for pair in pairs)


def _override(pair: object, format: str, rule: Rule) -> tuple[str, Scheme | None]:
    match pair:
        case [str(pattern), None]:
            return _pattern(pattern), None
        case [str(pattern), Mapping() as scheme]:
            if not rule.mixed:
                raise BadRecipe(f"in format {format} all modules have one scheme; overrides can be null only")
            return _pattern(pattern), _scheme(scheme, format, rule)
    raise BadRecipe("an override is a pair of module-name pattern and scheme, or null to keep the weights")


def _skip(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MOST_OVERRIDES:
        raise BadRecipe(f"skip is a list of at most {MOST_OVERRIDES} module-name patterns")
    return tuple(_pattern(one) for one in value)


def _pattern(value: object) -> str:
    if not isinstance(value, str) or not is_plain(value):
        raise BadRecipe(f"pattern{quoted(value)} is no plain regular expression on module names")
    return value


def _calibration(spec: Mapping[str, object], method: str, local: bool) -> Calibration | None:
    value = spec.get("calibration")
    if value is None:
        return Calibration() if method in CALIBRATED else None
    if method in METHODS - CALIBRATED:
        raise BadRecipe(f"method {method} looks at no text and takes no calibration")
    known = {field.name for field in fields(Calibration)}
    if not isinstance(value, Mapping) or value.keys() - known:
        raise BadRecipe(f"calibration has the fields {', '.join(sorted(known))}")
    kind, corpus = value.get("kind", "corpus" if "corpus" in value else "self"), value.get("corpus")
    if kind not in ("self", "corpus") or (corpus is not None) != (kind == "corpus"):
        raise BadRecipe('calibration is of the kind "self", or "corpus" with a file')
    return Calibration(
        kind="corpus" if kind == "corpus" else "self",
        corpus=None if corpus is None else _corpus(corpus, local),
        samples=_count(value.get("samples", 128), "samples", MOST_SAMPLES),
        length=None if value.get("length") is None else _count(value["length"], "length", MOST_LENGTH),
        seed=_count(value.get("seed", 0), "seed", 2**31 - 1, least=0),
    )


def _corpus(value: object, local: bool) -> str:
    if not local:
        raise BadRecipe("a corpus can be named on the server's own command line only")
    if not isinstance(value, str) or not Path(value).is_file():
        raise BadRecipe("the calibration corpus is no file")
    if Path(value).suffix not in {".txt", ".jsonl"}:
        raise BadRecipe("a calibration corpus is a .txt or a .jsonl file")
    return value


def _count(value: object, field: str, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise BadRecipe(f"{field} is a number from {least} to {most:,}{quoted(value, ', not ')}")
    return value


def _options(value: object, method: str) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping):
        raise BadRecipe("options are names and numbers")
    return tuple(sorted(_option(name, number, method) for name, number in value.items()))


def _option(name: object, value: object, method: str) -> tuple[str, float]:
    known = OPTIONS.get(method, {})
    if not isinstance(name, str) or not _OPTION.fullmatch(name) or (method in METHODS and name not in known):
        has = f"its options are {_listed(known)}" if known else "it has none"
        raise BadRecipe(f"method {method} has no option{quoted(name)}; {has}")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRecipe(f"option {name} is a number{quoted(value, ', not ')}")
    low, high = known.get(name, (-math.inf, math.inf))
    if not low <= value <= high:
        raise BadRecipe(f"option {name} is a number from {low:g} to {high:g}{quoted(value, ', not ')}")
    return name, float(value)


def _dtype(value: object, format: str) -> str | None:
    if format != "plain":
        if value is not None:
            raise BadRecipe(f"format {format} keeps the source's dtype; only plain has a dtype")
        return None
    if value is None:
        return "bf16"
    if value not in DTYPES:
        raise BadRecipe(f"dtype is {_listed(DTYPES, 'or')}{quoted(value, ', not ')}")
    return str(value)
