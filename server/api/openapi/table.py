"""What the routes themselves do not say: answers, examples, errors. A test compares it with the routes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from msgspec import Struct

from quant.measure.report import Report
from server.api.admin import JobList
from server.api.health import Alive, Readiness, Version
from server.api.models import ModelCard, ModelList
from server.api.schema.answers import ChatCompletion, Completion
from server.api.schema.embeddings import EmbeddingList
from server.api.schema.message_answers import AssistantTurn, TokenCount
from server.api.schema.response_answers import Deleted, ModelResponse
from server.api.status import Reloaded, StatusReport
from server.api.tokens import AppliedTemplate, Detokenized, Tokenized
from server.api.variants import Promotion
from server.pool.records import Job

Answer = type[Struct] | str  # a JSON shape, or another media type

EVERYWHERE = (400, 401, 404, 405, 431, 500)
WITH_BODY = (408, 413, 415, 429)
OF_MODELS = (503,)
OF_BUILDS = (403, 409, 503, 507)

HELLO = [{"role": "user", "content": "What is the capital of France?"}]


class Operation(Struct, frozen=True, kw_only=True):
    summary: str
    answer: Answer
    status: int = 200
    also: Mapping[int, Answer | None] = {}  # answers with another status that are no errors; None: empty
    streams: bool = False
    errors: tuple[int, ...] = ()
    example: dict[str, Any] | None = None
    reads: Mapping[str, str] = {}  # headers of the request, with what they say


OPERATIONS: Mapping[tuple[str, str], Operation] = MappingProxyType(
    {
        ("POST", "/v1/chat/completions"): Operation(
            summary="The next message of a conversation",
            answer=ChatCompletion,
            streams=True,
            errors=OF_MODELS,
            example={"model": "tiny-chat", "messages": HELLO, "max_tokens": 32},
        ),
        ("POST", "/v1/completions"): Operation(
            summary="What follows a text",
            answer=Completion,
            streams=True,
            errors=OF_MODELS,
            example={"model": "tiny-chat", "prompt": "Once upon a time", "max_tokens": 16},
        ),
        ("POST", "/v1/embeddings"): Operation(
            summary="Texts as vectors",
            answer=EmbeddingList,
            errors=OF_MODELS,
            example={"model": "tiny-chat", "input": "Paris is in France"},
        ),
        ("POST", "/v1/responses"): Operation(
            summary="What a model answers to items of input",
            answer=ModelResponse,
            streams=True,
            errors=OF_MODELS,
            example={
                "model": "tiny-chat",
                "input": "What is the capital of France?",
                "max_output_tokens": 32,
            },
        ),
        ("GET", "/v1/responses/{id}"): Operation(summary="A stored response", answer=ModelResponse),
        ("DELETE", "/v1/responses/{id}"): Operation(summary="Forget a stored response", answer=Deleted),
        ("POST", "/v1/responses/{id}/cancel"): Operation(
            summary="Refused: no response runs in the background", answer=ModelResponse
        ),
        ("POST", "/v1/messages"): Operation(
            summary="The next message of a conversation, as Anthropic's clients ask for it",
            answer=AssistantTurn,
            streams=True,
            errors=OF_MODELS,
            example={"model": "tiny-chat", "messages": HELLO, "max_tokens": 32},
        ),
        ("POST", "/v1/messages/count_tokens"): Operation(
            summary="How many tokens a conversation is",
            answer=TokenCount,
            errors=OF_MODELS,
            example={"model": "tiny-chat", "messages": HELLO},
        ),
        ("GET", "/v1/models"): Operation(summary="All models", answer=ModelList),
        ("GET", "/v1/models/{name}"): Operation(summary="One model, alias or variant", answer=ModelCard),
        ("POST", "/tokenize"): Operation(
            summary="A text as a model's tokens",
            answer=Tokenized,
            errors=OF_MODELS,
            example={"model": "tiny-chat", "content": "Hello"},
        ),
        ("POST", "/detokenize"): Operation(
            summary="Tokens as text",
            answer=Detokenized,
            errors=OF_MODELS,
            example={"model": "tiny-chat", "tokens": [1, 2]},
        ),
        ("POST", "/apply-template"): Operation(
            summary="What a model is told by a chat request",
            answer=AppliedTemplate,
            errors=OF_MODELS,
            example={"model": "tiny-chat", "messages": HELLO},
        ),
        ("GET", "/admin/report/{variant}"): Operation(
            summary="What is known of a variant; a page where Accept names text/html",
            answer=Report,
            errors=(403,),
        ),
        ("POST", "/admin/variants/{variant}/promote"): Operation(
            summary="Let a variant answer to its model's bare name", answer=Promotion, errors=OF_BUILDS
        ),
        ("POST", "/admin/variants/{variant}/rollback"): Operation(
            summary="Let the variant answer again that did before", answer=Promotion, errors=OF_BUILDS
        ),
        ("POST", "/quantize"): Operation(
            summary="Build a variant",
            answer=Job,
            status=202,
            errors=OF_BUILDS,
            example={"model": "tiny-chat", "recipe": "q6_k"},
        ),
        ("GET", "/quantize"): Operation(summary="All jobs", answer=JobList, errors=(403,)),
        ("GET", "/quantize/{job}"): Operation(summary="One job", answer=Job, errors=(403,)),
        ("GET", "/quantize/{job}/events"): Operation(
            summary="What happens to a job, from its beginning or from Last-Event-ID on",
            answer="text/event-stream",
            also={204: None},
            reads={"Last-Event-ID": "the id of the last event that the client has; the next ones come"},
            errors=(403,),
        ),
        ("GET", "/quantize/{job}/log"): Operation(
            summary="What a job's process wrote last", answer="text/plain", errors=(403,)
        ),
        ("DELETE", "/quantize/{job}"): Operation(
            summary="Stop a job, or forget a finished one", answer=Job, errors=(403, 409, 507)
        ),
        ("GET", "/admin/status"): Operation(
            summary="Models, engines, memory and jobs", answer=StatusReport, errors=(403,)
        ),
        ("POST", "/admin/reload"): Operation(
            summary="Read models.yaml again", answer=Reloaded, errors=(403, 409)
        ),
        ("POST", "/admin/pull"): Operation(
            summary="Fetch a model's source from the hub",
            answer=Job,
            status=202,
            errors=OF_BUILDS,
            example={"model": "tiny-chat"},
        ),
        ("GET", "/health"): Operation(summary="Whether the process lives", answer=Alive),
        ("GET", "/ready"): Operation(
            summary="Whether every preloaded model can answer", answer=Readiness, also={503: Readiness}
        ),
        ("GET", "/version"): Operation(summary="The server's version", answer=Version),
        ("GET", "/metrics"): Operation(summary="Gauges and counters for Prometheus", answer="text/plain"),
        ("GET", "/openapi.json"): Operation(summary="This description", answer="application/json"),
        ("GET", "/docs"): Operation(summary="This description as a page", answer="text/html"),
    }
)
