"""A text that no context can hold is refused by its length, before it is tokenized."""

from pathlib import Path

import pytest

from server.text.model import TextModel
from tests.server.api.support import COMPLETIONS, completion, error_of, serving


async def test_megabytes_are_refused_without_tokenizing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object, **__: object) -> list[int]:
        raise AssertionError("it was tokenized")

    async with serving(tmp_path) as http:
        assert (await http.post(COMPLETIONS, json=completion(prompt="ab"))).status_code == 200
        monkeypatch.setattr(TextModel, "encode", never)
        response = await http.post(COMPLETIONS, json=completion(prompt="ab " * 100_000))
        assert response.status_code == 400
        error = error_of(response)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert "the context is 256 tokens" in error["message"]
