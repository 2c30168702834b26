"""One answer's text: the same however the engine groups its tokens."""

from hypothesis import given
from hypothesis import strategies as st

from server.api.choice import Choice, Delta
from server.text.detokenize import Detokenizer
from server.text.vocabulary import Vocabulary
from server.types import FinishReason, TokenLogprobs, Tokens

END = 7
PIECES = (b"a", b"b", b"ab", b"\xe2\x82", b"\xac", b"\xff", b" ", b"<end>")
VOCABULARY = Vocabulary(PIECES, frozenset({END}))
TOKENS = st.lists(st.integers(0, END - 1), max_size=12)
CUTS = st.lists(st.integers(1, 4), min_size=13, max_size=13)
STOPS = st.lists(st.text("ab \u20ac", min_size=1, max_size=3), max_size=3).map(tuple)


def score(token: int) -> TokenLogprobs:
    return TokenLogprobs(-float(token))


def run(
    tokens: list[int], cuts: list[int], finish: FinishReason, stops: tuple[str, ...], *, scored: bool
) -> tuple[list[Delta], int]:
    """Deltas up to the end, and how many tokens were counted."""
    choice = Choice(3, Detokenizer(VOCABULARY, begins=False), stops)
    deltas: list[Delta] = []
    left = list(tokens)
    for cut in cuts:
        part, left = left[:cut], left[cut:]
        logprobs = tuple(map(score, part)) if scored else None
        last = finish if not left else None
        deltas.append(choice.push(Tokens(id="", tokens=tuple(part), logprobs=logprobs, finish=last)))
        if deltas[-1].finish or not left:
            break
    return deltas, choice.tokens


def expected(tokens: list[int], stops: tuple[str, ...]) -> str:
    """The text before the stop that is complete first, found character by character."""
    text = b"".join(PIECES[token] for token in tokens if token != END).decode("utf-8", "replace")
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@given(TOKENS, CUTS, st.booleans(), STOPS, st.booleans())
def test_the_text_is_the_bytes_up_to_the_first_stop(
    tokens: list[int], cuts: list[int], ends: bool, stops: tuple[str, ...], scored: bool
) -> None:
    every = [*tokens, END] if ends else tokens
    deltas, counted = run(every, cuts, "stop" if ends else "length", stops, scored=scored)
    text = "".join(delta.text for delta in deltas)
    assert text == expected(every, stops)
    assert all(delta.index == 3 for delta in deltas)
    assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    whole = b"".join(PIECES[t] for t in tokens).decode("utf-8", "replace")
    assert deltas[-1].finish == ("stop" if ends or text != whole else "length")
    if text == whole:
        assert counted == len(every)


@given(TOKENS, CUTS, CUTS, STOPS)
def test_grouping_changes_neither_text_nor_count(
    tokens: list[int], cuts: list[int], others: list[int], stops: tuple[str, ...]
) -> None:
    one, one_counted = run(tokens, cuts, "length", stops, scored=False)
    two, two_counted = run(tokens, others, "length", stops, scored=False)
    assert "".join(d.text for d in one) == "".join(d.text for d in two)
    assert one[-1].finish == two[-1].finish
    if stops:
        assert one_counted == two_counted


@given(TOKENS, CUTS, st.booleans(), STOPS)
def test_scored_tokens_spell_the_text_and_are_cut_with_it(
    tokens: list[int], cuts: list[int], ends: bool, stops: tuple[str, ...]
) -> None:
    every = [*tokens, END] if ends else tokens
    deltas, _ = run(every, cuts, "stop" if ends else "length", stops, scored=True)
    scored = [one for delta in deltas for one in delta.scored]
    text = "".join(delta.text for delta in deltas)
    assert [one.token for one in scored] == tokens[: len(scored)]
    assert all(one.logprobs == score(one.token) for one in scored)
    spelled = "".join(one.text for one in scored)
    if text == expected(every, ()):
        assert spelled == text or spelled + "\ufffd" == text
        assert len(scored) == len(tokens)
    else:
        assert spelled.startswith(text)


@given(TOKENS, CUTS)
def test_a_scored_token_is_sent_with_its_text_and_not_before(tokens: list[int], cuts: list[int]) -> None:
    deltas, _ = run(tokens, cuts, "length", ("ab",), scored=True)
    for delta in deltas[:-1]:
        assert delta.text == "" or delta.scored or len(delta.text) < 3
        if delta.scored:
            assert delta.text
