"""Whose sampling parameters apply: the request's, the model's authors', OpenAI's."""

from server.api.generate import sampling_params
from server.api.schema.chat import ChatRequest
from server.text.model import Sampling as Recommended
from server.types import SamplingParams

RECOMMENDED = Recommended(temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.1)


def params(recommended: Recommended = RECOMMENDED, **asked: object) -> SamplingParams:
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **asked})
    return sampling_params(body, recommended, max_tokens=None, logprobs=None)


def test_a_silent_request_gets_what_the_authors_recommend() -> None:
    chosen = params()
    assert (chosen.temperature, chosen.top_p, chosen.top_k) == (0.7, 0.9, 40)
    assert (chosen.min_p, chosen.repetition_penalty) == (0.0, 1.1)


def test_null_is_silence() -> None:
    assert params(temperature=None, top_p=None).temperature == 0.7


def test_what_is_asked_wins_over_what_is_recommended() -> None:
    chosen = params(top_p=0.5, repetition_penalty=1.0)
    assert (chosen.temperature, chosen.top_p, chosen.repetition_penalty) == (0.7, 0.5, 1.0)


def test_a_request_with_a_temperature_is_taken_literally() -> None:
    chosen = params(temperature=0)
    assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.repetition_penalty) == (0.0, 1.0, 0, 1.0)


def test_without_recommendations_openais_defaults_hold() -> None:
    chosen = params(Recommended())
    assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.min_p) == (1.0, 1.0, 0, 0.0)


def test_minus_one_switches_top_k_off() -> None:
    assert params(top_k=-1).top_k == 0
