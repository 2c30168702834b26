"""The matcher against a search of the whole text."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.stops import StopMatcher

texts = st.text(alphabet="abc", max_size=40)
stop_sets = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=4).map(tuple)


def whole(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The stop that ends first; of those that end there, the one that begins first."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop and stop in text]
    if not found:
        return text, None
    _, start, stop = min(found)
    return text[:start], stop


def run(text: str, cuts: list[int], stops: tuple[str, ...]) -> tuple[str, str | None]:
    ends = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    matcher, out = StopMatcher(stops), ""
    for a, b in pairwise(ends):
        safe, matched = matcher.push(text[a:b])
        out += safe
        if matched:
            return out, matched
        assert whole(text, stops)[0].startswith(out), "a part of a stop was given out"
    return out + matcher.flush(), None


@given(texts, st.lists(st.integers(0, 100), max_size=12), stop_sets)
def test_equals_the_search_of_the_whole_text(text: str, cuts: list[int], stops: tuple[str, ...]) -> None:
    assert run(text, cuts, stops) == whole(text, stops)
    assert run(text, list(range(len(text))), stops) == whole(text, stops)


@given(texts, stop_sets)
def test_holds_back_no_more_than_it_must(text: str, stops: tuple[str, ...]) -> None:
    if whole(text, stops)[1] is not None:
        return
    safe, _ = StopMatcher(stops).push(text)
    held = text[len(safe) :]
    assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("char", list("^]-\\[&|~.$*"))
def test_stops_may_begin_with_any_character(char: str) -> None:
    assert run(f"x{char}{char}y", [], (char + "y",)) == (f"x{char}", char + "y")


def test_the_text_up_to_a_false_start_is_given_out() -> None:
    matcher = StopMatcher(("aab",))
    assert matcher.push("xaa") == ("x", None)
    assert matcher.push("a") == ("a", None)
    assert matcher.push("b!") == ("", "aab")
    assert matcher.push("more") == ("", "aab")
    assert matcher.flush() == ""


def test_empty_stops_stop_nothing() -> None:
    assert run("text", [2], ("",)) == ("text", None)


def test_a_long_stop_costs_linear_time() -> None:
    stop = "a" * 20_000 + "b"
    assert run("a" * 60_000, [], (stop,)) == ("a" * 60_000, None)
