"""`quantization_config`: ours says the schemes again, other writers' is read or refused by name."""

from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from transformers import BitsAndBytesConfig

from quant.errors import BadRecipe, BadSource
from quant.formats.modules import format_of
from quant.scheme import Scheme
from tests.quant.formats.layers import PAIRS, form, label

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
]
SHAPES = dict.fromkeys([*NAMES, "lm_head"], (128, 128))
W4, W8 = Scheme(bits=4), Scheme(bits=8)


@pytest.mark.parametrize(("name", "scheme"), PAIRS, ids=label)
def test_schemes_and_kept_layers_are_read_again(name: str, scheme: Scheme) -> None:
    kept = ("model.layers.1.mlp.down_proj",)
    layers: dict[str, Scheme | None] = {module: scheme for module in NAMES if module not in kept}
    config = form(name).config(layers, kept)
    assert format_of(config) is form(name)
    shapes = SHAPES if name != "awq" else {module: SHAPES[module] for module in NAMES}
    assert form(name).schemes(config, shapes) == layers  # AutoAWQ leaves lm_head out by itself


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_several_schemes_in_one_file(name: str) -> None:
    layers: dict[str, Scheme | None] = {module: W8 if "down" in module else W4 for module in NAMES}
    assert form(name).schemes(form(name).config(layers, ()), SHAPES) == layers


def test_awq_has_one_scheme_for_all() -> None:
    mixed = {"a": Scheme(bits=4, symmetric=False), "b": Scheme(bits=4, group=32, symmetric=False)}
    with pytest.raises(BadRecipe, match="one scheme for all layers, not 2"):
        form("awq").config(mixed, ())


# As AutoAWQ's AwqConfig.to_transformers_dict writes it.
AUTOAWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
# As GPTQModel 7.6.0's QuantizeConfig.to_dict writes it, "meta" shortened.
GPTQMODEL = {
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "lm_head": False,
    "method": "gptq",
    "quant_method": "gptq",
    "format": "gptq",
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "meta": {"offload_to_disk": True, "act_group_aware": True, "mse": 0.0},
    "sym": True,
}
# As AutoGPTQ 0.4 wrote it, before there were versions.
AUTOGPTQ = {"bits": 8, "group_size": -1, "damp_percent": 0.01, "desc_act": True, "sym": True} | {
    "quant_method": "gptq",
    "true_sequential": True,
    "model_name_or_path": None,
}


def llm_compressor(preset: str, **changes: Any) -> dict[str, Any]:
    """As compressed-tensors writes the config of one of its presets."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    kind = "int-quantized" if preset == "W8A8" else "pack-quantized"
    scheme.format = kind
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=kind,
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return written | {"version": "0.20.0"} | changes


def read(config: dict[str, Any]) -> dict[str, Scheme | None]:
    return format_of(config).schemes(config, SHAPES)


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (GPTQMODEL, Scheme(bits=4, group=32)),
        (
            GPTQMODEL | {"checkpoint_format": "gptq_v2", "sym": False},
            Scheme(bits=4, group=32, symmetric=False),
        ),
        (AUTOGPTQ, Scheme(bits=8, group=None)),
        (llm_compressor("W4A16"), W4),
        (llm_compressor("W4A16_ASYM"), Scheme(bits=4, symmetric=False)),
        (llm_compressor("W8A16"), W8),
        (llm_compressor("W8A8"), Scheme(bits=8, group=None)),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict(), None),
        (BitsAndBytesConfig(load_in_8bit=True).to_dict(), None),
    ],
)
def test_other_writers(config: dict[str, Any], scheme: Scheme | None) -> None:
    assert read(config) == dict.fromkeys(NAMES, scheme)


def test_autoawq_skips_by_parts_of_names() -> None:
    assert set(read(AUTOAWQ)) == set(SHAPES)
    skipping = AUTOAWQ | {"modules_to_not_convert": ["lm_head", "self_attn", "layers.1."]}
    assert set(read(skipping)) == {name for name in NAMES if "mlp" in name and ".1." not in name}


def test_gptqmodel_overrides_by_the_first_pattern_that_fits() -> None:
    dynamic = {
        "-:.*o_proj$": {},
        r"+:.*layers\.1\..*": {"bits": 8, "group_size": -1},
        r".*\.mlp\.gate.*": {"group_size": 64},
    }
    found = read(GPTQMODEL | {"dynamic": dynamic})
    assert set(found) == {name for name in NAMES if "o_proj" not in name}
    assert found["model.layers.1.mlp.gate_proj"] == Scheme(bits=8, group=None)
    assert found["model.layers.11.mlp.gate_proj"] == Scheme(bits=4, group=64)
    assert found["model.layers.0.mlp.down_proj"] == Scheme(bits=4, group=32)


def test_llm_compressor_ignores_and_targets_by_patterns() -> None:
    weights = llm_compressor("W4A16")["config_groups"]["group_0"]["weights"]
    named = {"targets": [r"re:.*down_proj$"], "weights": weights | {"num_bits": 8}}
    config = llm_compressor("W4A16", ignore=["lm_head", r"re:model\.layers\.1\..*"])
    config["config_groups"]["group_1"] = config["config_groups"]["group_0"] | named
    found = read(config)
    assert set(found) == {name for name in NAMES if ".1." not in name}
    assert found["model.layers.0.mlp.down_proj"] == W8
    assert found["model.layers.0.mlp.gate_proj"] == W4


def test_bitsandbytes_skips_by_ends_and_beginnings_of_names() -> None:
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found = read(four | {"llm_int8_skip_modules": ["lm_head", "o_proj", "model.layers.1"]})
    assert set(found) == {name for name in NAMES if "o_proj" not in name and ".1." not in name}


def in_group(**changes: Any) -> dict[str, Any]:
    config = llm_compressor("W4A16")
    weights = config["config_groups"]["group_0"]["weights"]
    config["config_groups"]["group_0"]["weights"] = weights | changes
    return config


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "exl3"}, "quant_method 'exl3' is not supported"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
        (llm_compressor("W4A16", format="marlin-24"), "format 'marlin-24' is not supported"),
        (llm_compressor("W4A16", format="float-quantized"), "format 'float-quantized' is not supported"),
        (llm_compressor("W4A16", quantization_status="frozen"), "quantization_status 'frozen'"),
        (llm_compressor("W4A16", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (llm_compressor("W4A16", transform_config={"R1": {}}), "transform_config"),
        (llm_compressor("W4A16", ignore=["re:(a+)+$"]), "pattern '(a+)+$' is not supported"),
        (
            llm_compressor("W4A16", ignore="lm_head"),
            "ignore 'lm_head' is not supported, only a list of texts",
        ),
        (llm_compressor("W4A16", config_groups={"group_0": {"targets": ["Linear"]}}), "has no weights"),
        (in_group(num_bits=3), "num_bits 3 is not supported, only 4 or 8"),
        (in_group(type="float"), "type 'float' is not supported, only int"),
        (in_group(strategy="tensor"), "strategy 'tensor'"),
        (in_group(actorder="group"), "actorder 'group'"),
        (AUTOAWQ | {"version": "gemv"}, "version 'gemv' is not supported, only gemm"),
        (AUTOAWQ | {"version": "marlin"}, "version 'marlin'"),
        (AUTOAWQ | {"zero_point": False}, "zero_point False is not supported, only True"),
        (AUTOAWQ | {"bits": 3}, "bits 3 is not supported, only 4"),
        (AUTOAWQ | {"backend": "llm-awq"}, "backend 'llm-awq'"),
        (AUTOAWQ | {"group_size": "128"}, "group_size '128' is not supported, only a whole number"),
        (AUTOAWQ | {"group_size": 0}, "group_size 0"),
        (GPTQMODEL | {"desc_act": True}, "desc_act True"),
        (GPTQMODEL | {"bits": 3}, "bits 3 is not supported, only 4 or 8"),
        (GPTQMODEL | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQMODEL | {"is_marlin_format": True}, "is_marlin_format True"),
        (GPTQMODEL | {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        (GPTQMODEL | {"dynamic": {"+:(?=x)": {}}}, "pattern '(?=x)'"),
        (GPTQMODEL | {"dynamic": {".*": {"bits": 2}}}, "bits 2"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
            "bnb_4bit_quant_storage 'bfloat16' is not supported, only uint8",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
            "llm_int8_has_fp16_weight True",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], why: str) -> None:
    with pytest.raises(BadSource) as caught:
        read(config)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_static_activations_are_refused() -> None:
    config = llm_compressor("W8A8")
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(BadSource, match=r"input_activations.dynamic False is not supported, only True"):
        read(config)
