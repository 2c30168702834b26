"""What the GPU's checks make of answers that are not the model's."""

from math import isnan

from benchmarks.gpu.engine import Answer
from benchmarks.gpu.model_checks import agreement, largest_difference, scored_difference
from server.types import TokenLogprobs


def answer(tokens: list[int], shift: float = 0.0) -> Answer:
    scores = [TokenLogprobs(-1.0 - shift, ((token, -1.0 - shift),)) for token in tokens]
    return Answer(tokens=tokens, logprobs=scores, prompt=scores)


WANT = {"a": answer([1, 2, 3, 4]), "b": answer([5, 6, 7, 8])}


def test_equal_answers_differ_by_what_their_logprobs_differ() -> None:
    got = {"a": answer([1, 2, 3, 4], 0.25), "b": answer([5, 6, 9, 8])}
    assert largest_difference(got, WANT) == 0.25
    assert agreement(got, WANT) == 6 / 8
    assert scored_difference(got, WANT) == 0.25


def test_other_words_from_the_first_on_are_not_fine() -> None:
    got = {"a": answer([9, 9, 9, 9]), "b": answer([9, 9, 9, 9])}
    assert isnan(largest_difference(got, WANT))
    assert agreement(got, WANT) == 0.0


def test_an_answer_that_failed_is_not_fine() -> None:
    got = {"a": Answer(error="no memory"), "b": answer([5, 6, 7, 8])}
    assert isnan(largest_difference(got, WANT))
    assert isnan(scored_difference(got, WANT))
