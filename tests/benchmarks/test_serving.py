import math
from collections.abc import AsyncIterator

import pytest

from benchmarks.load import BadAnswer, Level, Stream, events, percentile, read_event, summarize
from benchmarks.machine import cpu_model, describe, usable_cores
from benchmarks.serving import HEADER, median_run, prompts, row


def level(tokens_per_s: float) -> Level:
    return Level(4, 8, 1, tokens_per_s, 10.0, 20.0, 1.5, 2.5)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([3.0, 1.0, 2.0], 50, 2.0), ([1.0, 2.0], 50, 1.5), ([0.0, 10.0, 20.0], 95, 19.0), ([7.0], 95, 7.0)],
)
def test_percentile_lies_between_two_values(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_percentile_of_nothing_is_no_number() -> None:
    assert math.isnan(percentile([], 50))


def test_a_level_counts_the_tokens_of_all_streams_over_the_wall_clock() -> None:
    done = [Stream(0.0, (0.010, 0.012, 0.016), 3), Stream(1.0, (1.030, 1.032), 7)]
    seen = summarize(2, done, failed=1, wall_s=2.0)
    assert (seen.requests, seen.failed, seen.tokens_per_s) == (3, 1, 5.0)
    assert seen.first_p50_ms == pytest.approx(20.0)
    assert seen.gap_p50_ms == pytest.approx(2.0)
    assert seen.gap_p95_ms == pytest.approx(3.8)


async def test_events_skip_pings_and_end_at_done() -> None:
    async def lines() -> AsyncIterator[str]:
        for line in (": ping", "", "data: {}", 'data:{"a":1}', "data: [DONE]", "data: late"):
            yield line

    assert [event async for event in events(lines())] == ["{}", '{"a":1}']


def test_a_chunk_gives_its_text_and_the_last_one_the_count() -> None:
    assert read_event('{"choices": [{"text": "hi"}]}') == ("hi", 0)
    assert read_event('{"choices": [], "usage": {"completion_tokens": 12}}') == ("", 12)


def test_an_error_event_is_a_failed_request() -> None:
    with pytest.raises(BadAnswer, match="engine_died"):
        read_event('{"error": {"code": "engine_died"}}')


def test_no_prompt_shares_its_beginning_with_another() -> None:
    texts = prompts(0, 200)
    assert len({text.split(" ", 1)[0] for text in texts}) == 200


def test_the_median_run_is_one_that_happened() -> None:
    assert median_run([level(30.0), level(10.0), level(20.0)]).tokens_per_s == 20.0


def test_a_row_has_a_cell_for_each_column() -> None:
    assert row("ours", level(12.0)).count("|") == HEADER.splitlines()[0].count("|")


def test_the_machine_is_described() -> None:
    assert cpu_model("processor : 0\nmodel name\t: Some CPU @ 2 GHz\n") == "Some CPU @ 2 GHz"
    assert usable_cores() > 0
    assert describe()[0].startswith("CPU: ")
