"""`quantserve recommend`, as a user runs it."""

import re
from pathlib import Path

from tests.server.cli.conftest import Cli

LINE = re.compile(
    r"(\d+)\. (\S+) +codes ([\d.,]+) \+ scales ([\d.,]+) \+ kept ([\d.,]+) "
    r"\+ KV ([\d.,]+) \+ overhead ([\d.,]+) = ([\d.,]+); KL \d\.\d{4}; to build: .+"
)


def test_the_sums_are_right_and_the_best_comes_first(cli: Cli, tiny_chat: Path) -> None:
    done = cli("recommend", tiny_chat, "--memory", "1.19GB", "--context", "512", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head == "15,997,184 parameters; 512 tokens x 1 in 1.11 GiB of cuda for chat; MB:"
    found = [LINE.fullmatch(line) for line in lines]
    names = [match[2] for match in found if match]
    assert len(names) == len(lines)
    assert {"nf4", "int8", "awq-w4g128", "gptq-w4g128", "w4a16", "w8a16", "w8a8", "best", "q4_k_m"} <= {
        *names
    }
    for place, match in enumerate(found, 1):
        assert match is not None
        assert int(match[1]) == place
        *parts, total = (float(number.replace(",", "")) for number in match.groups()[2:])
        assert abs(sum(parts) - total) < 0.5


def test_on_a_cpu_there_are_only_gguf_presets(cli: Cli, tiny_chat: Path) -> None:
    done = cli("recommend", tiny_chat, "--memory", "100MB", "--device", "cpu", "--task", "code")
    assert "nf4" not in done.stdout
    assert done.stdout.count("[too large]") == len(done.stdout.splitlines()) - 1 == 7


def test_mistakes_get_one_line(cli: Cli, tiny_chat: Path) -> None:
    for arguments in (
        ("--device", "tpu"),
        ("--memory", "much"),
        ("--task", "poetry"),
        ("--context", "99999"),
    ):
        done = cli("recommend", tiny_chat, *arguments)
        assert done.returncode != 0
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
