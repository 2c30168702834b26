"""What the documentation shows must be what the server takes."""

import json
import re
from pathlib import Path

import pytest

from quant.recipe import TORCH_PRESETS, parse_recipe
from quant.torch_recipe import RULES
from server.api.schema.admin import QuantizeRequest
from server.api.schema.base import Body
from server.api.schema.chat import ChatRequest
from server.api.schema.completions import CompletionRequest
from server.api.schema.messages import MessagesRequest
from server.api.schema.responses import ResponsesRequest
from server.api.schema.tokens import DetokenizeRequest, TokenizeRequest

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "benchmarks", "models")
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in sorted((ROOT / name).rglob("*.md")))]
REQUESTS: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/apply-template": ChatRequest,
    "/quantize": QuantizeRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
CURL = re.compile(
    r"^curl .*?localhost:8000(?P<path>/[\w/-]+)(?P<rest>(?:\\\n|[^'\n]|'[^']*')*)", re.MULTILINE
)
BODY = re.compile(r"-d\s+'(?P<body>[^']*)'")
LINK = re.compile(r"\]\(([^)\s#]+)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def posts() -> list[tuple[str, str]]:
    """Path and body of every curl with a body."""
    return [
        (curl["path"], body["body"])
        for page in PAGES
        for curl in CURL.finditer(page.read_text())
        if (body := BODY.search(curl["rest"]))
    ]


def test_the_pages_show_a_request_for_each_route() -> None:
    assert {path for path, _ in posts()} == set(REQUESTS)


@pytest.mark.parametrize(("path", "body"), posts())
def test_a_curl_sends_what_the_route_takes(path: str, body: str) -> None:
    request = REQUESTS[path].model_validate(json.loads(body))
    request.refuse_unsupported()
    assert request.ignored() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(CODE.sub("", page.read_text())) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_recipe_that_the_page_shows_is_one_and_every_name_is_there() -> None:
    page = (ROOT / "docs" / "quantize.md").read_text()
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    recipe = parse_recipe(json.loads(shown))
    assert parse_recipe(recipe.spec) == recipe
    assert all(f"`{name}`" in page for name in TORCH_PRESETS)
    assert all(f"| {name} |" in page for name in RULES)
