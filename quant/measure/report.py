"""The report of one variant: JSON for machines, one HTML page without links to elsewhere for people."""

import base64
import html
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from quant.manifest import BuilderRecord, FileRecord, SourceRecord
from quant.measure.gate import Gate, State, Verdict, judge
from quant.measure.measurement import Figure, Measurement, read_measurement
from quant.store import Variant

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { border: 1px solid #8884; padding: .3rem .6rem; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre, code { font: 13px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.verdict { padding: .8rem 1rem; border-left: 6px solid; font-size: 1.1rem; }
.passed { border-color: #2da44e; } .degraded { border-color: #bf8700; }
.rejected { border-color: #cf222e; } .unmeasured { border-color: #8c959f; }
img { max-width: 100%; }
"""


class Row(Struct, frozen=True, kw_only=True):
    """One variant among all of its source."""

    variant: str
    state: State
    reasons: tuple[str, ...]
    bits_per_weight: float
    bytes: int
    kl: Figure | None
    top1: Figure | None


class Report(Struct, frozen=True, kw_only=True):
    id: str  # "model:variant"
    key: str
    verdict: Verdict
    gate: Gate
    measurement: Measurement | None
    others: tuple[Row, ...]  # all variants of the source, this one too
    source: SourceRecord
    recipe: dict[str, Any]
    recipe_digest: str
    format: str
    builder: BuilderRecord
    files: tuple[FileRecord, ...]
    command: str  # that measures it again


@dataclass(frozen=True, slots=True)
class Judged:
    """A variant, what was measured of it and what that means under its gate."""

    variant: Variant
    gate: Gate
    measurement: Measurement | None
    verdict: Verdict

    @property
    def name(self) -> str:
        return self.variant.manifest.recipe.name

    @property
    def barred(self) -> bool:
        """Never served."""
        return self.verdict.state == "rejected" and not self.gate.serve_anyway


def judged(variant: Variant, gate: Gate) -> Judged:
    found = read_measurement(variant.path, variant.manifest)
    return Judged(variant, gate, found, judge(found, gate))


def report_of(model: str, subject: Judged, others: Sequence[Judged], source: str) -> Report:
    """`source`: as it is named on a command line."""
    manifest = subject.variant.manifest
    return Report(
        id=f"{model}:{subject.name}",
        key=subject.variant.key,
        verdict=subject.verdict,
        gate=subject.gate,
        measurement=subject.measurement,
        others=tuple(_row(one) for one in sorted(others, key=_bits)),
        source=manifest.source,
        recipe=manifest.recipe.body,
        recipe_digest=manifest.recipe.digest,
        format=manifest.format,
        builder=manifest.builder,
        files=manifest.files,
        command=command_of(subject, source),
    )


def command_of(subject: Judged, source: str) -> str:
    """That builds the variant where it is missing, and measures it on the same texts again.

    FILE stands for files that are known by what is in them only.
    """
    words = ["quantserve", "measure", source, *_recipe_words(subject)]
    if found := subject.measurement:
        words += ["--again", "--texts", str(found.reference.texts), "--ctx", str(found.context)]
        words += ["--corpus", "FILE"] if found.reference.kind == "corpus" else []
    return shlex.join(words)


def _recipe_words(subject: Judged) -> tuple[str, str]:
    if not subject.name.startswith("custom-"):
        return "--variants", subject.name
    body = msgspec.json.encode(subject.variant.manifest.recipe.body).decode()
    return "--recipe", re.sub(r'"sha256:[0-9a-f]{64}"', '"FILE"', body)


def as_json(report: Report) -> bytes:
    """With all limits of the gate, those that nobody has set, too."""
    encoded = {**msgspec.to_builtins(report), "gate": asdict(report.gate)}
    return msgspec.json.format(msgspec.json.encode(encoded), indent=1) + b"\n"


def as_html(report: Report, others: Sequence[Judged]) -> str:
    """Pictures where matplotlib is there; else a line that says it is not."""
    parts = [
        f"<h1>{_text(report.id)}</h1>",
        f'<p class="verdict {report.verdict.state}">{_text(str(report.verdict))}</p>',
        *(_figures(report.measurement) if report.measurement else ()),
        *_pictures(report, others),
        *(_matrices(report.measurement) if report.measurement else ()),
        *_others(report.others),
        *(_worst(report.measurement) if report.measurement else ()),
        *_origin(report),
    ]
    head = f'<meta charset="utf-8"><title>{_text(report.id)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def write_report(folder: Path, report: Report, others: Sequence[Judged]) -> Path:
    """NAME.html and NAME.json. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    name = report.id.replace(":", "-").replace("/", "-")
    (folder / f"{name}.json").write_bytes(as_json(report))
    page = folder / f"{name}.html"
    page.write_text(as_html(report, others), encoding="utf-8")
    return page


def _bits(one: Judged) -> float:
    return -one.variant.manifest.bits_per_weight


def _row(one: Judged) -> Row:
    found, manifest = one.measurement, one.variant.manifest
    return Row(
        variant=one.name,
        state=one.verdict.state,
        reasons=one.verdict.reasons,
        bits_per_weight=manifest.bits_per_weight,
        bytes=manifest.bytes,
        kl=found.kl.mean if found else None,
        top1=found.top1 if found else None,
    )


# -- HTML ---------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _cell(value: object) -> str:
    numeric = str(value)[:1].isdigit() or str(value)[:1] in "+-"
    return f'<td class="n">{_text(value)}</td>' if numeric else f"<td>{_text(value)}</td>"


def _figures(found: Measurement) -> Iterator[str]:
    about = found.reference
    yield "<h2>Distance from the source</h2>"
    yield (
        f"<p>{about.texts} texts, {about.tokens:,} tokens scored: {_text(about.about)}. Reference: "
        f"{_text(about.engine)}, its {about.kept} most probable tokens and the rest. "
        f"{'' if found.complete else 'Cut short: the errors are larger than wanted. '}"
        "± is one standard error over texts, paired with the source.</p>"
    )
    yield _table(("figure", "value"), list(_distances(found)))
    yield "<h2>On this machine</h2>"
    yield _table(("figure", "value"), list(_costs(found)))


def _distances(found: Measurement) -> Iterator[tuple[str, object]]:
    kl = found.kl
    yield "KL divergence, mean (nats per token)", kl.mean
    yield "its part that the rest hides (estimate)", kl.tail
    for name, value in (("median", kl.median), ("90 %", kl.p90), ("99 %", kl.p99), ("99.9 %", kl.p999)):
        yield f"KL divergence, {name}", value
    yield "KL divergence, largest", f"{kl.max:.4f}"
    yield "top-1 agreement", found.top1.percent
    yield "top-5 overlap", found.top5.percent
    yield "change of ln perplexity", found.ln_ppl_change
    yield "perplexity ratio", found.ppl_ratio
    for one in found.perplexities:
        origin = f"text {one.corpus[:8]}, tokenizer {one.tokenizer[:8]}"
        label = f"{one.name} ({one.cut}; {one.tokens:,} tokens; {origin})"
        paired = "" if one.ln_change is None else f"; change of ln {one.ln_change} (paired)"
        yield label, f"{one.value:.3f} ± {one.error:.3f}, source {one.source:.3f}{paired}"
    if greedy := found.greedy:
        first = greedy.median_first_difference
        others = "" if first is None else f"; the others differ after {first:g} tokens (median)"
        yield "greedy answers that are the source's", f"{greedy.same} of {greedy.answers}{others}"
    if health := found.health:
        yield "greedy answers that end in a loop", f"{health.loops:.0%} (source: {health.source_loops:.0%})"
    if forms := found.structured:
        yield (
            "valid answers without a grammar",
            f"JSON {forms.json:.0%} (source: {forms.source_json:.0%}), "
            f"calls {forms.calls:.0%} (source: {forms.source_calls:.0%}), of {forms.answers} each",
        )
    yield "NaN or infinity", "none" if found.finite else "yes"


def _costs(found: Measurement) -> Iterator[tuple[str, object]]:
    yield "bits per weight", f"{found.bits_per_weight:.2f}"
    yield "bytes", f"{found.bytes:,}"
    if speed := found.speed:
        yield "resident memory", f"{speed.memory_bytes / 1e6:,.0f} MB"
        yield "load", f"{speed.load_s:.2f} s"
        yield (
            "prompt tokens per second, 1 and 8 requests",
            f"{speed.prefill_1:,.0f} and {speed.prefill_8:,.0f}",
        )
        yield "answer tokens per second, 1 and 8 requests", f"{speed.decode_1:,.0f} and {speed.decode_8:,.0f}"
    yield "backend, context", f"{found.backend}, {found.context:,} tokens"
    yield "machine", found.machine


def _pictures(report: Report, others: Sequence[Judged]) -> Iterator[str]:
    try:
        from quant.measure.pictures import Point, against_bits, by_block, distribution
    except ModuleNotFoundError:
        return
    points = [Point(one.name, one.measurement, one.verdict.state) for one in others if one.measurement]
    try:
        if points:
            yield "<h2>All variants of the source</h2>"
            yield _picture(
                "KL divergence against bits", *(against_bits(points, report.gate, t) for t in THEMES)
            )
        if (found := report.measurement) is None:
            return
        if found.blocks:
            yield "<h2>Block by block</h2>"
            yield _picture("error behind each block", *(by_block(found, theme) for theme in THEMES))
        yield "<h2>Token by token</h2>"
        yield _picture("distribution of the divergence", *(distribution(found, theme) for theme in THEMES))
    except ModuleNotFoundError as error:
        yield f"<p>Pictures need {_text(error.name)}, which is not installed.</p>"


THEMES: tuple[Any, Any] = ("light", "dark")


def _picture(label: str, light: bytes, dark: bytes) -> str:
    sources = [f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}" for data in (light, dark)]
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img alt="{_text(label)}" src="{sources[0]}"></picture>'
    )


def _others(rows: Sequence[Row]) -> Iterator[str]:
    head = ("variant", "state", "bits/weight", "MB", "mean KL", "top-1", "why")
    yield _table(
        head,
        [
            (
                row.variant,
                row.state,
                f"{row.bits_per_weight:.2f}",
                f"{row.bytes / 1e6:,.1f}",
                row.kl or "",
                row.top1.percent if row.top1 else "",
                "; ".join(row.reasons),
            )
            for row in rows
        ],
    )


def _matrices(found: Measurement) -> Iterator[str]:
    if (rounding := found.rounding) is None:
        return
    yield "<h2>Matrix by matrix</h2>"
    yield (
        f"<p>{rounding.matrices} matrices beside the source's; the worst. Distances are shares of a matrix's "
        "length; the ratio is that of their squares: about 1 where a matrix is the source's, rounded.</p>"
    )
    rows = [
        (one.name, f"{one.error:.4f}", f"{one.expected:.4f}", f"{one.times:.2f}", f"{one.row_times:.2f}")
        for one in rounding.worst
    ]
    yield _table(("matrix", "distance", "of rounding alone", "ratio", "of the worst row"), rows)


def _worst(found: Measurement) -> Iterator[str]:
    if not found.worst:
        return
    yield "<h2>The prompts that suffer most</h2>"
    rows = [(f"{one.kl:.4f}", one.prompt, one.source, one.variant) for one in found.worst]
    yield _table(("mean KL", "prompt", "source, greedy", "variant, greedy"), rows)


def _origin(report: Report) -> Iterator[str]:
    yield "<h2>What it is</h2>"
    measured = report.measurement.versions if report.measurement else {}
    rows = [
        ("key", report.key),
        ("source", f"{report.source.id} ({report.source.digest})"),
        ("recipe", msgspec.json.encode(report.recipe).decode()),
        ("recipe's digest", report.recipe_digest),
        ("format", report.format),
        ("built by", f"builder {report.builder.version}, {_versions(report.builder.packages)}"),
        ("measured with", _versions(measured)),
        ("gate", msgspec.json.encode(asdict(report.gate)).decode()),
    ]
    yield _table(("", ""), rows)
    yield _table(("file", "bytes", "sha256"), [(f.path, f"{f.size:,}", f.sha256) for f in report.files])
    yield f"<p>Again: <code>{_text(report.command)}</code></p>"


def _versions(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
