"""The wait for a slot is told once, by the first event, and nothing is kept of what has ended."""

from server.engine.waits import Waits
from server.types import Failed, Tokens


def test_the_first_event_tells_how_long_a_request_waited() -> None:
    now = [0.0]
    waits = Waits(lambda: now[0])
    waits.arrived("a")
    now[0] = 2.0
    waits.begun(["a"])
    now[0] = 5.0
    waits.begun(["a"])  # it lost its slot and got another one
    first = waits.told(Tokens(id="a", tokens=(1,), cached_tokens=0))
    assert isinstance(first, Tokens)
    assert first.waited_s == 2.0
    second = Tokens(id="a", tokens=(2,), finish="length")
    assert waits.told(second) is second


def test_what_ends_in_the_queue_is_forgotten() -> None:
    waits = Waits(lambda: 1.0)
    for name in ("aborted", "failed", "refused"):
        waits.arrived(name)
    waits.told(Tokens(id="aborted", tokens=(), finish="abort", cached_tokens=0))
    waits.told(Failed(id="failed", code="engine_failed", message="no"))
    waits.told(Tokens(id="refused", tokens=(), finish="abort"))
    assert vars(waits)["_since"] == vars(waits)["_waited"] == {}
