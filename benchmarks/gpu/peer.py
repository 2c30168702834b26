"""transformers.generate on the checkpoint that our executor has just served; bitsandbytes multiplies."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import engine

READ = frozenset({"nf4", "fp4", "int8", "fp16"})  # formats that transformers opens without other packages
ANSWER = 64  # tokens; the rate is that of the tokens after the first


def missing(name: str) -> str | None:
    """Why transformers cannot be timed with this format, or None."""
    if name not in READ:
        return f"transformers reads {name} only with packages of its own"
    absent = [package for package in ("bitsandbytes", "accelerate") if not find_spec(package)]
    return f"{' and '.join(absent)} not installed" if absent and name != "fp16" else None


def rates(folder: Path, prompts: Sequence[Sequence[Sequence[int]]]) -> Iterator[tuple[int, float]]:
    """(batch, decode tokens/s) for batches of equally long prompts; greedy, on past the end of an answer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map={"": 0}).eval()
    for batch in prompts:
        ids = torch.tensor(batch, device="cuda")
        _seconds(model, ids, 4)
        first = _seconds(model, ids, 1)
        yield len(batch), len(batch) * (ANSWER - 1) / (_seconds(model, ids, ANSWER) - first)


@torch.inference_mode()
def _seconds(model: Any, ids: torch.Tensor, count: int) -> float:
    def run() -> None:
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        assert found.shape[1] == ids.shape[1] + count

    torch.cuda.synchronize()
    return engine.seconds(run)
