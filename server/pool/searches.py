"""What a search is told: a model as it would be served, and its target."""

from quant.search.target import Target
from server.catalog import Model
from server.errors import RequestError
from server.process.orders import SearchOrder
from server.settings import Settings

BACKEND = "llama"  # mixtures are GGUF files
PLAINEST = "q8_0"  # a source that cannot become this cannot become any mixture


def search_order(settings: Settings, model: Model, target: Target) -> SearchOrder:
    """Raises RequestError for a model that something else than llama.cpp serves."""
    if model.backend not in {"auto", BACKEND}:
        raise RequestError(
            f"target: mixtures are GGUF files, which {model.backend} does not open", param="target"
        )
    return SearchOrder(
        cache=str(settings.cache),
        source=model.source,
        revision=model.revision,
        target=target,
        backend=BACKEND,
        context=model.context,
        default_context=settings.default_context,
        parallel=model.parallel,
        threads=model.threads,
        cache_max_bytes=settings.cache_max_bytes,
    )
