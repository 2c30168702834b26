"""The whole application over a real pool, with the toy backend in an engine process of its own."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from quant.store import VariantStore
from server.api.app import create_app
from server.catalog import Catalog, Model
from server.pool.jobs import Jobs
from server.pool.pool import Pool
from server.settings import Settings
from tests.server.pool.support import children, toy, write_gguf

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@contextlib.asynccontextmanager
async def application(folder: Path, *models: Model, **settings: Any) -> AsyncIterator[FastAPI]:
    """Started, and closed at the end without leaving a process. By default one toy of 256 tokens."""
    models = models or (toy(write_gguf(folder / "toy.gguf"), context=256, parallel=4),)
    every = Settings(cache=folder / "cache", **{"measure_budget_s": 0.0, **settings})
    store = VariantStore(every.cache)
    jobs = Jobs(every, store)
    catalog = Catalog(models)
    before = children()
    app = create_app(every, Pool(every, catalog, store, jobs), jobs, store)
    async with app.router.lifespan_context(app):
        yield app
    assert children() == before


def client(app: FastAPI, peer: str = "127.0.0.1", **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(peer, 5000))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers, timeout=30)


@contextlib.asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with application(folder, **settings) as app, client(app) as http:
        yield http


def chat(**fields: object) -> dict[str, object]:
    return {"model": "toy", "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}


def completion(**fields: object) -> dict[str, object]:
    return {"model": "toy", "prompt": "Once upon", "max_tokens": 8, "temperature": 0, **fields}


def events(text: str) -> list[Any]:
    """The JSON of each event of a stream that ends as it should."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def error_of(response: httpx.Response) -> Any:
    """The error of an answer in the one shape."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error
