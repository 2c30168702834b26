"""`python -m benchmarks.gpu.serve`: speed of a Llama-2-7B shape, random weights, by format.

128 prompt tokens, 256 output tokens, greedy. Decode tokens/s = batch x 255 / (t(256) - t(1)), through the
server's scheduler and executor. Where transformers can read the format with bitsandbytes, its `generate` is
timed on the same checkpoint. Exit status 1 if a floor (of an H200) is not reached.
"""

import argparse
import gc
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import checkpoints, engine, peer
from server.backends.torch_.executor import TorchExecutor

PROMPT, ANSWER = 128, 256
FLOORS = {
    ("awq", 1): 267, ("gptq", 1): 267, ("fp16", 1): 197, ("nf4", 1): 190, ("int8", 1): 60,
    ("awq", 32): 4100, ("awq", 128): 8500,
}  # fmt: skip


def prompts(batch: int, length: int) -> list[list[int]]:
    return [[random.randrange(3, checkpoints.VOCABULARY) for _ in range(length)] for _ in range(batch)]


def timed(executor: TorchExecutor, batch: int, length: int, count: int) -> float:
    requests = [engine.greedy(str(i), prompt, count) for i, prompt in enumerate(prompts(batch, length))]
    torch.cuda.synchronize()

    def run() -> None:
        answers = engine.serve(executor, requests)
        wrong = [answer for answer in answers.values() if answer.error or len(answer.tokens) != count]
        assert not wrong, wrong[0].error

    return engine.seconds(run)


def decode(executor: TorchExecutor, batch: int) -> tuple[float, float]:
    """Tokens/s and milliseconds of a step: the median of three."""
    timed(executor, batch, PROMPT, 8)
    steps = []
    for _ in range(3):
        first = timed(executor, batch, PROMPT, 1)
        steps.append((timed(executor, batch, PROMPT, ANSWER) - first) / (ANSWER - 1))
    step = statistics.median(steps)
    return batch / step, step * 1000


def measure(name: str, batches: list[int], scratch: Path) -> list[dict[str, object]]:
    kind = None if name == "fp16" else checkpoints.KINDS[name]
    folder = scratch / name
    written = engine.seconds(lambda: checkpoints.llama_7b(folder, kind))
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    holder: list[TorchExecutor] = []
    load = engine.seconds(lambda: holder.append(engine.opened(folder, 2304, max(batches), device="cuda")))
    executor = holder.pop()
    memory = (before - torch.cuda.mem_get_info()[0]) / 2**30
    weights = sum(part.nbytes for part in tensors_of(executor)) / 2**30
    sizes = f"weights {weights:.2f} GiB, with KV {memory:.1f} GiB"
    print(f"{name}: written in {written:.0f} s, loaded in {load:.1f} s, {sizes}", flush=True)
    rows: list[dict[str, object]] = []
    for batch in batches:
        rate, step = decode(executor, batch)
        floor = FLOORS.get((name, batch))
        rows.append(
            {"format": name, "batch": batch, "tokens_s": round(rate, 1), "ms": round(step, 3), "floor": floor}
        )
        print(f"  batch {batch}: {rate:,.0f} tokens/s, {step:.2f} ms a step, floor {floor}", flush=True)
    timed(executor, 8, 2048, 1)
    prefill = 8 * 2048 / statistics.median(timed(executor, 8, 2048, 1) for _ in range(2))
    print(f"  prefill 8 x 2,048: {prefill:,.0f} tokens/s", flush=True)
    rows.append(
        {
            "format": name,
            "load_s": round(load, 1),
            "weights_gib": round(weights, 2),
            "prefill_tokens_s": round(prefill),
        }
    )
    executor.close()
    del executor
    rows += measure_peer(name, folder, batches)
    shutil.rmtree(folder)
    return rows


def measure_peer(name: str, folder: Path, batches: list[int]) -> list[dict[str, object]]:
    """transformers on the same files, with the memory that our executor has given back."""
    if (reason := peer.missing(name)) is not None:
        print(f"  transformers: {reason}", flush=True)
        return []
    gc.collect()
    torch.cuda.empty_cache()
    rows: list[dict[str, object]] = []
    for batch, rate in peer.rates(folder, [prompts(batch, PROMPT) for batch in batches]):
        print(f"  transformers.generate, batch {batch}: {rate:,.1f} tokens/s", flush=True)
        rows.append({"format": name, "peer": "transformers", "batch": batch, "tokens_s": round(rate, 1)})
    return rows


def tensors_of(executor: TorchExecutor) -> list[torch.Tensor]:
    """Every tensor of the model, packed layers' included."""
    found = list(executor._model.parameters())
    for module in executor._model.modules():
        if (packed := getattr(module, "packed", None)) is not None:
            found += [packed.words, packed.scales]
    return found


def below(rows: list[dict[str, object]]) -> list[str]:
    """What did not reach its floor."""
    return [
        f"{row['format']} at batch {row['batch']}: {row['tokens_s']} tokens/s, floor {row['floor']}"
        for row in rows
        if isinstance(floor := row.get("floor"), int) and float(str(row["tokens_s"])) < floor
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=["awq", "gptq", "nf4", "int8", "fp16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    rows: list[dict[str, object]] = []
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for name in arguments.formats:
            rows += measure(name, arguments.batches, Path(scratch))
            gc.collect()
            torch.cuda.empty_cache()
            if arguments.json:
                arguments.json.write_text(json.dumps(rows))
    for line in below(rows):
        print(f"BELOW {line}", flush=True)
    return int(bool(below(rows)))


if __name__ == "__main__":
    sys.exit(main())
