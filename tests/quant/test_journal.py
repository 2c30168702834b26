"""The journal never says more than what is on the disk."""

from pathlib import Path

import pytest

from quant.journal import JOURNAL, Journal


def test_a_stage_is_done_when_its_file_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "out" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"12345")
    assert not Journal(tmp_path)
    assert not Journal(tmp_path).has("convert")
    Journal(tmp_path).add("convert", file)
    again = Journal(tmp_path)
    assert again
    assert again.has("convert")
    assert not again.has("quantize")
    file.write_bytes(b"1234")
    assert not Journal(tmp_path).has("convert")
    file.unlink()
    assert not Journal(tmp_path).has("convert")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"convert": {"file": 5}}'])
def test_a_broken_journal_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / JOURNAL).write_bytes(content)
    assert not Journal(tmp_path)
