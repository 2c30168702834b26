"""models.yaml: what is accepted, and that every mistake is one line that names its place."""

from pathlib import Path

import pytest

from server.catalog import Catalog, CatalogError, Model, load_catalog
from server.catalog.model import NAME_RULE

BACKENDS = ("llama", "toy-rows")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that looks like a checkpoint, called "tiny", beside the models.yaml of the test."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def read(tmp_path: Path, text: str) -> Catalog:
    file = tmp_path / "models.yaml"
    file.write_text(text)
    return load_catalog(file, backends=BACKENDS)


def problems(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(CatalogError) as caught:
        load_catalog(tmp_path / "models.yaml", backends=BACKENDS, label="models.yaml")
    return caught.value.problems


def test_a_source_that_is_served_as_it_is_has_no_variants(tmp_path: Path, gguf_q4: Path) -> None:
    (tmp_path / "m.gguf").symlink_to(gguf_q4 / "model.gguf")
    told = "leave it out: a GGUF file is served as it is (q4_k_m)"
    assert problems(tmp_path, "models: {tiny: {source: m.gguf, variants: [q4_k_m, q6_k]}}") == [
        f"models.yaml:1: variants: {told}"
    ]
    assert problems(tmp_path, "models: {tiny: {source: m.gguf, default: q6_k}}") == [
        f"models.yaml:1: default: {told}"
    ]


def test_every_field_is_read(tmp_path: Path, checkpoint: Path) -> None:
    catalog = read(
        tmp_path,
        """
models:
  - id: tiny
    source: ./tiny
    aliases: [small, gpt-4o]
    variants: [q4_k_m, Q8_0]
    default: q8_0
    context: 2048
    parallel: 4
    keep_alive: 10m
    preload: true
    backend: llama
    threads: 2
    kv_tokens: 4096
""",
    )
    assert catalog.models == (
        Model(
            id="tiny",
            source=str(checkpoint),
            aliases=("small", "gpt-4o"),
            variants=("q4_k_m", "q8_0"),
            default="q8_0",
            context=2048,
            parallel=4,
            keep_alive=600.0,
            preload=True,
            backend="llama",
            threads=2,
            kv_tokens=4096,
        ),
    )


def test_only_a_source_is_needed(tmp_path: Path, checkpoint: Path) -> None:
    listed = read(tmp_path, "models:\n- {id: tiny, source: tiny, context: , variants: null}\n")
    keyed = read(tmp_path, "models: {tiny: {source: tiny}}")
    assert listed == keyed
    assert keyed.models == (Model(id="tiny", source=str(checkpoint)),)


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize(
    ("written", "variants", "default"),
    [
        ("", ("q4_k_m",), "q4_k_m"),
        ("variants: [q6_k, q8_0]", ("q6_k", "q8_0"), "q6_k"),
        ("default: f16", ("f16",), "f16"),
        ("variants: [q6_k, q8_0], default: q8_0", ("q6_k", "q8_0"), "q8_0"),
        ("variants: [AWQ-w4g128, nf4], default: nf4", ("awq-w4g128", "nf4"), "nf4"),
    ],
)
def test_variants_and_default_complete_each_other(
    tmp_path: Path, written: str, variants: tuple[str, ...], default: str
) -> None:
    (model,) = read(tmp_path, f"models: {{tiny: {{source: tiny, {written}}}}}").models
    assert (model.variants, model.default) == (variants, default)


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("never", None),
        ("0", 0.0),
        ("90", 90.0),
        ("1.5", 1.5),
        ("90s", 90.0),
        ("10m", 600.0),
        ("2h", 7200.0),
        ("1d", 86400.0),
    ],
)
def test_keep_alive(tmp_path: Path, written: str, seconds: float | None) -> None:
    (model,) = read(tmp_path, f"models: {{tiny: {{source: tiny, keep_alive: {written}}}}}").models
    assert model.keep_alive == seconds


def test_hub_ids(tmp_path: Path) -> None:
    catalog = read(
        tmp_path,
        "models: {a: {source: org/name}, b: {source: org/name@v1.0}, c: {source: a/b, revision: 123456}}",
    )
    assert [(model.source, model.revision) for model in catalog.models] == [
        ("org/name", None),
        ("org/name", "v1.0"),
        ("a/b", "123456"),
    ]


@pytest.mark.usefixtures("checkpoint")
def test_anchors_and_merges(tmp_path: Path) -> None:
    catalog = read(
        tmp_path,
        """
x-defaults: &defaults
  parallel: 3
  context: 1024
models:
  first: &first {source: tiny, <<: *defaults, context: 512}
  second: {<<: [{preload: true}, *defaults], source: tiny}
  third: {<<: *first}
""",
    )
    assert [(m.parallel, m.context, m.preload) for m in catalog.models] == [
        (3, 512, False),
        (3, 1024, True),
        (3, 512, False),
    ]


@pytest.mark.usefixtures("checkpoint")
def test_all_mistakes_at_once_each_with_its_line(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """\
defaults: {}
models:
  - id: tiny
    sorce: ./tiny
    context: lots
    context: 9
    parallel: 0
    default: q4_k_n
    aliases: [a:b, c, c, second]
  - id: second
    source: ./gone
    variants: [q4_k_m, q8_0]
    default: q6_k
    context: 100
    kv_tokens: 50
    preload: 1
    keep_alive: soon
    backend: lama
    threads: 1.5
  - id: a/b
    source: https://x.org/y
  - source: tiny
  - 7
""",
    )
    found[5] = found[5].partition(";")[0]  # the near names are quant.recipe's
    assert found == [
        "models.yaml:1: unknown key 'defaults'; known: models",
        "models.yaml:4: unknown key 'sorce'; did you mean source?",
        "models.yaml:5: context: must be a whole number from 16 to 16777216, not the text 'lots'",
        "models.yaml:6: 'context' is given twice (first on line 5)",
        "models.yaml:7: parallel: must be a whole number from 1 to 256, not 0",
        "models.yaml:8: default: unknown recipe 'q4_k_n'",
        f"models.yaml:9: aliases: 'a:b': {NAME_RULE}",
        "models.yaml:9: aliases: 'c' is listed twice",
        "models.yaml:10: the name 'second' is taken (line 9)",
        "models.yaml:11: source: './gone': no such folder or GGUF file",
        "models.yaml:13: default: q6_k is not among variants (q4_k_m, q8_0)",
        "models.yaml:15: kv_tokens: 50 is less than the context (100)",
        "models.yaml:16: preload: must be true or false, not a number",
        "models.yaml:17: keep_alive: must be seconds, a time such as 90s, 10m or 2h (366d at most), or never",
        "models.yaml:18: backend: unknown backend 'lama'; did you mean llama?",
        "models.yaml:19: threads: must be a whole number from 1 to 1024, not 1.5",
        f"models.yaml:20: id: 'a/b': {NAME_RULE}",
        "models.yaml:21: source: 'https://x.org/y' is a URL: name a folder, a GGUF file or hub id (org/name)",
        "models.yaml:22: a model without id",
        "models.yaml:23: a model must be a mapping with id and source, not a number",
    ]


CHECKED_ALONE = [
    ("models: {tiny: {source: 7}}", "source: must be a text, not a number (put it in quotes)"),
    ("models: {tiny: {source: [tiny]}}", "source: must be a text, not a list"),
    ("models: {tiny: {source: ''}}", "source: must be a text of visible characters"),
    ('models: {tiny: {source: "ti\\nny"}}', "source: must be a text of visible characters"),
    ("models: {tiny: {source: models.yaml}}", "'models.yaml' is a file but not a .gguf file"),
    ("models: {tiny: {source: .}}", "'.' holds no config.json"),
    ("models: {tiny: {source: ../org/name}}", "'../org/name': no such folder or GGUF file"),
    ("models: {tiny: {source: org/name.gguf}}", "'org/name.gguf': no such folder or GGUF file"),
    ("models: {tiny: {source: tiny, revision: main}}", "revision: only a hub id has one"),
    ("models: {tiny: {source: a/b@c, revision: main}}", "revision: the source names one already"),
    ("models: {tiny: {source: a/b, revision: [1]}}", "revision: must be a branch, tag or commit"),
    ("models: {tiny: {source: tiny, variants: []}}", "variants: an empty list"),
    ("models: {tiny: {source: tiny, variants: q4_k_m}}", "variants: must be a list, not a text"),
    ("models: {tiny: {source: tiny, variants: [q4_k_m, q4_k_m]}}", "variants: 'q4_k_m' is listed twice"),
    (
        "models: {tiny: {source: tiny, default: ../q4_k_m}}",
        "default: a recipe is a name such as q4_k_m, never a path",
    ),
    (
        "models: {tiny: {source: tiny, parallel: 1000}}",
        "parallel: must be a whole number from 1 to 256, not 1000",
    ),
    ("models: {tiny: {source: tiny, parallel: -1}}", "not -1"),
    ("models: {tiny: {source: tiny, parallel: .inf}}", "not .inf"),
    ("models: {tiny: {source: tiny, parallel: 1:30}}", "not 1:30"),
    ("models: {tiny: {source: tiny, parallel: true}}", "not yes or no"),
    ("models: {tiny: {source: tiny, keep_alive: -1}}", "keep_alive: must be seconds"),
    ("models: {tiny: {source: tiny, keep_alive: .nan}}", "keep_alive: must be seconds"),
    ("models: {tiny: {source: tiny, keep_alive: 9999d}}", "keep_alive: must be seconds"),
    ("models: {tiny: {source: tiny, id: tiny}}", "leave out id: the model's id is its key, 'tiny'"),
    ("models: {tiny: {source: tiny, [1]: 2}}", "a key must be a plain word"),
    ("models: {tiny: {source: tiny, <<: 3}}", "<<: takes a mapping or a list of mappings"),
    ("models: {tiny: &tiny {source: tiny, <<: *tiny}}", "a mapping that merges itself"),
    ("models: {tiny: {source: !!python/name:os.system tiny}}", "source: must be a text, not a tag:yaml.org"),
    ("models: {'': {source: tiny}}", "id: '': a name is"),
    ("models: {tiny: tiny}", "'tiny' must be a mapping with source, not a text"),
    ("models: {tiny: {}}", "tiny has no source"),
    ("models: {tiny: {source: }}", "tiny has no source"),
    ("models: []", "models is empty"),
    ("models: {}", "models is empty"),
    ("models:", "models is empty"),
    ("models: 3", "models must be a list or a mapping, not a number"),
    ("modles: []", "unknown key 'modles'; did you mean models?"),
    ("{}", "the key models is missing"),
    ("- models", "must be a mapping with the key models, not a list"),
    ("just words", "must be a mapping with the key models, not a text"),
    ("", "the file is empty"),
    ("# nothing", "the file is empty"),
    ("models: [", "YAML syntax: while parsing a flow node"),
    ("models: {tiny: {source: *gone}}", "YAML syntax: found undefined alias"),
    ("models: 1\n---\nmodels: 2", "YAML syntax: expected a single document"),
    ("models: \x07", "YAML syntax: a character that YAML does not allow"),
]


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize(("text", "expected"), CHECKED_ALONE)
def test_one_mistake_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1, found
    assert found[0].startswith("models.yaml:")
    assert expected in found[0]


def test_syntax_errors_name_their_line(tmp_path: Path) -> None:
    assert problems(tmp_path, "models:\n  a: {source: x\n  b: 3\n")[0].startswith(
        "models.yaml:3: YAML syntax"
    )
    (tmp_path / "models.yaml").write_bytes(b"models:\n  a: \xff\n")
    with pytest.raises(CatalogError, match=r"models\.yaml:2: not UTF-8"):
        load_catalog(tmp_path / "models.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="cannot be read: no such file"):
        load_catalog(tmp_path / "gone.yaml")
    with pytest.raises(CatalogError, match="cannot be read: is a directory"):
        load_catalog(tmp_path)
    (tmp_path / "big.yaml").write_text("# " + "x" * 300_000)
    with pytest.raises(CatalogError, match="larger than 256 KiB"):
        load_catalog(tmp_path / "big.yaml")


def test_hostile_nesting_is_cheap(tmp_path: Path) -> None:
    laughs = [f"x-{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert problems(tmp_path, "\n".join(["x-0: &a0 [lol]", *laughs, "models: *a29"])) == [
        "models.yaml:29: a model must be a mapping with id and source, not a list"
    ]
    merges = "x-0: &a0 {parallel: 3}\n"
    merges += "".join(f"x-{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 31))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    (model,) = read(tmp_path, merges + "models: {tiny: {<<: *a30, source: tiny}}").models
    assert model.parallel == 3
    assert problems(tmp_path, "models: " + "[" * 5000) == ["models.yaml:1: nested deeper than 32 levels"]
    many = "models:\n" + " - *a\n" * 2000
    assert problems(tmp_path, "x-a: &a {id: a, source: b/c}\n" + many) == [
        "models.yaml:2: more than 1000 models"
    ]


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize(
    ("variants", "default", "lines"),
    [
        ("[q4_k_m, q4_k_n]", "q4_k_n", [2, 3]),  # wrong in both places
        ("[q4_k_m, q8_o]", "q8_0", [2]),  # the misspelt one may be meant
        ("[q4_k_m, nonsense]", "q8_0", [2, 3]),
        ("nonsense", "q8_0", [2]),
    ],
)
def test_default_and_wrong_variants(tmp_path: Path, variants: str, default: str, lines: list[int]) -> None:
    found = problems(
        tmp_path, f"models: {{tiny: {{source: tiny,\n variants: {variants},\n default: {default}}}}}"
    )
    assert [int(line.split(":")[1]) for line in found] == lines, found


@pytest.mark.usefixtures("checkpoint")
def test_a_repeated_model_is_checked_too(tmp_path: Path) -> None:
    assert problems(tmp_path, "models:\n  tiny: {source: tiny}\n  tiny: {source: tiny, parallel: 0}\n") == [
        "models.yaml:3: 'tiny' is given twice (first on line 2)",
        "models.yaml:3: parallel: must be a whole number from 1 to 256, not 0",
    ]


@pytest.mark.usefixtures("checkpoint")
def test_a_shared_mistake_is_one_line(tmp_path: Path) -> None:
    text = "x-a: &a {parallel: 0}\nmodels: {a: {source: tiny, <<: *a}, b: {source: tiny, <<: *a}}"
    assert problems(tmp_path, text) == [
        "models.yaml:1: parallel: must be a whole number from 1 to 256, not 0"
    ]


def test_sources_are_relative_to_the_file(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models.yaml").write_text("models: {tiny: {source: tiny}}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_catalog(Path("../models.yaml")).models[0].source == str(checkpoint)
