"""The CPU quota in the files of both kinds of control groups."""

from pathlib import Path

import pytest

from server.backends.llama import threads
from server.backends.llama.backend import LlamaOpened
from server.backends.llama.threads import allowed_threads, cpu_quota, useful_threads
from tests.server.backends.llama.conftest import open_model
from tests.server.backends.llama.support import TEXTS, Line, follow, params


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/", {}, None),
        (
            "0::/a/b",
            {"cpu.max": "max 100000", "a/cpu.max": "50000 100000", "a/b/cpu.max": "400000 100000"},
            0.5,
        ),
        ("0::/not/mounted/here", {"cpu.max": "300000 100000"}, 3.0),
        (
            "4:memory:/x\n1:cpuacct,cpu:/x\n0::/",
            {"cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            2.0,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_the_tightest_quota_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    own = write(tmp_path, {"own": membership}) / "own"
    assert cpu_quota(own, write(tmp_path / "cgroup", files)) == expected


@pytest.mark.parametrize(
    ("quota", "cpus", "expected"), [("50000", 8, 1), ("250000", 8, 2), ("900000", 4, 4), ("max", 4, 4)]
)
def test_threads_fit_quota_and_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cpus: int, expected: int
) -> None:
    write(tmp_path, {"own": "0::/", "cgroup/cpu.max": f"{quota} 100000"})
    monkeypatch.setattr(threads, "MEMBERSHIP", tmp_path / "own")
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)))
    assert allowed_threads() == expected


def test_without_control_groups_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MEMBERSHIP", tmp_path / "nothing")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5})
    assert allowed_threads() == 2


def test_short_passes_get_one_thread_and_long_ones_all_that_is_allowed(q4: LlamaOpened) -> None:
    """Tokens, and positions that they look at together."""
    assert [useful_threads(allowed, size) for allowed in (8, 1) for size in (10**6, 10**9)] == [1, 8, 1, 1]
    short, long = [(1, 1), (4, 400)], [(1, 10**5), (64, 64), (8, 4000)]
    read_by = q4.model.read_by
    assert [useful_threads(8, read_by(*size)) for size in (*short, *long)] == [1, 1, 8, 8, 8]


def test_the_threads_of_a_pass_do_not_change_its_numbers(
    gguf_q4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which matters where a sequence is computed in other company than before."""
    found = []
    for small in (0, 1 << 40):  # two threads always, one always
        monkeypatch.setattr(threads, "SMALL_PASS", small)
        opened = open_model(gguf_q4 / "model.gguf", threads=2)
        lines = [
            Line(opened.model.tokenize(text, add_special=False, parse_special=False), params(logprobs=5))
            for text in TEXTS[:4]
        ]
        found.append(follow(opened.executor, lines, [[7, 8, 9]] * 4))
        opened.executor.close()
    assert found[0] == found[1]
