"""Text that the full-precision model writes itself, token by token, for calibrating and for measuring.

Every row of a batch is a conversation that goes on and on: a question is fed in, the answer is sampled, and
when it ends the next question follows. All rows have the same length at all times, so that nothing is padded.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quant.errors import BadSource, BuildFailed
from quant.progress import Progress, Report

LONGEST_ANSWER = 200  # tokens; then the next question comes
CACHE_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # keys and values of all rows that are written at once


class Wanted(Protocol):
    """How much text."""

    @property
    def samples(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """What the rows are made of."""

    questions: Sequence[Sequence[int]]  # as the model is asked them
    ends: frozenset[int]  # tokens that end an answer
    start: int | None  # token before everything
    known: int  # ids below are the tokenizer's
    one: bool = False  # each row has one question, in turn, and what follows its answer does not count


def write_text(
    folder: Path, speech: Speech, wanted: Wanted, *, device: torch.device, report: Report
) -> Tensor:
    """int64 [samples, length], at temperature 1. Raises BadSource for a model that transformers cannot run,
    BuildFailed for one that computes NaN.
    """
    model = open_model(folder, device)
    rng = random.Random(wanted.seed)
    rows = [_Row(speech, number, rng.randrange(1 << 30)) for number in range(wanted.samples)]
    chance = torch.Generator(device).manual_seed(wanted.seed)
    size = _rows_at_once(model.config, wanted.length, device)
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    for number, part in enumerate(parts):
        for done in _write(model, part, wanted.length, chance):
            at = number * wanted.length + done
            report(Progress("calibrate", at, len(parts) * wanted.length, "steps"))
    return torch.tensor([row.tokens for row in rows])


def open_model(folder: Path, device: torch.device) -> Any:
    """transformers' causal model: float32 on CPUs, as stored on GPUs. Raises BadSource."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = torch.float32 if device.type == "cpu" else "auto"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise BadSource(f"transformers cannot open the source: {first:.200}") from error
    return model.eval().requires_grad_(False).to(device)


@dataclass(frozen=True, slots=True)
class Answer:
    """A question and what the model said; the tokens from `prompt` on are its own."""

    tokens: tuple[int, ...]
    prompt: int


def write_answers(
    folder: Path, speech: Speech, wanted: Wanted, *, device: torch.device, report: Report
) -> list[Answer]:
    """One answer each to the questions in turn, none longer than `length` tokens with its question.

    Questions that leave no room for an answer are left out. Raises as `write_text`.
    """
    text = write_text(folder, replace(speech, one=True), wanted, device=device, report=report)
    found = [_cut(row, speech, number) for number, row in enumerate(text.tolist())]
    return [answer for answer in found if len(answer.tokens) > answer.prompt]


def _cut(row: list[int], speech: Speech, number: int) -> Answer:
    prompt = len(speech.questions[number % len(speech.questions)]) + (speech.start is not None)
    end = next((at for at in range(prompt, len(row)) if row[at] in speech.ends), len(row) - 1)
    return Answer(tuple(row[: end + 1]), min(prompt, len(row)))


def _rows_at_once(config: Any, length: int, device: torch.device) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    each = config.num_hidden_layers * heads * head * 2 * length * (4 if device.type == "cpu" else 2)
    return max(1, CACHE_BYTES[device.type] // int(each))


@torch.no_grad()
def _write(model: Any, rows: list["_Row"], length: int, chance: torch.Generator) -> Iterator[int]:
    """Fill the rows, in step; yields how long they are."""
    past, device, known = None, chance.device, rows[0].speech.known
    logits: Tensor | None = None
    for done in range(length):
        sampled = [0] * len(rows) if logits is None else _sample(logits[:, :known], chance)
        for row, token in zip(rows, sampled, strict=True):
            row.add(token)
        if done + 1 < length:
            last = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
            output = model(input_ids=last, past_key_values=past, use_cache=True)
            logits, past = output.logits[:, -1].float(), output.past_key_values
        yield done + 1


def _sample(logits: Tensor, chance: torch.Generator) -> list[int]:
    if not bool(torch.isfinite(logits).all()):
        raise BuildFailed("the source's output has NaN or infinite values")
    steps = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # faster than multinomial
    dice = torch.rand((len(logits), 1), generator=chance, device=logits.device, dtype=torch.float64)
    chosen: list[int] = (
        torch.searchsorted(steps, dice * steps[:, -1:]).clamp_(max=logits.shape[1] - 1)[:, 0].tolist()
    )
    return chosen


class _Row:
    """One conversation that goes on and on."""

    def __init__(self, speech: Speech, number: int, seed: int) -> None:
        self.speech = speech
        self.tokens: list[int] = []
        self._rng = random.Random(seed)
        self._fed: list[int] = [] if speech.start is None else [speech.start]
        self._left = [speech.questions[number % len(speech.questions)]]  # rows begin with different ones
        self._answer = 0  # tokens of it so far
        self._ask()

    def add(self, sampled: int) -> None:
        """The next token: of the question, if it is not through, else the sampled one."""
        if self._fed:
            self.tokens.append(self._fed.pop(0))
            return
        self.tokens.append(sampled)
        self._answer += 1
        if not self.speech.one and (sampled in self.speech.ends or self._answer >= LONGEST_ANSWER):
            self._ask()

    def _ask(self) -> None:
        if not self._left:
            self._left = self._rng.sample(self.speech.questions, len(self.speech.questions))
        self._fed += self._left.pop()
        self._answer = 0
