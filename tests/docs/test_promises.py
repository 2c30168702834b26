"""Every promise of docs/reliability.md and docs/security.md names tests, and those tests are there."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
TESTS = REPO / "tests"


def rows(page: str) -> list[list[str]]:
    """The cells of each row of the page's first table."""
    lines = (REPO / "docs" / page).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def named(cell: str) -> list[Path]:
    names = re.findall(r"`([\w/]+(?:\.py)?)`", cell)
    return [TESTS / name.removeprefix("tests/") for name in names]


@pytest.mark.parametrize(("page", "column"), [("reliability.md", 3), ("security.md", 2)])
def test_each_promise_names_tests_that_there_are(page: str, column: int) -> None:
    table = rows(page)
    assert len(table) > 15
    for row in table:
        paths = named(row[column])
        assert paths, row
        for path in paths:
            assert path.exists(), (row[0], path)
            files = [path] if path.is_file() else list(path.rglob("*.py"))
            assert any("def test_" in file.read_text() for file in files) or "hostile" in str(path), path


def test_each_fault_has_a_row() -> None:
    ids = {name for row in rows("reliability.md") for name in re.findall(r"R\d+", row[0])}
    assert ids == {f"R{number}" for number in range(1, 26)}
