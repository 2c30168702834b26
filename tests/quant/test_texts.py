"""What text.json says of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from quant.gguf.convert import prepare
from quant.source import open_source
from quant.texts import TextFacts, read_words, text_facts, text_files, words_of
from tests.quant.checkpoints import SPECIALS, VOCABULARY, config_of, write_checkpoint, write_json


def facts(folder: Path, cache: Path) -> TextFacts:
    """The same by the converter's reading of the tokenizer and by the plain one."""
    source = open_source(str(folder), cache=cache)
    converted, plain = words_of(prepare(source)), read_words(source, VOCABULARY, 128)
    assert text_facts(source, converted) == text_facts(source, plain)
    assert text_files(source, converted) == text_files(source, plain)
    return text_facts(source, plain)


def with_generation(folder: Path, **fields: Any) -> Path:
    write_checkpoint(folder)
    write_json(folder / "generation_config.json", fields)
    return folder


def test_every_token_that_may_end_an_answer_is_named(tmp_path: Path) -> None:
    folder = with_generation(tmp_path / "m", eos_token_id=[1, 7])
    write_json(folder / "config.json", {**config_of(64, 2), "eos_token_id": 5})
    assert facts(folder, tmp_path).end_ids == (0, 1, 2, 5, 7)  # 0 and 2: the template's own ends


def test_ids_that_are_none_do_not_end_anything(tmp_path: Path) -> None:
    folder = with_generation(tmp_path / "m", eos_token_id=[-1, 10**9, "2", None, True])
    assert facts(folder, tmp_path).end_ids == (0, 2)


def test_a_word_that_looks_like_an_end_but_is_no_control_token_ends_nothing(tmp_path: Path) -> None:
    folder = with_generation(tmp_path / "m")
    data = json.loads((folder / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] = token["content"] != SPECIALS[0]
    write_json(folder / "tokenizer.json", data)
    assert facts(folder, tmp_path).end_ids == (2,)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 1, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1, "top_k": 5}, None),
        ({"temperature": "hot", "top_p": None, "top_k": 5.5, "min_p": True}, {}),
        ({"max_length": 20, "do_sample": True}, {}),
    ],
)
def test_sampling_is_what_the_authors_recommend(
    tmp_path: Path, given: dict[str, Any], kept: dict[str, Any] | None
) -> None:
    assert facts(with_generation(tmp_path / "m", **given), tmp_path).sampling == (
        given if kept is None else kept
    )


def test_a_model_without_a_template_has_no_template_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    source = open_source(str(folder), cache=tmp_path)
    assert set(text_files(source, words_of(prepare(source)))) == {
        "tokenizer.json",
        "text.json",
        "chat_template.jinja",
    }
    write_json(folder / "tokenizer_config.json", {})
    source = open_source(str(folder), cache=tmp_path)
    assert set(text_files(source, words_of(prepare(source)))) == {"tokenizer.json", "text.json"}
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    source = open_source(str(folder), cache=tmp_path)
    assert text_files(source, words_of(prepare(source)))["chat_template.jinja"] == b"{{ messages }}"
