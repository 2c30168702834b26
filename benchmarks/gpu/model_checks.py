"""tiny-chat on CUDA against the CPU, graphs against eager steps, and 64 random requests at once."""

import gc
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.gpu import checkpoints, engine
from benchmarks.gpu.kernel_checks import Checked
from server.types import Generate, SamplingParams

SOURCE = Path(__file__).parents[2] / "models" / "tiny-chat"
CONTEXT, PARALLEL = 512, 64
LOGPROB_LIMIT = 2e-2
SCORED = 24  # tokens of each answer


TEXTS = (
    "Tell me about the sea.",
    "What is a good name for a cat?",
    "Write a short story about a fox who learns to share.",
    "How do plants grow?",
    "Once upon a time there was",
    "My friend said that the best thing about winter is",
)


def texts() -> list[list[int]]:
    """What the model was made for: after random tokens, half precision says little of it."""
    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


def prompts(count: int, longest: int) -> list[list[int]]:
    return [[random.randrange(4, 16000) for _ in range(random.randint(3, longest))] for _ in range(count)]


def formats(names: Sequence[str] = checkpoints.WEIGHT_ONLY) -> Iterator[Checked]:
    """Logprobs of greedy answers, CUDA against the CPU in float32, up to the first token that differs."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            folder = checkpoints.quantized(Path(scratch) / name, SOURCE, checkpoints.KINDS[name])
            given = [engine.greedy(str(i), prompt, SCORED, 0) for i, prompt in enumerate(texts())]
            want = _answers(folder, given, device="cpu", dtype="f32")
            for ways in ({"graphs": "true"}, {"graphs": "false"}, {"fused": "false", "graphs": "false"}):
                got = _answers(folder, given, device="cuda", dtype="f16", **ways)
                yield Checked(f"tiny-chat {name} {ways}", largest_difference(got, want), LOGPROB_LIMIT)


def _answers(folder: Path, given: list[Generate], **options: str) -> dict[str, engine.Answer]:
    executor = engine.opened(folder, CONTEXT, 8, **options)
    found = engine.serve(executor, given)
    executor.close()
    return found


def largest_difference(got: dict[str, engine.Answer], want: dict[str, engine.Answer]) -> float:
    """Of the logprobs of tokens that both chose, up to where answers part. NaN for errors."""
    worst = 0.0
    for name, answer in got.items():
        if answer.error or not answer.tokens:
            return float("nan")
        pairs = zip(answer.tokens, answer.logprobs, want[name].tokens, want[name].logprobs, strict=True)
        for token, mine, other, theirs in pairs:
            if token != other:
                break
            worst = max(worst, abs(mine.logprob - theirs.logprob))
    return worst


def graphs_and_eager() -> Iterator[Checked]:
    """The same requests with and without CUDA graphs."""
    given = [engine.greedy(str(i), prompt, SCORED, 0) for i, prompt in enumerate(prompts(13, 60))]
    graphs, eager = (
        _answers(SOURCE, given, device="cuda", dtype="f16", graphs=word) for word in ("true", "false")
    )
    yield Checked("CUDA graphs against eager steps", largest_difference(graphs, eager), LOGPROB_LIMIT)


def stress(count: int = 64) -> Iterator[Checked]:
    """Random requests and aborts at once; seeded and greedy texts as one at a time; memory comes back."""
    executor = engine.opened(SOURCE, CONTEXT, PARALLEL, device="cuda", dtype="f16")
    given = [_random_request(str(i), prompt) for i, prompt in enumerate(prompts(count, 200))]
    aborts = {request.id: random.randint(1, 20) for request in given if random.random() < 0.15}
    engine.serve(executor, given[:8])
    torch.cuda.synchronize()
    level = torch.cuda.memory_allocated()
    together = engine.serve(executor, given, aborts)
    alone = {
        request.id: engine.serve(executor, [request])[request.id]
        for request in given
        if request.id not in aborts
    }
    gc.collect()
    torch.cuda.synchronize()
    errors = sum(bool(answer.error) for answer in together.values())
    yield Checked(f"{count} random requests, {len(aborts)} left: errors", errors, 0.5)
    yield Checked("memory held more than before, bytes", max(0, torch.cuda.memory_allocated() - level), 2**20)
    by_name = {request.id: request for request in given}
    wrong = [name for name, answer in alone.items() if _parts_wrongly(by_name[name], together[name], answer)]
    print("  texts that differ:", [by_name[name].params for name in wrong], flush=True)
    yield Checked(
        f"of {len(alone)} texts, differing from one at a time where no two logits are near", len(wrong), 0.5
    )
    same = sum(together[name].tokens == answer.tokens for name, answer in alone.items())
    print(f"  {same} of {len(alone)} texts equal to the last token", flush=True)
    executor.close()


def _random_request(name: str, prompt: list[int]) -> Generate:
    greedy = random.random() < 0.4
    params = SamplingParams(
        max_tokens=random.randint(1, 96),
        temperature=0.0 if greedy else random.uniform(0.3, 1.3),
        top_p=random.choice([1.0, 0.9]),
        top_k=random.choice([0, 0, 20]),
        min_p=random.choice([0.0, 0.05]),
        seed=random.randrange(1 << 30),
        reproducible=not greedy,  # as the API has it for requests with a seed
        repetition_penalty=1.0 if greedy else random.choice([1.0, 1.1]),
        presence_penalty=0.0 if greedy else random.choice([0.0, 0.5]),
        logprobs=2,
    )
    return Generate(id=name, prompt=tuple(prompt), params=params)


def _parts_wrongly(request: Generate, together: engine.Answer, alone: engine.Answer) -> bool:
    """Whether seeded texts differ at all, or greedy ones where the two likeliest tokens are not near."""
    if request.params.reproducible:
        return together.tokens != alone.tokens
    for index, (mine, other) in enumerate(zip(together.tokens, alone.tokens, strict=False)):
        if mine != other:
            top = alone.logprobs[index].top
            return abs(top[0][1] - top[1][1]) > LOGPROB_LIMIT
    return len(together.tokens) != len(alone.tokens)
