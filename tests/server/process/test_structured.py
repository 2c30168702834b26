"""What counts as valid JSON and as a valid call, in the bundled model's own words."""

from pathlib import Path

import pytest

from server.process.structured import TASKS, Task, is_valid, prompt_of, rates
from server.text.model import TextModel


@pytest.fixture(scope="module")
def text(gguf_q4: Path) -> TextModel:
    return TextModel.from_folder(gguf_q4)


OBJECT = Task("", {"name": "string", "age": "number"})
CALL = Task("", {"city": "string"}, "get_weather")


@pytest.mark.parametrize(
    ("task", "answer", "valid"),
    [
        (OBJECT, '{"name": "Lena", "age": 34}', True),
        (OBJECT, '```json\n{"name": "Lena", "age": 34.5, "more": []}\n```', True),
        (OBJECT, 'Here it is: {"name": "Lena", "age": 34}', False),
        (OBJECT, '{"name": "Lena", "age": "34"}', False),
        (OBJECT, '{"name": "Lena", "age": true}', False),
        (OBJECT, '{"name": "Lena"', False),
        (OBJECT, "[" * 100_000, False),
        (CALL, '{"name": "get_weather", "arguments": {"city": "Oslo"}}', True),
        (CALL, '{"name": "get_weather", "arguments": {"town": "Oslo"}}', False),
        (CALL, '{"name": "rain", "arguments": {"city": "Oslo"}}', False),
        (CALL, "It rains in Oslo.", False),
    ],
)
def test_form_counts(text: TextModel, task: Task, answer: str, valid: bool) -> None:
    assert is_valid(task, answer, text) is valid


async def test_prompts_tell_of_the_function_and_rates_are_shares(text: TextModel) -> None:
    task = next(task for task in TASKS if task.call)
    words = b"".join(text.pieces[token] for token in await prompt_of(task, text)).decode()
    assert task.call is not None
    assert task.call in words
    assert task.prompt in words
    kinds = [task.call is not None for task in TASKS]
    assert rates([not kind for kind in kinds]) == (1.0, 0.0)
    assert rates(kinds) == (0.0, 1.0)
    assert kinds.count(True) == kinds.count(False) == 8
