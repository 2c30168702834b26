"""The pictures of docs/measuring.md and the rows of its table, from a folder of reports:

quantserve measure models/tiny-chat --all --report reports
python -m docs.measured_pictures reports
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from quant.measure.measurement import Measurement
from quant.measure.pictures import Point, Theme, against_bits, by_block, distribution
from quant.measure.report import Report

FOLDER = Path(__file__).resolve().parent / "measured"
EXAMPLE = "q4_k_m"  # the variant that is shown block by block and token by token
THEMES: tuple[Theme, Theme] = ("light", "dark")


def main(reports: Path, folder: Path = FOLDER) -> None:
    """Raises OSError, msgspec.ValidationError; StopIteration where the example was not measured."""
    read = [msgspec.json.decode(path.read_bytes(), type=Report) for path in sorted(reports.glob("*.json"))]
    found = [(report, report.measurement) for report in read if report.measurement]
    example = next(one for report, one in found if _name(report) == EXAMPLE)
    points = [Point(_name(report), one, report.verdict.state) for report, one in found]
    for theme in THEMES:
        (folder / f"divergence-{theme}.svg").write_bytes(against_bits(points, found[0][0].gate, theme))
        (folder / f"blocks-{theme}.svg").write_bytes(by_block(example, theme))
        (folder / f"tokens-{theme}.svg").write_bytes(distribution(example, theme))
    sys.stdout.write("".join(f"{row}\n" for row in rows(found)))


def rows(found: Sequence[tuple[Report, Measurement]]) -> Iterator[str]:
    yield "| variant | bits per weight | mean KL | top-1 | state |"
    yield "|---|---|---|---|---|"
    for report, one in found:
        yield (
            f"| {_name(report)} | {one.bits_per_weight:.2f} | {one.kl.mean} | {one.top1.percent} "
            f"| {report.verdict.state} |"
        )


def _name(report: Report) -> str:
    return report.id.partition(":")[2]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
