"""One answer as a client sees it: thoughts, text and calls, told apart as it comes."""

from dataclasses import dataclass

from server.text.calls import CallDelta, CallReader
from server.text.reasoning import ThoughtSplitter


@dataclass(frozen=True, slots=True)
class Parts:
    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


class AnswerReader:
    """Of one answer. `called` once it holds a call, and its calls are whole."""

    def __init__(self, thoughts: ThoughtSplitter | None, calls: CallReader | None) -> None:
        self._thoughts, self._calls = thoughts, calls
        self._holds_calls = False

    @property
    def thinking(self) -> bool:
        return self._thoughts is not None and self._thoughts.thinking

    @property
    def called(self) -> bool:
        return self._holds_calls and self._calls is not None and not self._calls.unfinished

    def push(self, text: str, *, last: bool) -> Parts:
        reasoning, answer = ("", text) if self._thoughts is None else self._thoughts.push(text)
        if last and self._thoughts is not None:
            more = self._thoughts.flush()
            reasoning, answer = reasoning + more[0], answer + more[1]
        if self._calls is None:
            return Parts(answer, reasoning)
        found = self._calls.push(answer)
        calls = found.calls
        if last:
            rest = self._calls.flush()
            found.text, calls = found.text + rest.text, calls + rest.calls
        self._holds_calls = self._holds_calls or bool(calls)
        return Parts(found.text, reasoning, tuple(calls))
