"""The file that says who answers to a bare name: durable, replaced at once, read after a crash."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.pool.promotions import KEPT, Promotions
from tests.quant.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[3]


def test_promote_and_roll_back_are_found_by_the_next_process(tmp_path: Path) -> None:
    first = Promotions(tmp_path)
    assert first.of("m") is None
    first.promote("m", "b", "a")
    first.promote("m", "c", "b")
    again = Promotions(tmp_path).of("m")
    assert again is not None
    assert (again.variant, again.before) == ("c", ("a", "b"))
    first.roll_back("m", "b")
    first.roll_back("m", "a")
    back = Promotions(tmp_path).of("m")
    assert back is not None
    assert (back.variant, back.before) == ("a", ())
    first.roll_back("m", "b")  # there is nothing before it
    assert Promotions(tmp_path).of("m") == back


def test_two_promotions_at_once_are_both_in_the_history(tmp_path: Path) -> None:
    """Each was asked for when `a` answered."""
    names = Promotions(tmp_path)
    names.promote("m", "b", "a")
    names.promote("m", "c", "a")
    names.promote("m", "c", "a")
    found = names.of("m")
    assert found is not None
    assert (found.variant, found.before) == ("c", ("a", "b"))


def test_a_rollback_may_pass_over_variants_that_are_gone(tmp_path: Path) -> None:
    names = Promotions(tmp_path)
    for variant, before in (("b", "a"), ("c", "b"), ("d", "c")):
        names.promote("m", variant, before)
    names.roll_back("m", "a")
    found = names.of("m")
    assert found is not None
    assert (found.variant, found.before) == ("a", ())


def test_models_do_not_touch_each_other_and_the_list_is_bounded(tmp_path: Path) -> None:
    names = Promotions(tmp_path)
    names.promote("other", "x", "y")
    for number in range(2 * KEPT):
        names.promote("m", str(number + 1), str(number))
    found = Promotions(tmp_path)
    one, other = found.of("m"), found.of("other")
    assert one is not None
    assert len(one.before) == KEPT
    assert other is not None
    assert other.variant == "x"


def test_a_crash_before_the_rename_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Promotions(tmp_path)
    names.promote("m", "b", "a")

    def crash(self: Path, target: Path) -> Path:
        raise OSError("the power is gone")

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(OSError, match="power"):
        names.promote("m", "c", "b")
    monkeypatch.undo()
    for found in (names.of("m"), Promotions(tmp_path).of("m")):
        assert found is not None
        assert found.variant == "b"


def kills(folder: Path, moments: str, verb: str) -> int:
    """How many servers were killed while a name moved; after each the old or the new variant answers."""
    source = write_checkpoint(folder / "source")
    arguments = [str(folder / "caches"), str(source), moments, verb]
    command = [sys.executable, "-m", "tests.server.pool.promoted", *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return int(ended.stdout)


@pytest.mark.parametrize("verb", ["promote", "rollback"])
def test_a_kill_at_any_step_of_the_writing_leaves_the_old_or_the_new_serving(
    tmp_path: Path, verb: str
) -> None:
    assert kills(tmp_path, "written", verb) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["promote", "rollback"])
def test_so_does_a_kill_at_every_step(tmp_path: Path, verb: str) -> None:
    assert kills(tmp_path, "every", verb) >= 20
