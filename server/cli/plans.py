"""A build's plan as a table that ends in plain numbers."""

from collections.abc import Iterator

from quant.build_plan import BuildPlan, PlanRow
from server.cli.terminal import duration


def plan_lines(name: str, plan: BuildPlan) -> Iterator[str]:
    yield f"{name} ({plan.method}, {plan.format}) would be {plan.key}"
    yield ""
    yield from _table(plan.rows)
    yield ""
    yield f"weights      {plan.elements / 1e6:,.1f} million"
    yield f"output       {plan.output_bytes / 1e6:,.1f} MB, {plan.bits_per_weight:.2f} bits/weight over all"
    yield f"disk         {plan.scratch_bytes / 1e6:,.1f} MB while it is built"
    yield f"memory       {plan.memory_bytes / 1e6:,.0f} MB on {plan.device}, beside what the process holds"
    yield f"time         about {duration(plan.seconds)} on {plan.device}, a rough guess"
    if plan.text:
        yield f"calibration  {plan.text}"
    for note in plan.notes:
        yield f"note         {note}"


def _table(rows: tuple[PlanRow, ...]) -> Iterator[str]:
    cells = [("COUNT", "MODULE", "SHAPE", "SCHEME", "MB"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(map(str.ljust, line, widths)).rstrip()


def _cells(row: PlanRow) -> tuple[str, str, str, str, str]:
    shape = "" if row.shape is None else f"{row.shape[0]:,} x {row.shape[1]:,}"
    return str(row.count), row.name, shape, row.scheme, f"{row.bytes / 1e6:,.2f}"
