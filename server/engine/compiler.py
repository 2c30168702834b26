"""Requests that bring a grammar wait here, beside the engine's loop, until it is compiled."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from server.engine.constrain import Constraint, GrammarConstraint, ReasoningConstraint, Words
from server.engine.grammars import matcher_of, source_of, tokenizer_of
from server.engine.trial import Trial
from server.errors import EngineFailed, RequestError, ServerError
from server.types import Generate, Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT = 64  # compiled grammars, and as many refusals
Outcome = Constraint | ServerError


class Compiler:
    """`start` a request and take it from `finished`. A grammar is compiled once for all who send it."""

    def __init__(self, words: Callable[[], Words]) -> None:
        """`words` is called once, in another thread, when the first request comes. Raises ServerError."""
        self._load = words
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._waiting: dict[str, tuple[Generate, Future[Outcome]]] = {}  # by request, in order of arrival
        self._done = threading.Event()
        self._shop: _Shop | None = None

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def start(self, request: Generate) -> None:
        future = self._thread.submit(self._make, request)
        self._waiting[request.id] = request, future
        future.add_done_callback(lambda _: self._done.set())

    def cancel(self, request_id: str) -> bool:
        """Whether the request was waiting here."""
        found = self._waiting.pop(request_id, None)
        return found is not None and (found[1].cancel() or True)

    def wait(self, seconds: float) -> None:
        """Until a request is finished, or so long."""
        self._done.wait(seconds)

    def finished(self) -> list[tuple[Generate, Outcome]]:
        """Each request once, with what it may say or why it may not run."""
        self._done.clear()
        ready = [request_id for request_id, (_, future) in self._waiting.items() if future.done()]
        return [(request, future.result()) for request, future in map(self._waiting.pop, ready)]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._shop is not None:
            self._shop.trial.close()

    def _make(self, request: Generate) -> Outcome:
        """In the thread."""
        try:
            if self._shop is None:
                self._shop = _Shop(self._load())
            return self._shop.constraint(request)
        except ServerError as error:
            return error
        except BaseException as error:  # noqa: BLE001 - also a panic of native code; one who waits must know
            return EngineFailed(f"the grammar could not be compiled ({type(error).__name__})")


class _Shop:
    """The vocabulary, and what was compiled for it."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self.trial = Trial(words)
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, LLMatcher | str] = OrderedDict()

    def constraint(self, request: Generate) -> Constraint:
        """Raises RequestError."""
        then = None if request.grammar is None else self._grammar(request.grammar)
        if request.reasoning is not None:
            return ReasoningConstraint(request.reasoning, self.words, then)
        assert then is not None, "only requests with a grammar or thoughts come here"
        return then

    def _grammar(self, grammar: Grammar) -> Constraint:
        compiled = self._kept.pop(grammar, None) or self._compile(grammar)
        self._kept[grammar] = compiled
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        if isinstance(compiled, str):
            raise RequestError(f"{grammar.param}: {compiled}", param=grammar.param)
        return GrammarConstraint(compiled.deep_copy(), self.words.ends)

    def _compile(self, grammar: Grammar) -> "LLMatcher | str":
        source = source_of(grammar)
        if refusal := self.trial.refusal(source):
            return refusal
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.words)
        return matcher_of(source, self._tokenizer)
