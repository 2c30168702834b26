"""What cannot be computed fails its step and nothing else."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from server.backends.llama.backend import LlamaOpened
from server.engine.step import Executor, Release, StepFailed
from tests.server.backends.llama.conftest import open_model
from tests.server.backends.llama.support import TEXTS, Line, clear, params, step


def next_token(executor: Executor, tokens: list[int]) -> int | None:
    (result,) = step(executor, [Line(list(tokens)).row(15, 0)], [Release(15)])
    return result.token


def test_a_failed_step_leaves_the_slots_as_they_were(f32: LlamaOpened) -> None:
    executor = f32.executor
    prompt, other = (f32.tokenize(t, add_special=True, parse_special=False) for t in TEXTS[:2])
    expected = next_token(executor, prompt)
    line, sibling = Line(prompt[:-1]), Line(other)
    step(executor, [line.row(0, 0), sibling.row(1, 0)])
    bad = Line([*other, 10**6])  # no such token
    with pytest.raises(StepFailed, match="invalid token"):
        step(executor, [Line(prompt).row(0, len(prompt) - 1), bad.row(1, len(other)), Line(other).row(2, 0)])
    results = step(executor, [Line(prompt).row(0, len(prompt) - 1), Line(other).row(2, 0)])
    assert [result.token for result in results] == [expected, next_token(executor, other)]
    clear(executor)


def test_a_step_that_fails_in_its_second_pass_leaves_nothing_of_the_first(
    f32: LlamaOpened, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = f32.executor
    prompt = f32.tokenize(TEXTS[0], add_special=True, parse_special=False)
    expected = next_token(executor, prompt)
    monkeypatch.setattr(executor, "_context", executor._context)  # type: ignore[attr-defined]
    monkeypatch.setattr(executor._context, "outputs", 4)  # type: ignore[attr-defined]
    bad = Line([*prompt, 10**6], params(prompt_logprobs=0))
    with pytest.raises(StepFailed):
        step(executor, [bad.row(0, 0)])
    monkeypatch.undo()
    (result,) = step(executor, [Line(list(prompt)).row(0, 0)])
    assert result.token == expected
    clear(executor)


def test_memory_that_is_full_fails_the_step_until_there_is_room(gguf_f32: Path) -> None:
    opened = open_model(gguf_f32 / "model.gguf", parallel=2, kv_tokens=256, options={"kv_type": "f32"})
    executor = opened.executor
    prompt = opened.tokenize(TEXTS[0], add_special=True, parse_special=False)
    long = (prompt * 20)[:250]
    expected = step(executor, [Line(list(prompt)).row(1, 0)])[0].token
    step(executor, [Line(long).row(0, 0)], [Release(1)])
    for _ in range(3):
        with pytest.raises(StepFailed, match="room"):
            step(executor, [Line(list(prompt)).row(1, 0)])
    assert step(executor, [Line(list(prompt)).row(1, 0)], [Release(0)])[0].token == expected
    executor.close()


def test_logits_that_are_not_numbers_fail_the_step(gguf_f32: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan.gguf"
    broken.write_bytes((gguf_f32 / "model.gguf").read_bytes())
    tensor = next(t for t in gguf.GGUFReader(str(broken)).tensors if t.name == "output_norm.weight")
    with broken.open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write(np.full(tensor.n_elements, np.nan, np.float32).tobytes())
    opened = open_model(broken, parallel=2)
    for wanted in (params(logprobs=None), params(), params(temperature=1.0), params(prompt_logprobs=1)):
        with pytest.raises(StepFailed, match="finite"):
            step(opened.executor, [Line([5, 6, 7], wanted).row(0, 0)])
    assert step(opened.executor, [Line([5, 6, 7]).row(0, 0, samples=False)])[0].token is None
    opened.executor.close()


def test_closing_twice_does_no_harm(gguf_q4: Path) -> None:
    opened = open_model(gguf_q4, parallel=1)
    opened.executor.close()
    opened.executor.close()
