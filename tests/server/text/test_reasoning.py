"""Thoughts are told from answers however the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.reasoning import Marks, ThoughtSplitter, marks_of
from server.text.vocabulary import Vocabulary

THINK = Marks("<think>", "</think>")


def split(text: str, cuts: list[int], *, begun: bool) -> tuple[str, str]:
    splitter = ThoughtSplitter(THINK, begun=begun)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [splitter.push(text[a:b]) for a, b in pairwise(bounds)]
    parts.append(splitter.flush())
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("<think>\nhm, so\n</think>\n\nYes.", False, ("hm, so", "Yes.")),
        ("\nhm, so\n</think>\n\nYes.", True, ("hm, so", "Yes.")),
        (" <think></think>Yes.", False, ("", "Yes.")),
        ("Plain <think>no</think>", False, ("", "Plain <think>no</think>")),
        ("<thin", False, ("", "<thin")),
        ("cut in </thi", True, ("cut in </thi", "")),
        ("a < b </ c </think>d", True, ("a < b </ c", "d")),
        ("", True, ("", "")),
    ],
)
@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_the_same_parts_however_they_come(
    text: str, begun: bool, expected: tuple[str, str], cuts: list[int]
) -> None:
    assert split(text, cuts, begun=begun) == expected


def test_marks_are_found_in_the_template_or_in_the_vocabulary() -> None:
    nothing = Vocabulary((b"a",), frozenset())
    assert marks_of("{{ '</think>' }}", nothing) == THINK
    assert marks_of("", Vocabulary((b"[THINK]", b"[/THINK]"), frozenset((0, 1)))) == Marks(
        "[THINK]", "[/THINK]"
    )
    assert marks_of("<|im_start|>", nothing) is None
