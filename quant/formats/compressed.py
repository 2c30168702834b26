"""What compressed-tensors' formats have in common: config.json's groups of targets."""

from collections.abc import Callable, Mapping
from typing import Any

from quant.errors import BadSource
from quant.formats import fields
from quant.scheme import Scheme

LINEAR = "Linear"  # the class: every linear module
ReadGroup = Callable[[fields.Config], Scheme]


def write_config(
    name: str,
    layers: Mapping[str, Scheme | None],
    kept: tuple[str, ...],
    inputs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """One config group for each scheme; the modules are named where there are several schemes."""
    by_scheme: dict[Scheme, list[str]] = {}
    for module, scheme in layers.items():
        assert scheme is not None
        by_scheme.setdefault(scheme, []).append(module)
    groups = {
        f"group_{index}": {
            "targets": modules if len(by_scheme) > 1 else [LINEAR],
            "weights": _weights(scheme),
            "input_activations": inputs,
            "output_activations": None,
            "format": name,
        }
        for index, (scheme, modules) in enumerate(by_scheme.items())
    }
    head = () if "lm_head" in layers or "lm_head" in kept else ("lm_head",)
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": [*kept, *head],
        "config_groups": groups,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
    }


def reads(name: str, config: Mapping[str, Any]) -> bool:
    """A folder of several formats says "mixed-precision" and is nobody's here."""
    return config.get("quant_method") == "compressed-tensors" and config.get("format") == name


def read_schemes(
    name: str, config: fields.Config, modules: Mapping[str, tuple[int, int]], read_group: ReadGroup
) -> dict[str, Scheme | None]:
    """The scheme of each module that a config group targets and that is not ignored."""
    fields.only(config, "quantization_status", "compressed")
    for field in ("kv_cache_scheme", "moe_sparsity_config"):
        fields.only(config, field, None)
    for field in ("sparsity_config", "transform_config"):
        if fields.table(config, field):
            fields.unread(field, config[field], "none")
    targets = []
    for group in fields.table(config, "config_groups").values():
        if not isinstance(group, Mapping):
            fields.unread("config_groups", group, "objects")
        fields.only(group, "format", name, None)
        targets.append((fields.texts(group, "targets"), read_group(group)))
    ignored = fields.texts(config, "ignore")
    found: dict[str, Scheme | None] = {}
    for module in modules:
        if not _names(ignored, module) and (scheme := _first(targets, module)):
            found[module] = scheme
    return found


def read_weights(group: fields.Config, strategies: tuple[str, ...], bits: tuple[int, ...]) -> Scheme:
    """Raises BadSource for weights of another kind."""
    weights = fields.table(group, "weights")
    if not weights:
        raise BadSource("quantization_config: a config group has no weights")
    fields.only(group, "output_activations", None)
    fields.only(weights, "type", "int")
    if weights.get("num_bits") not in bits:
        fields.unread("num_bits", weights.get("num_bits"), " or ".join(map(str, bits)))
    strategy = weights.get("strategy") or _strategy(weights.get("group_size"))
    if strategy not in strategies:
        fields.unread("strategy", strategy, " or ".join(strategies))
    fields.only(weights, "dynamic", False)
    fields.only(weights, "actorder", None, "weight", "static", False)  # orders that leave columns in place
    size = fields.whole(weights, "group_size") if strategy == "group" else None
    if size is not None and size < 1:
        fields.unread("group_size", size, "a positive number")
    width = fields.whole(weights, "num_bits")
    return Scheme(bits=width, group=size, symmetric=fields.flag(weights, "symmetric", True))


def _strategy(size: object) -> str:
    """What compressed-tensors infers where none is given."""
    match size:
        case None:
            return "tensor"
        case -1:
            return "channel"
        case _:
            return "group"


def _first(targets: list[tuple[tuple[str, ...], Scheme]], module: str) -> Scheme | None:
    """Names come before the class, whatever the order of the groups, as in compressed-tensors."""
    for names, scheme in targets:
        if _names(names, module):
            return scheme
    return next((scheme for names, scheme in targets if LINEAR in names), None)


def _names(patterns: tuple[str, ...], module: str) -> bool:
    """By compressed-tensors' rule: the name itself, or "re:" and a regular expression on its beginning."""
    return any(
        fields.starts(pattern[3:], module) if pattern.startswith("re:") else pattern == module
        for pattern in patterns
    )
