"""Names, overrides and sources, without a models.yaml."""

import json
from pathlib import Path

import pytest

from server.catalog import Catalog, CatalogError, Model, Overrides, model_from_source
from server.catalog.schema import schema_text
from server.catalog.source import base_name, read_reference
from server.errors import UnknownModel
from tests.server.cli.conftest import REPO

TINY = Model(id="tiny", source="/models/tiny", aliases=("small",), variants=("q4_k_m", "q8_0"))
GGUF = Model(id="file", source="/models/file.gguf", variants=(), default="q4_0", kv_tokens=1024)


@pytest.mark.parametrize(
    ("name", "model", "variant"),
    [
        ("tiny", TINY, None),
        ("small", TINY, None),
        ("tiny:q8_0", TINY, "q8_0"),
        ("tiny:Q8_0", TINY, "q8_0"),
        ("small:custom-0123abcd", TINY, "custom-0123abcd"),
        ("file", GGUF, None),
    ],
)
def test_resolve(name: str, model: Model, variant: str | None) -> None:
    assert Catalog((TINY, GGUF)).resolve(name) == (model, variant)


ODD = ["tiny: q8_0", "tiny:q8_0\n", "tiny:a\nb", "tiny:日", "tiny:a/b", "tiny:" + "a" * 97]


@pytest.mark.parametrize(
    "name", ["", "other", "TINY", "tiny:", ":q8_0", "tin", "tiny ", "/models/tiny", *ODD]
)
def test_unknown_names_list_the_known_ones_and_echo_nothing(name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        Catalog((TINY, GGUF)).resolve(name)
    assert str(caught.value) == "no such model; this server has: tiny, file"
    assert caught.value.param == "model"


def test_names_are_unique_over_ids_and_aliases() -> None:
    with pytest.raises(CatalogError) as caught:
        Catalog((TINY, Model(id="small", source="/other"), Model(id="x", source="/third", aliases=("tiny",))))
    assert caught.value.problems == [
        "two models are called 'small': /models/tiny and /other",
        "two models are called 'tiny': /models/tiny and /third",
    ]


def test_overrides() -> None:
    assert Overrides().apply(TINY) == TINY
    changed = Overrides(variant="q6_k", context=512, parallel=2, threads=1).apply(TINY)
    assert (changed.variants, changed.default) == (("q6_k", "q4_k_m", "q8_0"), "q6_k")
    assert (changed.context, changed.parallel, changed.threads) == (512, 2, 1)
    assert Overrides(variant="q8_0").apply(TINY).variants == TINY.variants
    assert Overrides(variant="q4_0").apply(GGUF) == GGUF


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (Overrides(variant="q8_0"), "file: a GGUF file is served as it is (q4_0), not as q8_0"),
        (Overrides(context=2048), "file: kv_tokens (1024) is less than the context (2048)"),
    ],
)
def test_overrides_that_cannot_be(overrides: Overrides, problem: str) -> None:
    with pytest.raises(CatalogError) as caught:
        overrides.apply(GGUF)
    assert caught.value.problems == [problem]


def test_a_folder_as_source(tmp_path: Path) -> None:
    (tmp_path / "My Model!").mkdir()
    (tmp_path / "My Model!" / "config.json").touch()
    model = model_from_source("My Model!", tmp_path)
    assert model == Model(id="My-Model-", source=str(tmp_path / "My Model!"), preload=True)
    assert model_from_source(".", tmp_path / "My Model!") == model


def test_a_hub_id_as_source(tmp_path: Path) -> None:
    model = model_from_source("org/name-1.5B@v2", tmp_path)
    assert (model.id, model.source, model.revision) == ("name-1.5B", "org/name-1.5B", "v2")
    (tmp_path / "org" / "name-1.5B").mkdir(parents=True)
    (tmp_path / "org" / "name-1.5B" / "config.json").touch()
    assert model_from_source("org/name-1.5B", tmp_path).source == str(tmp_path / "org" / "name-1.5B")


def test_a_gguf_file_as_source(gguf_f32: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.F32.gguf").symlink_to(gguf_f32 / "model.gguf")
    model = model_from_source("tiny.F32.gguf", tmp_path)
    assert (model.id, model.variants, model.default, model.is_ready) == ("tiny.F32", (), "f32", True)
    (tmp_path / "cut.gguf").write_bytes((gguf_f32 / "model.gguf").read_bytes()[:1000])
    with pytest.raises(CatalogError, match=r"cut\.gguf"):
        model_from_source("cut.gguf", tmp_path)


def test_a_folder_with_a_gguf_file_says_how_to_serve_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.gguf").touch()
    with pytest.raises(
        ValueError, match=r"holds no config\.json; to serve a GGUF file name it: there/model\.gguf$"
    ):
        read_reference("there/", tmp_path)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/a/b.gguf", "b"),
        ("/a/b-q8_0-00001-of-00003.gguf", "b-q8_0"),
        ("org/name", "name"),
        ("/", "model"),
        ("/a/.hidden", "hidden"),
        ("/a/" + "x" * 200, "x" * 96),
    ],
)
def test_base_name(source: str, name: str) -> None:
    assert base_name(source) == name


def test_the_schema_in_docs_is_up_to_date() -> None:
    """Otherwise: python -m server.catalog.schema > docs/models.schema.json"""
    assert (REPO / "docs" / "models.schema.json").read_text() == schema_text()


def test_the_schema_knows_every_field_of_a_model() -> None:
    keyed = json.loads(schema_text())["$defs"]["keyed"]["properties"]
    assert {"id", *keyed} == set(Model.__struct_fields__)
