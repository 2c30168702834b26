"""Formats are named in a table, found by what config.json says, and refuse what they cannot store."""

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from quant.errors import BadRecipe
from quant.formats import registry
from quant.formats.awq import AWQ
from quant.scheme import Scheme
from tests.quant.formats.layers import form

W4 = Scheme(bits=4)
W4A = Scheme(bits=4, symmetric=False)
ROW = Scheme(bits=4, group=None)


def test_every_format_loads_and_knows_its_name() -> None:
    for name in registry.BUILTIN:
        assert registry.load(name).name == name
    assert set(registry.names()) >= set(registry.BUILTIN)


def test_an_unknown_format_is_named_with_the_known_ones() -> None:
    with pytest.raises(BadRecipe, match="no format 'exl2'; known: awq, bnb4"):
        registry.load("exl2")


def test_listing_formats_imports_no_torch() -> None:
    code = "import sys, quant.formats.registry as r; r.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_torch_there_is_one_clear_line() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import quant.formats.registry as r, quant.errors as e\n"
        "try: r.load('awq')\n"
        "except e.BadRecipe as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said == "format 'awq' needs torch, which is not installed\n"


def test_another_package_adds_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "quant.formats.awq:AWQ", registry.GROUP)

    def points(group: str, name: str = point.name) -> EntryPoints:
        return EntryPoints([point]).select(group=group, name=name)

    monkeypatch.setattr(registry, "entry_points", points)
    assert "mine" in registry.names()
    assert registry.load("mine") is AWQ


@pytest.mark.parametrize(
    ("name", "shape", "scheme", "why"),
    [
        ("awq", (64, 172), W4A, "172 input columns do not divide into groups of 128"),
        ("awq", (12, 128), W4A, "awq packs 8 codes along the output; 12 rows are no multiple of that"),
        ("awq", (64, 128), W4, "awq stores 4-bit asymmetric codes, not 4-bit symmetric"),
        (
            "awq",
            (64, 128),
            Scheme(bits=4, group=None, symmetric=False),
            "awq stores groups of 32 or 64 or 128, not one scale a row",
        ),
        ("awq", (64, 128), None, "awq needs bits and a group size"),
        ("gptq", (64, 172), ROW, "gptq packs 8 codes along the input; 172 columns are no multiple of that"),
        ("gptq", (12, 128), W4, "gptq packs 8 codes along the output; 12 rows are no multiple of that"),
        (
            "gptq",
            (64, 128),
            W4A,
            "gptq stores 4-bit symmetric, 8-bit symmetric codes, not 4-bit asymmetric",
        ),
        ("gptq-v2", (64, 128), W4, "gptq_v2 is only read; write gptq"),
        ("compressed-tensors", (64, 172), W4, "172 input columns do not divide into groups of 128"),
        ("compressed-tensors", (64, 128), Scheme(bits=16), "16-bit symmetric"),
        ("compressed-tensors", (64, 128), Scheme(bits=4, group=48), "not groups of 48"),
        ("compressed-tensors-int8", (64, 128), Scheme(bits=8), "one scale a row, not groups of 128"),
        ("bnb4", (64, 96), None, "misread rows of 96 columns, a multiple of 16 that is none of 64"),
        ("bnb4", (64, 128), W4, "bnb4 has a scheme of its own"),
        ("bnb8", (64, 128), W4, "bnb8 has a scheme of its own"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_numbers(
    name: str, shape: tuple[int, int], scheme: Scheme | None, why: str
) -> None:
    said = form(name).refuse(shape, scheme)
    assert said is not None
    assert why in said
    assert "\n" not in said


def test_shapes_without_a_round_number_are_stored_where_the_layout_has_room() -> None:
    assert form("compressed-tensors").refuse((10, 172), ROW) is None
    assert form("compressed-tensors-int8").refuse((10, 173), Scheme(bits=8, group=None)) is None
    assert form("bnb4").refuse((10, 172), None) is None
    assert form("bnb8").refuse((10, 173), None) is None
