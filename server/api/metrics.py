"""/metrics, in Prometheus' text format."""

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from server.api.deps import Using

router = APIRouter(tags=["operations"])


@router.get("/metrics")
async def metrics(services: Using) -> Response:
    return Response(generate_latest(services.metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
