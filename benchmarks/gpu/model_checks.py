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
UNFUSED_LIMIT = 4e-2  # transformers' own layers add up in half precision, where ours do in float32
SCORED = 24  # tokens of each answer
TOP = 5  # likeliest tokens that are compared, too
LEAST_LIKELY = -6.0  # half precision says little of what is rarer than one in four hundred
PARTED_LIMIT = 0.5  # share of the answers' tokens behind the first difference: two near tokens change places

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


def formats(
    names: Sequence[str] = checkpoints.WEIGHT_ONLY, device: str = "cuda", dtype: str = "f16"
) -> Iterator[Checked]:
    """Logprobs, `device` in half precision against the CPU in float32.

    Of greedy answers, token by token until they part, and of every token of the CPU's answers when they are
    scored as prompts, with the likeliest ones beside it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            folder = checkpoints.quantized(Path(scratch) / name, SOURCE, checkpoints.KINDS[name])
            asked = [engine.greedy(str(i), prompt, SCORED, TOP) for i, prompt in enumerate(texts())]
            want = _answers(folder, asked, device="cpu", dtype="f32")
            given = [_scoring(request, want[request.id]) for request in asked]
            scored = _answers(folder, given, device="cpu", dtype="f32")
            for ways in ({"graphs": "true"}, {"graphs": "false"}, {"fused": "false", "graphs": "false"}):
                got = _answers(folder, asked, device=device, dtype=dtype, **ways)
                label, limit = f"tiny-chat {name} {ways}", UNFUSED_LIMIT if "fused" in ways else LOGPROB_LIMIT
                yield Checked(label, largest_difference(got, want), limit)
                yield Checked(f"{label}: share that parted", 1 - agreement(got, want), PARTED_LIMIT)
                got = _answers(folder, given, device=device, dtype=dtype, **ways)
                yield Checked(f"{label}: prompts", scored_difference(got, scored), limit)


def _answers(folder: Path, given: list[Generate], **options: str) -> dict[str, engine.Answer]:
    executor = engine.opened(folder, CONTEXT, 8, **options)
    found = engine.serve(executor, given)
    executor.close()
    return found


def _scoring(request: Generate, answer: engine.Answer) -> Generate:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=TOP, reproducible=False)
    return Generate(id=request.id, prompt=request.prompt + tuple(answer.tokens), params=params)


def largest_difference(got: dict[str, engine.Answer], want: dict[str, engine.Answer]) -> float:
    """Of the logprobs of tokens that both chose, up to where answers part. NaN for errors and for nothing."""
    worst, compared = 0.0, 0
    for name, answer in got.items():
        if answer.error:
            return float("nan")
        pairs = zip(answer.tokens, answer.logprobs, want[name].tokens, want[name].logprobs, strict=True)
        for token, mine, other, theirs in pairs:
            if token != other:
                break
            worst = max(worst, abs(mine.logprob - theirs.logprob))
            compared += 1
    return worst if compared else float("nan")


def agreement(got: dict[str, engine.Answer], want: dict[str, engine.Answer]) -> float:
    """Share of the wanted tokens before the first that differs."""
    same = 0
    for name, answer in want.items():
        for mine, other in zip(got[name].tokens, answer.tokens, strict=False):
            if mine != other:
                break
            same += 1
    return same / sum(len(answer.tokens) for answer in want.values())


def scored_difference(got: dict[str, engine.Answer], want: dict[str, engine.Answer]) -> float:
    """Of the logprobs of all answers' tokens, and of the likeliest ones beside them that both name."""
    worst = 0.0
    for name, answer in want.items():
        mine = got[name].prompt
        if got[name].error or len(mine) != len(answer.prompt):
            return float("nan")
        for one, other in zip(mine[-SCORED:], answer.prompt[-SCORED:], strict=True):
            near = dict(one.top)
            pairs = [(one.logprob, other.logprob)]
            pairs += [(near[token], value) for token, value in other.top if token in near]
            worst = max(worst, *(abs(a - b) for a, b in pairs if b > LEAST_LIKELY))
    return worst


def graphs_and_eager() -> Iterator[Checked]:
    """The same requests with and without CUDA graphs: the same tokens and the same bits."""
    given = [engine.greedy(str(i), prompt, SCORED, 0) for i, prompt in enumerate(prompts(13, 60))]
    graphs, eager = (
        _answers(SOURCE, given, device="cuda", dtype="f16", graphs=word) for word in ("true", "false")
    )
    yield Checked("CUDA graphs against eager steps", largest_difference(graphs, eager), LOGPROB_LIMIT)
    yield Checked("share of tokens on which they part", 1 - agreement(graphs, eager), 1e-9)


def stress(count: int = 64, device: str = "cuda", dtype: str = "f16") -> Iterator[Checked]:
    """Random requests and aborts at once; seeded and greedy texts as one at a time; memory comes back."""
    executor = engine.opened(SOURCE, CONTEXT, PARALLEL, device=device, dtype=dtype)
    given = [_random_request(str(i), prompt) for i, prompt in enumerate(prompts(count, 200))]
    aborts = {request.id: random.randint(0, 20) for request in given if random.random() < 0.15}
    pages = executor._tables.free
    engine.serve(executor, given[:8])
    level = _allocated()
    together = engine.serve(executor, given, aborts)
    alone = {
        request.id: engine.serve(executor, [request])[request.id]
        for request in given
        if request.id not in aborts
    }
    gc.collect()
    errors = sum(bool(answer.error) for answer in together.values())
    yield Checked(f"{count} random requests, {len(aborts)} left: errors", errors, 0.5)
    yield Checked("memory held more than before, bytes", max(0, _allocated() - level), 2**20)
    left = pages - executor._tables.free + len(executor._drawers)
    yield Checked("pages of KV and drawers that are held for nobody", left, 0.5)
    by_name = {request.id: request for request in given}
    wrong = [name for name, answer in alone.items() if _parts_wrongly(by_name[name], together[name], answer)]
    print("  texts that differ:", [by_name[name].params for name in wrong], flush=True)
    yield Checked(
        f"of {len(alone)} texts, differing from one at a time where no two logits are near", len(wrong), 0.5
    )
    same = sum(together[name].tokens == answer.tokens for name, answer in alone.items())
    print(f"  {same} of {len(alone)} texts equal to the last token", flush=True)
    executor.close()


def _allocated() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


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
        frequency_penalty=0.0 if greedy else random.choice([0.0, 0.3]),
        logit_bias=random.choice(
            [(), tuple((random.randrange(4, 16000), random.uniform(-9, 3)) for _ in range(9))]
        ),
        stop_ids=random.choice([(), tuple(random.sample(range(4, 16000), 20))]),
        logprobs=2,
        prompt_logprobs=random.choice([None, None, 3]),
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
