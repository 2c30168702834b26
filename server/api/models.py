"""/v1/models: what is served, from which variants, in which state."""

import msgspec
from fastapi import APIRouter, Response
from msgspec import Struct
from msgspec.structs import replace

from quant.measure.measurement import Measurement
from server.api.deps import Services, Using
from server.pool.choosing import MODES
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
    verdicts: dict[str, str]  # of each variant that was judged: its standing at the gate, and why
    choices: dict[str, dict[str, str]]  # for auto, best, fastest, smallest: why each variant is chosen or not
    measurement: Measurement | None = None  # of `variant`; only where one model is asked for


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
    card = replace(_card(state, services, name), measurement=_measurement(services, state.variant))
    return Response(msgspec.json.encode(card), media_type="application/json")


def _measurement(services: Services, id: str) -> Measurement | None:
    known = services.pool.gatekeeper.known(id)
    return known.measurement if known else None


def _card(state: ModelState, services: Services, id: str) -> ModelCard:
    served, known = state.served, services.pool.gatekeeper.known(state.variant)
    return ModelCard(
        id=id,
        created=services.started,
        aliases=state.model.aliases,
        state=state.state,
        variant=state.variant,
        variants=state.variants,
        label=known.verdict.state if known else UNMEASURED,
        context=state.model.context,
        template=state.template,
        backend=served.backend if served else None,
        job=state.job,
        error=state.error,
        verdicts={
            f"{state.model.id}:{one.name}": str(one.verdict)
            for one in services.pool.gatekeeper.of_model(state.model)
        },
        choices={mode: services.pool.choice(state.model, mode).reasons for mode in MODES},
    )
