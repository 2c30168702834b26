"""/v1/models: what is served, from which variants, in which state."""

import msgspec
from fastapi import APIRouter, Response
from msgspec import Struct

from server.api.deps import Services, Using
from server.pool.states import ModelState

router = APIRouter(tags=["inference"])

UNMEASURED = "unmeasured"


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "quantserve"
    aliases: tuple[str, ...]
    state: str
    variant: str  # the one that answers to the bare name
    variants: tuple[str, ...]  # all that are built; each is served under its name
    label: str  # what is known of the variant's quality
    context: int | None
    template: str | None  # whose chat template it is; known while the model is loaded
    backend: str | None
    job: str | None
    error: str | None


class ModelList(Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


@router.get("/v1/models")
async def models(services: Using) -> Response:
    cards = [_card(state, services, state.model.id) for state in services.pool.states()]
    return Response(msgspec.json.encode(ModelList(data=cards)), media_type="application/json")


@router.get("/v1/models/{name:path}")
async def model(name: str, services: Using) -> Response:
    """By id, alias or variant; `id` repeats the name. The state is that of the variant named."""
    state = services.pool.state(*services.catalog.resolve(name))
    return Response(msgspec.json.encode(_card(state, services, name)), media_type="application/json")


def _card(state: ModelState, services: Services, id: str) -> ModelCard:
    served = state.served
    return ModelCard(
        id=id,
        created=services.started,
        aliases=state.model.aliases,
        state=state.state,
        variant=state.variant,
        variants=state.variants,
        label=served.label if served else UNMEASURED,
        context=state.model.context,
        template=state.template,
        backend=served.backend if served else None,
        job=state.job,
        error=state.error,
    )
