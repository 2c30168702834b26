"""GPTQModel cannot be a dependency of the tests: what it wrote and read once stands in (golden/gptq.py)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant.scheme import Scheme
from tests.quant.formats.layers import assert_same, form

FILE = Path(__file__).parent / "golden" / "gptq.safetensors"
SHAPE = (16, 64)
CASES = {
    "w4g32": Scheme(bits=4, group=32),
    "w4row": Scheme(bits=4, group=None),
    "w8g64": Scheme(bits=8, group=64),
    "w8row": Scheme(bits=8, group=None),
    "w4g32-asymmetric": Scheme(bits=4, group=32, symmetric=False),
    "w8g32-asymmetric": Scheme(bits=8, group=32, symmetric=False),
}


def golden(name: str) -> dict[str, Tensor]:
    found = load_file(FILE).items()
    return {key.removeprefix(f"{name}."): tensor for key, tensor in found if key.startswith(f"{name}.")}


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_writes_what_we_write_and_decodes_what_we_decode(name: str) -> None:
    scheme, theirs = CASES[name], golden(name)
    decoded, second = theirs.pop("decoded"), theirs.pop("qzeros_v2")
    layer = form("gptq").unpack(theirs, SHAPE, scheme)
    assert torch.equal(layer.dequantize().half(), decoded)
    packed = form("gptq").pack(layer)
    assert set(packed) == set(theirs)
    for part, tensor in theirs.items():
        assert packed[part].dtype is tensor.dtype
        assert torch.equal(packed[part], tensor), part
    later = theirs | {"qzeros": second}
    assert_same(form("gptq-v2").unpack(later, SHAPE, scheme), layer)
    assert torch.equal(form("gptq-v2").pack(layer)["qzeros"], second)


def test_zero_points_that_borrow_are_among_them() -> None:
    """A reader that adds the one code by code would decode these wrongly."""
    theirs = golden("w4g32-asymmetric")
    layer = form("gptq").unpack(
        {part: theirs[part] for part in ("qweight", "qzeros", "scales", "g_idx")},
        SHAPE,
        CASES["w4g32-asymmetric"],
    )
    assert bool((layer.zeros == 0).any())  # type: ignore[union-attr]
