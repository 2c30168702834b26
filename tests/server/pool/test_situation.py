"""What model:auto counts with: the budget that the loader keeps, and what engines were seen to hold."""

from pathlib import Path

from server.pool.learned import MARGIN, Learned
from server.pool.situation import free_memory, situation


def test_free_memory_is_at_most_the_budget() -> None:
    assert situation(133_000_000).free_memory == 133_000_000
    assert situation(1 << 60).free_memory <= free_memory() + (1 << 30)


def test_a_variant_needs_what_its_largest_engine_held(tmp_path: Path) -> None:
    learned = Learned(tmp_path)
    assert learned.largest("abc", "ram") == 0
    learned.add("abc llama 512 1 None", {"ram": 100_000_000}, 1.0)
    learned.add("abc llama 4096 8 None", {"ram": 300_000_000}, 1.0)
    learned.add("abcd llama 4096 8 None", {"ram": 900_000_000}, 1.0)
    assert learned.largest("abc", "ram") == int(MARGIN * 300_000_000)
    assert learned.largest("abc", "cuda:0") == 0
