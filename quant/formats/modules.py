"""What is quantized in a folder, by config.json and the headers of its files; whoever wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant.errors import BadSource
from quant.files import shown
from quant.formats import registry
from quant.formats.base import Format, Tensors
from quant.layer import QuantizedLinear
from quant.safetensors_header import TensorInfo
from quant.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModule:
    name: str  # "model.layers.0.self_attn.q_proj"
    format: Format
    shape: tuple[int, int]  # [out, in]
    scheme: Scheme | None
    tensors: Mapping[str, TensorInfo]  # by suffix, as `Format.unpack` takes them; without the bias

    def unpack(self, tensors: Tensors) -> QuantizedLinear:
        """`tensors`: what `self.tensors` names, read, on any device. Raises BadSource naming the module."""
        try:
            return self.format.unpack(tensors, self.shape, self.scheme)
        except BadSource as error:
            raise BadSource(f"{shown(self.name)}: {error}") from error


def format_of(quantization: Mapping[str, Any]) -> Format:
    """The format of a `quantization_config`. Raises BadSource for one that nobody here reads."""
    for name in registry.names():
        if (found := registry.load(name)).reads(quantization):
            return found
    method, version = quantization.get("quant_method"), quantization.get("format")
    raise BadSource(
        f"quantization_config: quant_method {shown(method)}"
        f"{f' with format {shown(version)}' if version else ''} is not supported"
    )


def quantized_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, QuantizedModule]:
    """The quantized modules of a checkpoint; none if config.json has no `quantization_config`.

    Every other tensor is what it would be without quantization. Raises BadSource naming the module or field.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    if not isinstance(quantization, Mapping):
        raise BadSource("quantization_config is not an object")
    form = format_of(quantization)
    parts = _parts(form, tensors)
    shapes = {name: _shape(form, name, part) for name, part in parts.items()}
    schemes = form.schemes(quantization, shapes)
    for name in shapes:
        if name not in schemes:
            raise BadSource(
                f"{shown(name)} is quantized in the file, but config.json says it was kept as it was"
            )
    return {
        name: QuantizedModule(name=name, format=form, shape=shapes[name], scheme=schemes[name], tensors=part)
        for name, part in parts.items()
    }


def _parts(form: Format, tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Tensors of each module that has the format's marker, by suffix."""
    end = f".{form.marker}"
    names = (name.removesuffix(end) for name in tensors if name.endswith(end))
    return {
        name: {suffix: tensors[full] for suffix in form.suffixes if (full := f"{name}.{suffix}") in tensors}
        for name in names
    }


def _shape(form: Format, name: str, part: Mapping[str, TensorInfo]) -> tuple[int, int]:
    try:
        out, columns = form.shape(part)
    except KeyError as error:
        raise BadSource(f"{shown(name)}: {error.args[0]} is missing") from error
    except ValueError as error:
        raise BadSource(f"{shown(name)}: its weight is no matrix") from error
    except BadSource as error:
        raise BadSource(f"{shown(name)}: {error}") from error
    if out < 1 or columns < 1:
        raise BadSource(f"{shown(name)} is said to be {out} x {columns}")
    return out, columns
