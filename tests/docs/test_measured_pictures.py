"""The pictures and the table of docs/measuring.md, from reports."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs import measured_pictures
from quant.manifest import BuilderRecord, SourceRecord
from quant.measure.gate import Gate, judge
from quant.measure.measurement import Block
from quant.measure.report import Report, as_json
from tests.quant.measure.measurements import measurement


def report(name: str, kl: float) -> Report:
    found = measurement(kl, variant=name, blocks=(Block(block=0, error=0.1, added=0.1),))
    return Report(
        id=f"m:{name}",
        key=found.key,
        verdict=judge(found, Gate()),
        gate=Gate(),
        measurement=found,
        others=(),
        source=SourceRecord(id="m", revision=None, digest="1" * 64),
        recipe={},
        recipe_digest="2" * 64,
        format="gguf",
        builder=BuilderRecord(version=1, packages={}),
        files=(),
        command="",
    )


def test_pictures_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kl in (("q4_k_m", 0.01), ("q2_k", 1.5)):
        (tmp_path / f"m-{name}.json").write_bytes(as_json(report(name, kl)))
    measured_pictures.main(tmp_path, tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [path.stem for path in drawn] == [
        f"{name}-{theme}" for name in ("blocks", "divergence", "tokens") for theme in ("dark", "light")
    ]
    for path in drawn:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    table = capsys.readouterr().out.splitlines()
    assert table[2:] == [
        "| q2_k | 4.80 | 1.5000 ± 0.0010 | 90.0 ± 1.0 % | rejected |",
        "| q4_k_m | 4.80 | 0.0100 ± 0.0010 | 90.0 ± 1.0 % | passed |",
    ]
