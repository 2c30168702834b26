"""Embeddings of texts: the mean of the last hidden states, with KV memory made for the first text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from server.backends.torch_.attention import Chunk, Layout, Paged
from server.backends.torch_.kv import PAGE, KVCache, KVShape
from server.engine.step import StepFailed

CHUNK = 256  # tokens in a pass; a whole number of pages


class TorchEmbedder:
    """server.backends.base.Embedder over a model that an executor owns."""

    def __init__(self, model: Any, shape: KVShape, context: int) -> None:
        self._model: Any = model
        self._shape = shape
        self._pages = -(-context // PAGE)
        self._cache: KVCache | None = None
        self._weight: Tensor = model.get_input_embeddings().weight  # whose device and dtype all the rest has
        self.width: int = self._weight.shape[1]

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> bytes:
        try:
            parts = [self._hidden(tokens, start) for start in range(0, len(tokens), CHUNK)]
        except (MemoryError, torch.OutOfMemoryError):
            raise StepFailed("out of memory") from None
        vector = torch.cat(parts).mean(0).double()
        length = float(vector.norm())
        if not 0.0 < length < float("inf"):
            raise StepFailed("the model's hidden states are no numbers")
        data: bytes = (vector / length).cpu().numpy().astype("<f4").tobytes()
        return data

    def close(self) -> None:
        self._model = self._cache = None

    def _hidden(self, tokens: Sequence[int], start: int) -> Tensor:
        """The last hidden states, float32 [tokens, width]; positions before `start` are in the cache."""
        device = self._weight.device
        cache = self._cache = self._cache or KVCache(self._shape, self._pages, self._weight.dtype, device)
        ids = torch.tensor(tokens[start : start + CHUNK], dtype=torch.int64, device=device)
        positions = torch.arange(start, start + len(ids), device=device)
        none = ids.new_empty(0)
        pages = torch.arange(-(-(start + len(ids)) // PAGE), device=device) + 1
        layout = Layout(positions + PAGE, none[:, None], none, [Chunk(0, len(ids), start, pages)])
        answer = self._model.base_model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, paged=Paged(cache, layout)
        )
        hidden: Tensor = answer.last_hidden_state[0]
        return hidden.float()
