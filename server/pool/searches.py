"""What a search is told: a model as it would be served, and its target."""

from quant.search.target import Target
from server.catalog import Model
from server.errors import RequestError
from server.process.orders import SearchOrder
from server.settings import Settings

BACKENDS = {"gguf": "llama", "compressed-tensors": "compressed"}
PLAINEST = {"gguf": "q8_0", "compressed-tensors": "w8a16"}  # what cannot become this becomes no mixture


def search_order(settings: Settings, model: Model, target: Target) -> SearchOrder:
    """Raises RequestError for a model whose backend opens no such mixtures."""
    if model.backend not in {"auto", BACKENDS[target.format]}:
        raise RequestError(
            f"target: mixtures are {target.format} files, which {model.backend} does not open", param="target"
        )
    return SearchOrder(
        cache=str(settings.cache),
        source=model.source,
        revision=model.revision,
        target=target,
        gate=model.gate.every,
        context=model.context,
        default_context=settings.default_context,
        parallel=model.parallel,
        threads=model.threads,
        cache_max_bytes=settings.cache_max_bytes,
    )
