"""Recipes are data: names, digests that last, and no way to smuggle a path in."""

from pathlib import Path

import pytest

from quant.errors import BadRecipe
from quant.ggml import FILE_TYPES, NEED_IMATRIX
from quant.recipe import PRESETS, Recipe, parse_recipe


def test_every_type_is_a_preset_or_says_that_it_needs_an_imatrix() -> None:
    assert PRESETS.keys() | NEED_IMATRIX == FILE_TYPES.keys()
    for name in FILE_TYPES:
        if name in NEED_IMATRIX:
            with pytest.raises(BadRecipe, match=f"{name} needs an importance matrix"):
                parse_recipe(name)
        else:
            assert parse_recipe(name.upper()).name == name


def test_digests_are_those_that_are_on_disks() -> None:
    """A change here orphans every variant that anybody has built."""
    q4, q8 = parse_recipe("q4_k_m"), parse_recipe("q8_0")
    assert q4.digest == "45ff851498e4720d27eaf003043000f570d1d4ff04984c0c1569516250b49693"
    assert q8.digest != q4.digest
    assert q4.body == {"method": "llama", "format": "gguf", "type": "q4_k_m"}


def test_specs_and_recipes_are_inverse(tmp_path: Path) -> None:
    imatrix = tmp_path / "i.dat"
    imatrix.write_bytes(b"x")
    for recipe in (
        *PRESETS.values(),
        Recipe(type="q4_k_m", overrides=(("attn_v", "q8_0"), (r"blk\.[0-3]\.ffn_down", "q6_k"))),
        Recipe(type="iq2_xxs", imatrix=str(imatrix)),
    ):
        assert parse_recipe(recipe.spec, local=True) == recipe


def test_equal_meaning_is_equal_digest() -> None:
    pairs = parse_recipe({"type": "Q4_K_M", "overrides": [["attn_v", "Q8_0"]]})
    table = parse_recipe({"method": "llama", "type": "q4_k_m", "overrides": {"attn_v": "q8_0"}})
    assert pairs == table
    assert pairs.digest == table.digest
    assert pairs.name == f"custom-{pairs.digest[:8]}"
    assert parse_recipe({"type": "q4_k_m", "overrides": []}).name == "q4_k_m"


def test_the_digest_sees_the_imatrix_and_not_its_path(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (parse_recipe({"type": "iq2_xs", "imatrix": str(tmp_path / n)}, local=True) for n in "abc")
    assert a.digest == b.digest != c.digest
    assert str(tmp_path) not in str(a.body)
    (tmp_path / "a").unlink()
    with pytest.raises(BadRecipe, match="imatrix file cannot be read"):
        _ = a.digest


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("q4km", "did you mean q4_k_m"),
        ("q9_z", "did you mean"),
        ("", "did you mean"),
        ("nf4 \x1b[31m" * 50, "did you mean"),
        ("../q4_k_m", "never a path or URL"),
        ("/etc/passwd", "never a path or URL"),
        ("http://a/b", "never a path or URL"),
        ("c:\\x", "never a path or URL"),
        ({}, "needs a type"),
        ({"type": 4}, "needs a type"),
        ({"type": "q4_k_m", "imatrix": "/etc/passwd"}, "own command line only"),
        ({"type": "q4_k_m", "bits": 4}, "has no field 'bits'"),
        ({"type": "q4_k_m", "method": "awq"}, "method 'awq' is unknown"),
        ({"type": "q4_k_m", "overrides": 5}, "overrides are"),
        ({"type": "q4_k_m", "overrides": [["a"]]}, "an override is a pair"),
        ({"type": "q4_k_m", "overrides": [["a", "q8_0"]] * 65}, "at most 64"),
        ({"type": "q4_k_m", "overrides": {"(a+)+": "q8_0"}}, "no plain regular expression"),
        ({"type": "q4_k_m", "overrides": {"a*b*c*d*e*": "q8_0"}}, "no plain regular expression"),
        ({"type": "q4_k_m", "overrides": {"(": "q8_0"}}, "no plain regular expression"),
        ({"type": "q4_k_m", "overrides": {"a" * 201: "q8_0"}}, "no plain regular expression"),
        ({"type": "q4_k_m", "overrides": {"../x": "q8_0"}}, "no plain regular expression"),
        ({"type": "q4_k_m", "overrides": {"attn_v": "q4_k_m"}}, "unknown tensor type 'q4_k_m'"),
        ({"type": "q4_k_m", "overrides": {"attn_v": "iq2_xs"}}, "iq2_xs needs an importance matrix"),
        ({"type": "f16", "overrides": {"attn_v": "q8_0"}}, "takes no overrides"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(spec: str | dict[str, object], what: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        parse_recipe(spec)
    assert what in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
