"""What commands show, as far as it is decided without a terminal."""

import io
import os
import pty
import subprocess
from pathlib import Path

import pytest
import typer

from server.cli.chat import visible
from server.cli.terminal import Lines, Step
from server.cli.variants import Row, ago, one_of, table
from tests.server.cli.conftest import command, environment

ROWS = [
    Row(
        state="built",
        key="abcd" + "0" * 28,
        id="a:q8_0",
        bytes=1_500_000,
        bits_per_weight=8.5,
        last_used=1000.0,
    ),
    Row(
        state="built", key="abce" + "0" * 28, id="b:q4_k_m", bytes=2_000, bits_per_weight=4.5, last_used=10.0
    ),
    Row(
        state="built", key="ffff" + "0" * 28, id="b:q4_k_m", bytes=2_000, bits_per_weight=4.5, last_used=10.0
    ),
    Row(state="unfinished", key="1234" + "0" * 28, bytes=7, last_used=0.0),
]


def test_lines_come_with_stages_and_then_every_few_seconds() -> None:
    now, out = 100.0, io.StringIO()
    lines = Lines(out, clock=lambda: now)
    for second, stage, done in [
        (0, "a", 0),
        (1, "a", 1),
        (2, "a", 2),
        (3.5, "a", 3),
        (4, "b", 0),
        (5, "b", 4),
        (7.5, "b", 4),
        (11, "b", 4),
    ]:
        now = 100.0 + second
        lines.show("m:x", Step(stage, done, 4, "tensors"))
    assert out.getvalue().splitlines() == [
        "m:x: a",
        "m:x: a 75% (3/4 tensors)",
        "m:x: b",
        "m:x: b 100% (4/4 tensors)",
    ]


def test_amounts() -> None:
    assert Step("pull", 1_000_000, 2_500_000, "bytes").amount == "1.0/2.5 MB"
    assert Step("load", 50, 100, "%").amount == ""
    assert Step("quantize", 3, 4, "tensors").share == 0.75
    assert Step("quantize", 5, 4, "tensors").share == 1.0
    assert Step("check", 0, 0, "").share == 0.0


def test_a_row_is_found_by_id_key_or_its_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_of(ROWS, "a:q8_0") is ROWS[0]
    assert one_of(ROWS, "abcd") is ROWS[0]
    assert one_of(ROWS, ROWS[3].key) is ROWS[3]
    for name, said in [
        ("b:q4_k_m", "name the key"),
        ("abc", "no variant"),
        ("c:q8_0", "no variant"),
        ("", "no"),
    ]:
        with pytest.raises(typer.Exit):
            one_of(ROWS, name)
        assert said in capsys.readouterr().err


def test_the_table_is_aligned_and_whole() -> None:
    lines = table(ROWS, now=4600.0).splitlines()
    assert lines[1].split("  ")[0] == "a:q8_0"
    assert lines[1].endswith("1.5 MB  8.50  1 h ago")
    assert lines[4].startswith("(unfinished)  1234")
    columns = [line.find(key) for line, key in zip(lines, ["KEY", *(row.key for row in ROWS)], strict=True)]
    assert len(set(columns)) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "just now"), (59, "just now"), (60, "1 min ago"), (7300, "2 h ago"), (200_000, "2 d ago")],
)
def test_ago(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def test_a_model_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[2Jb\x07\r\n\tc\x9b1m\x7f é 👩‍💻") == "a[2Jb\n\tc1m é 👩‍💻"


def test_bars_on_a_terminal(tmp_path: Path, tiny_chat: Path) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        command("quantize", tiny_chat, "--recipe", "q4_0", "--cache", tmp_path / "cache"),
        env=environment(tmp_path, TERM="xterm-256color", COLUMNS="100"),
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # Linux: the other end has closed
        pass
    os.close(ours)
    out, _ = child.communicate(timeout=60)
    assert out.startswith("built tiny-chat:q4_0 ")
    assert "tiny-chat:q4_0 quantize" in shown.decode()
    assert "━" in shown.decode()
