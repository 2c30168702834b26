from hypothesis import given
from hypothesis import strategies as st

from server.engine.prefix import Family, Resident, best_match, common_prefix

tokens = st.lists(st.integers(0, 2), max_size=20)
families = st.tuples(st.sampled_from(["", "other"]), st.sampled_from([None, "adapter"]), st.booleans())


def naive(a: list[int], b: list[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


@given(tokens, tokens)
def test_common_prefix_is_what_a_loop_finds(a: list[int], b: list[int]) -> None:
    assert common_prefix(a, b) == naive(a, b)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=20), st.lists(st.tuples(tokens, families), max_size=6)
)
def test_the_longest_prefix_of_the_own_family_is_found(
    prompt: list[int], held: list[tuple[list[int], Family]]
) -> None:
    residents = [Resident(slot, t, len(t), family) for slot, (t, family) in enumerate(held)]
    match, length = best_match(prompt, ("", None, False), residents)
    lengths = [min(naive(prompt, t), len(prompt) - 1) for t, family in held if family == ("", None, False)]
    assert length == max(lengths, default=0)
    if length:
        assert match is not None
        assert match.family == ("", None, False)
        assert list(match.tokens[:length]) == prompt[:length]


def test_positions_that_are_not_held_do_not_count() -> None:
    resident = Resident(0, [1, 2, 3, 4], 2, ("", None, False))
    assert best_match([1, 2, 3, 4, 5], ("", None, False), [resident]) == (resident, 2)
