"""GET /openapi.json and /docs. They ask for a key like every other route."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.deps import services_of
from server.api.openapi.document import document
from server.api.openapi.page import page

router = APIRouter(tags=["operations"])

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    return Response(msgspec.json.encode(_document(request)), media_type="application/json")


@router.get("/docs")
async def docs(request: Request) -> Response:
    return Response(
        page(_document(request)), media_type="text/html", headers={"Content-Security-Policy": POLICY}
    )


def _document(request: Request) -> dict[str, Any]:
    services = services_of(request)
    keys = services.keys
    model = next((model.id for model in services.catalog.models), "tiny-chat")
    return document(request.app, keys=bool(keys.user or keys.admin), model=model)
