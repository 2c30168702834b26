"""Recipes are data: names, digests that last, and no way to smuggle a path in."""

from pathlib import Path

import pytest

from quant.errors import BadRecipe
from quant.ggml import FILE_TYPES, NEED_IMATRIX
from quant.recipe import GGUF_PRESETS, PRESETS, TORCH_PRESETS, GgufRecipe, TorchRecipe, parse_recipe
from quant.scheme import Scheme


def test_every_type_is_a_preset_and_collects_an_imatrix_where_it_needs_one() -> None:
    assert GGUF_PRESETS.keys() == FILE_TYPES.keys()
    for name in FILE_TYPES:
        recipe = parse_recipe(name.upper())
        assert isinstance(recipe, GgufRecipe)
        assert recipe.name == name
        assert (recipe.imatrix == "self") == (name in NEED_IMATRIX)
        assert parse_recipe({"type": name}) == recipe
    assert parse_recipe({"type": "q4_0", "imatrix": "self"}).name.startswith("custom-")


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
        GgufRecipe(type="q4_k_m", overrides=(("attn_v", "q8_0"), (r"blk\.[0-3]\.ffn_down", "q6_k"))),
        GgufRecipe(type="iq2_xxs", imatrix=str(imatrix)),
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
        ({"type": "q4_k_m", "bits": 4}, "unknown field 'bits'"),
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


def test_digests_of_the_torch_presets_last() -> None:
    """As above: the table is what is on disks."""
    assert {name: recipe.digest[:16] for name, recipe in TORCH_PRESETS.items()} == {
        "nf4": "8ef062a6c5a0ad15",
        "fp4": "81499799eecea5a0",
        "int8": "267c9a90696e3b4e",
        "awq-w4g128": "1e5947e555b47503",
        "gptq-w4g128": "06a94864a0673c6e",
        "gptq-w8g128": "a78b9953f228eda8",
        "w4a16": "f5be7c54acca450d",
        "w8a16": "4578ecdd5d1aa38b",
        "w8a8": "66dbe4902e5ee440",
        "best": "eb8e3b118da14c9b",
    }


def test_torch_presets_are_found_by_name_and_by_what_they_say() -> None:
    for name, recipe in TORCH_PRESETS.items():
        assert parse_recipe(name.upper()) is recipe
        assert parse_recipe(recipe.spec) == recipe
        assert recipe.name == name
    assert parse_recipe({"method": "gptq", "format": "gptq"}).name == "gptq-w4g128"
    assert parse_recipe({"method": "copy", "format": "plain"}).body["dtype"] == "bf16"


@pytest.mark.parametrize("name", TORCH_PRESETS)
def test_what_a_preset_changes_is_in_its_digest(name: str, tmp_path: Path) -> None:
    preset = TORCH_PRESETS[name]
    spec = preset.spec
    others = [{**spec, "skip": ["mlp"]}, {**spec, "overrides": [["mlp", None]]}]
    if preset.calibration:
        (tmp_path / "a.txt").write_text("text")
        corpus = {"kind": "corpus", "corpus": str(tmp_path / "a.txt")}
        others += [{**spec, "calibration": {"seed": 1}}, {**spec, "calibration": corpus}]
    digests = {parse_recipe(other, local=True).digest for other in others} | {preset.digest}
    assert len(digests) == len(others) + 1
    for other in others:
        recipe = parse_recipe(other, local=True)
        assert recipe.name == f"custom-{recipe.digest[:8]}"
        assert parse_recipe(recipe.spec, local=True) == recipe
        assert str(tmp_path) not in str(recipe.body)


def test_the_first_pattern_that_fits_decides() -> None:
    spec = {
        "method": "rtn",
        "format": "compressed-tensors",
        "overrides": [["v_proj", {"bits": 8, "group": None}], ["layers.0", None], ["v_proj|o_proj", None]],
        "skip": ["layers.1.mlp"],
    }
    recipe = parse_recipe(spec)
    assert isinstance(recipe, TorchRecipe)
    assert recipe.scheme_of("model.layers.0.self_attn.v_proj") == Scheme(bits=8, group=None)
    assert recipe.scheme_of("model.layers.0.self_attn.q_proj") == "keep"
    assert recipe.scheme_of("model.layers.1.mlp.down_proj") == "keep"
    assert recipe.scheme_of("model.layers.1.self_attn.q_proj") == Scheme(bits=4)


GPTQ = {"method": "gptq", "format": "gptq"}
PACKED = {"method": "rtn", "format": "compressed-tensors"}


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ({"method": "gptq"}, "needs a format"),
        ({"format": "gptq"}, "needs a method"),
        ({**GPTQ, "format": "zip"}, "format 'zip' is unknown"),
        ({**GPTQ, "method": "magic"}, "method 'magic' is unknown"),
        ({**GPTQ, "method": "awq"}, "format gptq takes method best, gptq or rtn, not awq"),
        ({**GPTQ, "imatrix": "x"}, "unknown field 'imatrix'"),
        (
            {**GPTQ, "scheme": {"bits": 3}},
            "stores 4 bits symmetric or 8 bits symmetric only",
        ),
        (
            {**GPTQ, "scheme": {"bits": 4, "symmetric": False}},
            "stores 4 bits symmetric or 8 bits symmetric only",
        ),
        ({**GPTQ, "scheme": {"bits": 4, "group": 100}}, "groups of 32, 64, 128, whole rows only"),
        ({**GPTQ, "scheme": {"bits": "4"}}, "bits is a number from 2 to 8"),
        ({**GPTQ, "scheme": {"bits": 4, "group": 1.5}}, "group is a number of columns"),
        ({**GPTQ, "scheme": {"bits": 4, "symmetric": 1}}, "symmetric is true or false"),
        ({**GPTQ, "scheme": {"bits": 4, "colour": 1}}, "a scheme has the fields"),
        ({**GPTQ, "overrides": [["mlp", {"bits": 8}]]}, "all modules have one scheme"),
        ({**PACKED, "overrides": [["mlp", {"bits": 3}]]}, "stores 4 bits"),
        ({**PACKED, "overrides": [["(a+)+", None]]}, "no plain regular expression"),
        ({**PACKED, "overrides": [["a"]]}, "an override is a pair"),
        ({**PACKED, "overrides": 5}, "overrides are at most 64"),
        ({**PACKED, "skip": "lm_head"}, "skip is a list"),
        ({**PACKED, "calibration": {}}, "rtn looks at no text"),
        ({**PACKED, "options": {"x": 1}}, "method rtn has no option 'x'; it has none"),
        ({**PACKED, "dtype": "bf16"}, "only plain has a dtype"),
        ({"method": "copy", "format": "plain", "dtype": "f64"}, "dtype is bf16, f16 or f32"),
        ({"method": "nf4", "format": "bnb4", "scheme": {"bits": 4}}, "one scheme only"),
        ({"method": "nf4", "format": "bnb4", "options": {"double_quant": 2}}, "from 0 to 1"),
        ({"method": "nf4", "format": "bnb4", "options": {"double_quant": "no"}}, "is a number"),
        ({**GPTQ, "calibration": {"samples": 0}}, "samples is a number from 1"),
        ({**GPTQ, "calibration": {"kind": "web"}}, 'kind "self"'),
        ({**GPTQ, "calibration": {"kind": "self", "corpus": "/etc/passwd"}}, 'kind "self"'),
        ({**GPTQ, "calibration": {"corpus": "/etc/passwd"}}, "own command line only"),
        ({**GPTQ, "calibration": {"texts": 1}}, "calibration has the fields"),
    ],
)
def test_what_is_no_torch_recipe_is_refused_in_one_line(spec: dict[str, object], what: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        parse_recipe(spec)
    assert what in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_corpus_is_a_text_file_of_this_machine(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "no.txt", "is no file"), (Path(__file__), "a .txt or a .jsonl")):
        with pytest.raises(BadRecipe, match=what):
            parse_recipe({**GPTQ, "calibration": {"corpus": str(path)}}, local=True)
