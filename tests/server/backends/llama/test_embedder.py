"""Embeddings of tiny-chat: those that transformers' hidden states give."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from server.backends.llama.backend import LlamaOpened
from server.backends.llama.embedder import STEP_TOKENS
from tests.server.backends.llama.support import TEXTS

TINY_CHAT = Path(__file__).parents[4] / "models" / "tiny-chat"


def embed(opened: LlamaOpened, text: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    tokens = opened.model.tokenize(text, add_special=False, parse_special=False)
    return np.frombuffer(opened.embedder.embed(tokens), "<f4")


def test_the_mean_of_the_last_hidden_states(f32: LlamaOpened) -> None:
    """Also of a text that takes several passes."""
    model = AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=torch.float32)
    for text in (TEXTS[0], " ".join(TEXTS)[:1000]):
        tokens = f32.model.tokenize(text, add_special=False, parse_special=False)
        with torch.no_grad():
            hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        assert np.abs(embed(f32, text) - expected).max() < 1e-4
    assert len(tokens) > 2 * STEP_TOKENS


def test_neither_other_texts_nor_running_sequences_change_it(f32: LlamaOpened) -> None:
    first = embed(f32, TEXTS[1])
    embed(f32, " ".join(TEXTS)[:1000])
    assert np.array_equal(embed(f32, TEXTS[1]), first)
    assert abs(float(np.linalg.norm(first)) - 1) < 1e-6
