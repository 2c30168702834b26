"""The text that methods look at: the source's own words, our prompts, or a file; the same every time."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from quant.calibrate import asked, calibration_tokens, open_tokenizer, speech_for
from quant.dialogue import LONGEST, Template, TemplateFailed
from quant.errors import BadRecipe, BuildFailed
from quant.progress import Progress, ignore
from quant.prompts import prompts
from quant.sampling import write_answers, write_text
from quant.source import Source, open_source
from quant.text_choice import Text
from quant.texts import read_words
from tests.quant.checkpoints import VOCABULARY, write_checkpoint, write_json

CPU = torch.device("cpu")
SELF = Text(kind="self", samples=5, length=96, seed=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("calibrate")
    return open_source(str(write_checkpoint(folder / "model")), cache=folder)


def tokens(source: Source, text: Text, cache: Path) -> torch.Tensor:
    return calibration_tokens(source, text, VOCABULARY, cache=cache, device=CPU, report=ignore)


def test_the_sets_of_prompts_are_disjoint() -> None:
    ours, between, theirs = prompts("calibration"), prompts("search"), prompts("evaluation")
    assert len(ours) >= 60
    assert len(theirs) >= 40
    together = [*ours, *between, *theirs]
    assert len(set(together)) == len(together)


def test_the_source_writes_the_same_text_every_time(source: Source, tmp_path: Path) -> None:
    seen: list[Progress] = []
    speech = speech_for(source, "calibration", VOCABULARY)
    first = write_text(source.path, speech, SELF, device=CPU, report=seen.append)
    assert first.shape == (5, 96)
    assert first.dtype is torch.int64
    assert torch.equal(first, tokens(source, SELF, tmp_path))
    assert [one.done for one in seen] == list(range(1, 97))
    question = {tuple(one[:8]) for one in speech.questions}
    assert all(tuple(row[:8].tolist()) in question for row in first)
    assert len({tuple(row.tolist()) for row in first}) == 5
    other = Text(kind="self", samples=5, length=96, seed=2)
    assert not torch.equal(first, tokens(source, other, tmp_path))


def test_the_cache_is_asked_first(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokens(source, SELF, tmp_path)
    monkeypatch.setattr("quant.sampling.open_model", None)
    assert torch.equal(first, tokens(source, SELF, tmp_path))
    assert len(list((tmp_path / "calibration").iterdir())) == 1


def test_answers_are_one_each(source: Source) -> None:
    speech = speech_for(source, "evaluation", VOCABULARY)
    wanted = Text(kind="self", samples=4, length=100)
    found = write_answers(source.path, speech, wanted, device=CPU, report=ignore)
    assert found
    for answer in found:
        assert list(answer.tokens[: answer.prompt]) in [list(one) for one in speech.questions]
        assert not set(answer.tokens[answer.prompt : -1]) & speech.ends
        assert answer.prompt < len(answer.tokens) <= 100


def test_prompts_alone_are_a_text_too(source: Source, tmp_path: Path) -> None:
    text = Text(kind="prompts", samples=9, length=64)
    found = tokens(source, text, tmp_path)
    assert found.shape == (9, 64)
    assert len({tuple(row.tolist()) for row in found}) == 9


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_corpus_is_cut_into_samples(source: Source, tmp_path: Path, suffix: str) -> None:
    corpus = tmp_path / f"corpus{suffix}"
    documents = [f"Line {n}: the quick brown fox jumps over the lazy dog." for n in range(60)]
    lines = documents if suffix == ".txt" else [json.dumps({"text": one}) for one in documents]
    corpus.write_text("\n".join(lines))
    text = Text(kind="corpus", samples=4, length=50, corpus=str(corpus))
    found = tokens(source, text, tmp_path)
    assert found.shape == (4, 50)
    said = open_tokenizer(source).decode(found.flatten().tolist())
    assert "quick brown fox" in said
    before = found.tolist()
    corpus.write_text("\n".join(reversed(lines)))
    assert tokens(source, text, tmp_path).tolist() != before  # the cache knows it by its content


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("short.txt", b"too short", "the calibration corpus has .* tokens; 4 x 50 need 200"),
        ("bytes.txt", b"abc\xff", "no UTF-8 text at byte 3"),
        ("odd.jsonl", b'{"text": "a"}\n{"words": 1}', 'no object with a "text" in line 2'),
        ("broken.jsonl", b"[" * 100_000, 'no object with a "text" in line 1'),
    ],
)
def test_a_corpus_that_is_none_is_refused(
    source: Source, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRecipe, match=words):
        tokens(source, Text(kind="corpus", samples=4, length=50, corpus=str(tmp_path / name)), tmp_path)
    assert not (tmp_path / "calibration").exists()


def test_a_model_that_computes_nan_is_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BuildFailed, match="NaN"):
        tokens(open_source(str(folder), cache=tmp_path), SELF, tmp_path)


def test_templates_that_fail_leave_the_question_as_it_is(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    broken = ("{{ raise_exception('no') }}", "{% if %}", "{{ messages.x.y.z }}", "{{ ''.__class__.mro() }}")
    for template in broken:
        write_json(folder / "tokenizer_config.json", {"chat_template": template})
        source = open_source(str(folder), cache=tmp_path)
        words = read_words(source, VOCABULARY, 128)
        found = asked(["Why?"], open_tokenizer(source), words)
        assert open_tokenizer(source).decode(found[0]) == "Why?\n"


def test_a_template_that_writes_without_end_is_stopped() -> None:
    template = Template("{% for i in range(99999) %}xxxxxxxx{% endfor %}", {})
    with pytest.raises(TemplateFailed, match="too much"):
        template.ask("?")
    assert len(Template("{{ messages[0]['content'] }}", {}).ask("?" * 10)) == 10
    assert LONGEST >= 1 << 16


def test_a_damaged_file_of_the_cache_is_made_anew(source: Source, tmp_path: Path) -> None:
    text = Text(kind="prompts", samples=2, length=32, seed=1)
    first = tokens(source, text, tmp_path)
    [file] = (tmp_path / "calibration").iterdir()
    file.write_bytes(b"")
    assert torch.equal(tokens(source, text, tmp_path), first)
    assert [path.name for path in (tmp_path / "calibration").iterdir()] == [file.name]
    assert list((tmp_path / "locks").iterdir()) == []


def test_builds_at_the_same_time_share_one_text(source: Source, tmp_path: Path) -> None:
    text = Text(kind="prompts", samples=2, length=32, seed=1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tokens(source, text, tmp_path), range(8)))
    assert all(torch.equal(found[0], each) for each in found)
