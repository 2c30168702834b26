"""llama.cpp's log: lines put together, errors kept, paths and noise gone."""

import logging
import os
import subprocess
import sys

import pytest

from server.backends.llama.native import NativeLog, tidy

DEBUG, INFO, WARNING, ERROR, CONTINUED = 1, 2, 3, 4, 5


def test_warnings_and_errors_reach_pythons_logging(caplog: pytest.LogCaptureFixture) -> None:
    log = NativeLog()
    with caplog.at_level(logging.DEBUG):
        for level, text in [(INFO, "f: a\n"), (WARNING, "f: b\n"), (DEBUG, "c\n"), (ERROR, "f: d\n")]:
            log.write(level, text)
    assert [(r.levelname, r.message) for r in caplog.records] == [("WARNING", "b"), ("ERROR", "d")]


def test_a_line_in_pieces_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log = NativeLog()
    log.write(ERROR, "load: no")
    log.write(CONTINUED, " room\nload: and")
    log.write(CONTINUED, " more\n")
    assert log.errors == ["no room", "and more"]


def test_pieces_of_lines_that_are_not_shown_are_dropped() -> None:
    log = NativeLog()
    log.write(INFO, "load: ")
    log.write(CONTINUED, "....\n")
    assert log.errors == []


def test_the_first_error_is_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    log = NativeLog()
    assert log.reason("none") == "none"
    for text in ("gguf: error loading model: bad magic\n", *("load: failed\n" for _ in range(20))):
        log.write(ERROR, text)
    assert log.reason("none") == "bad magic"
    assert len(log.errors) <= 8
    log.forget()
    assert log.reason("none") == "none"


def test_a_warning_that_means_nothing_here_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    NativeLog().write(WARNING, "llama_context: n_ctx_seq (4096) > n_ctx_train (1024) -- possible overflow\n")
    assert not caplog.records


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("load_model: cannot open '/srv/a b/models/x.gguf' now", "cannot open 'x.gguf' now"),
        ("f: failed to load model from /home/u/.cache/x.gguf", "failed to load model from x.gguf"),
        ("f: 3/4 layers", "3/4 layers"),
        ("f: " + "y" * 9000, "y" * 500),
        ("plain", "plain"),
    ],
)
def test_lines_are_tidied(line: str, expected: str) -> None:
    assert tidy(line) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "'1000'"), ({"GOMP_SPINCOUNT": "77"}, "'77'"), ({"OMP_WAIT_POLICY": "passive"}, "'0'")],
)
def test_threads_that_wait_for_each_other_spin_only_for_a_moment(
    given: dict[str, str], expected: str
) -> None:
    """As OpenMP's library itself reports it when it is loaded."""
    code = "from server.backends.llama.native import load_library; load_library()"
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=plain | given | {"OMP_DISPLAY_ENV": "verbose"},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("llama.cpp is built without GNU OpenMP here")
    (line,) = (line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line)
    assert line.split("=")[1].strip() == expected
