"""/v1/embeddings over a real pool: the toy's vectors, and what is refused."""

import base64
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.api.support import application, client, error_of, serving
from tests.server.pool.support import toy, write_gguf

EMBEDDINGS = "/v1/embeddings"


def ask(**fields: object) -> dict[str, object]:
    return {"model": "toy", "input": "Once upon", **fields}


async def _vector(http: httpx.AsyncClient, **fields: object) -> Any:
    return (await http.post(EMBEDDINGS, json=ask(**fields))).json()["data"][0]["embedding"]


async def test_one_text_or_many_texts_or_token_ids(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        one = (await http.post(EMBEDDINGS, json=ask())).json()
        many = (await http.post(EMBEDDINGS, json=ask(input=["Once upon", "b"]))).json()
        tokens = (await http.post("/tokenize", json={"model": "toy", "content": "Once upon"})).json()
        ids = (await http.post(EMBEDDINGS, json=ask(input=tokens["tokens"]))).json()
    assert one["object"] == "list"
    assert one["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert [item["index"] for item in many["data"]] == [0, 1]
    assert many["data"][0]["embedding"] == one["data"][0]["embedding"] == ids["data"][0]["embedding"]
    assert many["data"][1]["embedding"] != one["data"][0]["embedding"]


async def test_base64_holds_the_same_numbers_and_fewer_dimensions_keep_length_one(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        floats = await _vector(http)
        text = await _vector(http, encoding_format="base64")
        short = await _vector(http, dimensions=2)
    assert list(struct.unpack("<4f", base64.b64decode(text))) == floats
    assert len(short) == 2
    assert sum(value * value for value in short) == pytest.approx(1)
    assert short[0] / short[1] == pytest.approx(floats[0] / floats[1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [[5000]]}, "input"),
        ({"input": "x" * 300}, "input"),
        ({"input": ["ok", "x" * 300]}, "input"),
        ({"dimensions": 5}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], param: str
) -> None:
    async with serving(tmp_path) as http:
        response = await http.post(EMBEDDINGS, json=ask(**fields))
        assert response.status_code == 400
        assert error_of(response)["param"] == param
        assert (await http.post(EMBEDDINGS, json=ask())).status_code == 200


async def test_a_backend_without_embeddings_says_so(tmp_path: Path) -> None:
    model = toy(write_gguf(tmp_path / "toy.gguf"), context=256, parallel=4, backend="toy-pages")
    async with application(tmp_path, model) as app, client(app) as http:
        response = await http.post(EMBEDDINGS, json=ask())
    assert response.status_code == 400
    assert error_of(response)["code"] == "unsupported_parameter"
