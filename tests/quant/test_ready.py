"""Which format a quantized checkpoint has, by its config.json alone: as the readers of the formats say."""

import pytest

from quant.errors import BadSource
from quant.formats.modules import format_of
from quant.ready import own_format

CONFIGS: list[tuple[dict[str, object], str]] = [
    ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}, "gptq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb4"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bnb4"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "bnb8"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors-int8"),
]


@pytest.mark.parametrize(("config", "name"), CONFIGS)
def test_the_name_is_that_of_the_format_which_reads_it(config: dict[str, object], name: str) -> None:
    assert own_format({"quantization_config": config}) == name
    assert format_of(config).name == name


def test_a_checkpoint_in_full_precision_has_none() -> None:
    assert own_format({}) is None


@pytest.mark.parametrize(
    "config",
    [{"quant_method": "hqq"}, {"quant_method": ["awq"]}, {}, "awq", {"quant_method": "gptq\n", "x": 1}],
)
def test_what_nobody_here_reads_is_refused_in_one_line(config: object) -> None:
    with pytest.raises(BadSource) as error:
        own_format({"quantization_config": config})
    assert "\n" not in str(error.value)


def test_a_compressed_format_that_is_not_read_is_named() -> None:
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    with pytest.raises(BadSource, match="float-quantized"):
        own_format({"quantization_config": config})
