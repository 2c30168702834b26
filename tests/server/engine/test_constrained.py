"""Grammars and budgets of thought from request to last token, on both layouts of memory."""

import json
import re
import time
from collections.abc import Iterator

import pytest

from server.backends.toy import END, TEXT
from server.engine.compiler import Compiler
from server.engine.constrain import ReasoningConstraint, Words
from server.engine.grammars import complaint
from server.engine.trial import Trial
from server.types import Abort, Command, Failed, Generate, Grammar, Limits, Reasoning, SamplingParams, Tokens
from tests.server.engine.script import Run, alone, run

WORDS = Words(TEXT.pieces, frozenset(TEXT.control), frozenset(TEXT.end_ids))
LIMITS = Limits(running=3, slots=6, context=200, kv_tokens=600, step_tokens=16, page=4)
PROMPT = (5, 40, 41, 42, 43)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 30},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["city", "days", "tags"],
    "additionalProperties": False,
}
Timed = dict[int, list[Command]]
BOMB = Grammar(kind="json_schema", text='{"type": "integer", "multipleOf": 123456789}')


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    made = Compiler(lambda: WORDS)
    yield made
    made.close()


def ask(
    name: str,
    grammar: Grammar | None = None,
    *,
    seed: int = 1,
    count: int = 150,
    reasoning: Reasoning | None = None,
) -> Generate:
    params = SamplingParams(max_tokens=count, temperature=1.0, seed=seed, stop_ids=(END,))
    prompt = (*PROMPT, seed % END)
    return Generate(id=name, prompt=prompt, params=params, grammar=grammar, reasoning=reasoning)


def final(result: Run, name: str) -> Tokens:
    event = result.final(name)
    assert isinstance(event, Tokens)
    return event


def text_of(result: Run, name: str) -> str:
    tokens = result.text(name)
    shown = tokens if final(result, name).complete or final(result, name).finish != "stop" else tokens[:-1]
    return b"".join(TEXT.pieces[token] for token in shown).decode()


@pytest.mark.parametrize("backend", ["toy-rows", "toy-pages"])
def test_answers_are_what_their_grammars_say(backend: str, compiler: Compiler) -> None:
    grammars = {
        "schema": Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
        "regex": Grammar(kind="regex", text="[a-c]{2,4}/x?"),
        "choice": Grammar(kind="choice", text='["yes", "no\\n\\u007f", "maybe\\" so"]'),
        "lark": Grammar(kind="lark", text='start: "<" NAME ">"\nNAME: /[a-z]{1,5}/'),
    }
    pairs = [(name, seed) for name in grammars for seed in (1, 2, 3)]
    requests = [ask(f"{name}-{seed}", grammars[name], seed=seed) for name, seed in pairs]
    free = ask("free", seed=4, count=40)
    timed: Timed = {0: [*requests, free], 3: [ask("late", seed=5)]}
    result = run(backend, timed, LIMITS, compiler=compiler)
    for seed in (1, 2, 3):
        value = json.loads(text_of(result, f"schema-{seed}"))
        assert value["city"] in ("Paris", "Rome")
        assert 1 <= value["days"] <= 30
        assert re.fullmatch("[a-c]{2,4}/x?", text_of(result, f"regex-{seed}"))
        assert text_of(result, f"choice-{seed}") in ("yes", "no\n\x7f", 'maybe" so')
        assert re.fullmatch("<[a-z]{1,5}>", text_of(result, f"lark-{seed}"))
    assert all(final(result, request.id).finish == "stop" for request in requests)
    assert final(result, "schema-1").complete  # nothing may follow the last brace: no end token was sampled
    assert result.text("free") == alone(free, LIMITS.context)


@pytest.mark.parametrize("backend", ["toy-rows", "toy-pages"])
def test_the_same_request_gets_the_same_text_in_any_company(backend: str, compiler: Compiler) -> None:
    grammar = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
    lonely = run(backend, {0: [ask("a", grammar)]}, LIMITS, compiler=compiler)
    small = Limits(running=3, slots=3, context=200, kv_tokens=200, step_tokens=16, page=4)
    others = [ask(f"other-{seed}", seed=seed, count=90) for seed in range(2, 6)]
    timed: Timed = {0: [*others[:2], ask("a", grammar)], 9: [*others[2:]]}
    second = Compiler(lambda: WORDS)
    crowd = run(backend, timed, small, compiler=second)
    assert crowd.text("a") == lonely.text("a")


def test_a_limit_of_tokens_ends_within_the_grammar(compiler: Compiler) -> None:
    grammar = Grammar(kind="regex", text="[a-z]{50}")
    event = final(run("toy-rows", {0: [ask("r", grammar, count=7)]}, LIMITS, compiler=compiler), "r")
    assert (event.finish, event.complete) == ("length", False)


@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        (Grammar(kind="json_schema", text='{"not": {"type": "string"}}'), "keyword not"),
        (Grammar(kind="json_schema", text='{"uniqueItems": true}'), "keyword uniqueItems"),
        (Grammar(kind="json_schema", text='{"type": "string", "format": "phone"}'), "keyword format"),
        (Grammar(kind="json_schema", text='{"type": "strange"}'), "keyword type"),
        (Grammar(kind="json_schema", text='{"$ref": "http://127.0.0.1/x"}'), "keyword $ref"),
        (Grammar(kind="json_schema", text='{"type": "string", "pattern": "(?=a)"}'), "look-around"),
        (Grammar(kind="json_schema", text='{"enum": []}'), "no value can satisfy"),
        (Grammar(kind="regex", text="(a", param="guided_regex"), "guided_regex: "),
        (Grammar(kind="lark", text="start: nothing"), "not a grammar"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(grammar: Grammar, word: str, compiler: Compiler) -> None:
    result = run("toy-rows", {0: [ask("bad", grammar), ask("good")]}, LIMITS, compiler=compiler)
    event = result.final("bad")
    assert isinstance(event, Failed)
    assert (event.code, event.param) == ("invalid_value", grammar.param)
    assert word in event.message
    assert "\n" not in event.message
    assert final(result, "good").finish


def test_a_grammar_that_keeps_its_compiler_busy_is_refused_while_others_run(compiler: Compiler) -> None:
    start = time.monotonic()
    fine = Grammar(kind="regex", text="ok")
    timed: Timed = {0: [ask("bomb", BOMB), ask("free")], 2: [ask("fine", fine)]}
    result = run("toy-rows", timed, LIMITS, compiler=compiler)
    assert time.monotonic() - start < 10
    event = result.final("bomb")
    assert isinstance(event, Failed)
    assert "too long" in event.message
    assert text_of(result, "fine") == "ok"
    names = list(result.events)
    assert names.index("free") < names.index("bomb")


def test_a_client_that_leaves_while_its_grammar_is_compiled_is_let_go(compiler: Compiler) -> None:
    result = run("toy-rows", {0: [ask("bomb", BOMB)], 1: [Abort(id="bomb")]}, LIMITS, compiler=compiler)
    assert final(result, "bomb").finish == "abort"


def test_a_trial_survives_what_kills_its_process() -> None:
    trial = Trial(WORDS)
    try:
        assert trial.refusal('{"grammars": [{"lark_grammar": "start: \\"a\\""}]}') is None
        assert trial._process is not None
        trial._process.kill()
        trial._process.wait()
        assert trial.refusal('{"grammars": [{"lark_grammar": "start: \\"a\\""}]}') is None
    finally:
        trial.close()


def test_complaints_repeat_nothing_of_the_grammar() -> None:
    assert complaint('Unimplemented keys: ["if", "then"]') == "cannot be enforced: the keyword if, then"
    assert "secret" not in complaint("Pointer '/secret' does not exist")
    assert "secret" not in complaint("something new about secret")
    assert (
        complaint("lookarounds not supported yet; End in regex /secret$a|b/").count("^ and $ can only") == 1
    )
    crossed = complaint("Unsatisfiable schema: minLength (3) is greater than maxLength (1)")
    assert crossed == "no value can satisfy this schema: minLength is greater than maxLength"
    range = "regex parse error:\n  secret{3,1}\n"
    range += "error: invalid repetition count range, the start must be <= the end"
    assert complaint(range).endswith(": invalid repetition count range, the start must be <= the end")
    assert "multipleOf" in complaint("Unsatisfiable schema: range (0, 1) does not contain a multiple of 5")
    assert "secret" not in complaint("Unsatisfiable schema: required property 'secret' is unsatisfiable")


# -- thoughts -------------------------------------------------------------------------------------


def thinking(begun: bool, budget: int | None) -> Reasoning:
    ids = tuple(byte - 32 for byte in b"</think>")
    return Reasoning(open="<think>", close="</think>", close_ids=ids, begun=begun, budget=budget)


@pytest.mark.parametrize("backend", ["toy-rows", "toy-pages"])
@pytest.mark.parametrize("budget", [0, 1, 20])
def test_thoughts_end_at_their_budget_and_the_grammar_begins(
    backend: str, budget: int, compiler: Compiler
) -> None:
    grammar = Grammar(kind="regex", text="[0-9]{3}")
    request = ask("r", grammar, reasoning=thinking(begun=True, budget=budget))
    text = text_of(run(backend, {0: [request]}, LIMITS, compiler=compiler), "r")
    thought, _, answer = text.partition("</think>")
    assert len(thought) == budget
    assert re.fullmatch("[0-9]{3}", answer)


def follow(constraint: ReasoningConstraint, text: str) -> None:
    for byte in text.encode():
        mask = constraint.mask()
        assert mask is None or mask[(byte - 32) >> 3] >> ((byte - 32) & 7) & 1, (text, chr(byte))
        constraint.take(byte - 32)


def test_without_an_opening_mark_there_is_no_budget() -> None:
    constraint = ReasoningConstraint(thinking(begun=False, budget=2), WORDS, None)
    follow(constraint, "plainly no thoughts, whatever <think> comes later")
    assert constraint.mask() is None


def test_an_opening_mark_starts_the_count() -> None:
    constraint = ReasoningConstraint(thinking(begun=False, budget=2), WORDS, None)
    follow(constraint, " <think>ab")
    assert constraint.mask() == WORDS.only([ord("<") - 32])
    follow(constraint, "</think>and on")
    assert constraint.mask() is None


def test_thoughts_that_end_by_themselves_are_not_cut() -> None:
    constraint = ReasoningConstraint(thinking(begun=True, budget=50), WORDS, None)
    follow(constraint, "hm</think>" + "answer " * 20)
    assert constraint.mask() is None


def test_a_grammar_allows_thoughts_first_and_no_end_within_them(compiler: Compiler) -> None:
    compiler.start(
        ask("r", Grammar(kind="regex", text="[0-9]+"), reasoning=thinking(begun=False, budget=None))
    )
    compiler.wait(20)
    [(_, constraint)] = compiler.finished()
    assert isinstance(constraint, ReasoningConstraint)
    mask = constraint.mask()
    assert mask == WORDS.only([ord(c) - 32 for c in "<0123456789"])
    follow(constraint, "<think>")
    assert constraint.mask() == WORDS.no_end
    follow(constraint, "x</think>12")
    assert constraint.mask() == WORDS.only([*(ord(c) - 32 for c in "0123456789"), END])
