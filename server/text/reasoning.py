"""Thoughts of a model, told from its answer by the marks it writes around them."""

from dataclasses import dataclass

from server.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Marks:
    open: str
    close: str
    tokens: tuple[str, ...] = ()  # control tokens within them, where those are more than a mark each


FORMATS = (
    Marks("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ, GLM, SmolLM3, ...
    Marks("[THINK]", "[/THINK]"),  # Magistral
    Marks("<seed:think>", "</seed:think>"),  # Seed-OSS
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    Marks("<reasoning>", "</reasoning>"),
    Marks("<|channel>thought", "<channel|>", ("<|channel>", "<channel|>")),  # Gemma 4
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Marks("◁think▷", "◁/think▷"),  # Kimi-VL
    Marks("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
    Marks("Here is my thought process:", "Here is my response:"),  # Granite 3.2
)


def marks_of(template: str, vocabulary: Vocabulary) -> Marks | None:
    """Those that the chat template writes, or that are tokens of their own."""
    for marks in FORMATS:
        if marks.close in template or (
            vocabulary.find(marks.open) is not None and vocabulary.find(marks.close) is not None
        ):
            return marks
    return None


class ThoughtSplitter:
    """An answer in pieces becomes thoughts and answer in pieces; blanks around either are dropped.

    `begun`: the prompt already holds the opening mark. An answer that does not begin with it has no thoughts.
    """

    def __init__(self, marks: Marks, *, begun: bool) -> None:
        self._marks = marks
        self._state = "thinking" if begun else "beginning"
        self._silent = True  # no thought yet
        self._held = ""

    @property
    def thinking(self) -> bool:
        return self._state == "thinking"

    def push(self, text: str) -> tuple[str, str]:
        """What is new of the thoughts, and of the answer."""
        if self._state == "answering":
            return "", text
        self._held += text
        thoughts = ""
        if self._state == "beginning":
            self._begin()
        if self._state == "thinking":
            thoughts = self._think()
        return thoughts, self._answer() if self._state in ("parting", "answering") else ""

    def flush(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._state == "thinking" else ("", held)

    def _begin(self) -> None:
        seen = self._held.lstrip()
        if seen.startswith(self._marks.open):
            self._state, self._held = "thinking", seen[len(self._marks.open) :]
        elif not self._marks.open.startswith(seen):
            self._state = "answering"

    def _think(self) -> str:
        """All that cannot be part of the closing mark, or of blanks before it."""
        if self._silent:
            self._held = self._held.lstrip()
        thoughts, mark, rest = self._held.partition(self._marks.close)
        if mark:
            self._state, self._held = "parting", rest
            return thoughts.rstrip()
        safe = len(thoughts) - overlap(thoughts, self._marks.close)
        safe = len(thoughts[:safe].rstrip())
        self._silent = self._silent and not safe
        self._held = thoughts[safe:]
        return thoughts[:safe]

    def _answer(self) -> str:
        if self._state == "parting":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answering"
        held, self._held = self._held, ""
        return held


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next(
        (size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0
    )
