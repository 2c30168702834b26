"""Pictures of measurements, as SVG, for light and dark pages. matplotlib is imported when one is made."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quant.measure.gate import Gate, State
from quant.measure.measurement import Measurement

Theme = Literal["light", "dark"]
INK = {"light": "#1f2328", "dark": "#e6edf3"}
GRID = {"light": "#d0d7de", "dark": "#3d444d"}
COLOURS: dict[Theme, dict[State, str]] = {
    "light": {"passed": "#1a7f37", "degraded": "#9a6700", "rejected": "#cf222e", "unmeasured": "#656d76"},
    "dark": {"passed": "#3fb950", "degraded": "#d29922", "rejected": "#ff7b72", "unmeasured": "#9198a1"},
}
MARKERS: dict[State, str] = {"passed": "o", "degraded": "s", "rejected": "X", "unmeasured": "."}
LEAST = 1e-6  # nats: a smaller divergence is drawn there


@dataclass(frozen=True, slots=True)
class Point:
    """One variant in the picture of all."""

    name: str
    measurement: Measurement
    state: State


def against_bits(points: Sequence[Point], gate: Gate, theme: Theme) -> bytes:
    """Mean KL divergence against bits per weight, with the gate."""

    def draw(axes: Any) -> None:
        for point in points:
            kl, bits = point.measurement.kl.mean, point.measurement.bits_per_weight
            value = max(kl.value, LEAST)
            axes.errorbar(
                bits,
                value,
                yerr=[[min(2 * kl.error, 0.9 * value)], [2 * kl.error]],
                fmt=MARKERS[point.state],
                color=COLOURS[theme][point.state],
                capsize=2,
                markersize=6,
            )
            axes.annotate(
                point.name, (bits, value), (5, 4), textcoords="offset points", fontsize=8, color=INK[theme]
            )
        if gate.max_kl is not None:
            colour = COLOURS[theme]["rejected"]
            axes.axhline(gate.max_kl, color=colour, linestyle="--", linewidth=1)
            label = f"gate: mean KL <= {gate.max_kl:g}"
            axes.annotate(
                label, (0.99, gate.max_kl), (0, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", fontsize=8, color=colour,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.margins(x=0.12)
        axes.set_xlabel("bits per weight (of the whole file)")
        axes.set_ylabel("mean KL divergence from the source\n(nats per token, ± 2 standard errors)")

    return _svg(draw, theme)


def by_block(measurement: Measurement, theme: Theme) -> bytes:
    """The error of the stream behind each decoder block; blocks with fallbacks are marked."""

    def draw(axes: Any) -> None:
        blocks = measurement.blocks
        numbers = [block.block for block in blocks]
        axes.bar(
            numbers, [max(block.added, 0.0) for block in blocks], color=COLOURS[theme]["unmeasured"],
            alpha=0.6, label="added by the block",
        )  # fmt: skip
        axes.plot(
            numbers, [block.error for block in blocks], marker="o", markersize=4,
            color=COLOURS[theme]["passed"], label="behind the block",
        )  # fmt: skip
        if fallen := [block for block in blocks if block.fallbacks]:
            axes.plot(
                [block.block for block in fallen], [block.error for block in fallen], "^", markersize=8,
                color=COLOURS[theme]["degraded"], label="has linears that fell back",
            )  # fmt: skip
        axes.set_xlabel("decoder block")
        axes.set_ylabel("error of the residual stream\n(relative to its length, median over tokens)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, labelcolor=INK[theme], facecolor="none", edgecolor=GRID[theme])

    return _svg(draw, theme)


def distribution(measurement: Measurement, theme: Theme) -> bytes:
    """How the tokens' divergences are spread."""

    def draw(axes: Any) -> None:
        found = measurement.kl.histogram
        lows, highs = found.edges[:-1], found.edges[1:]
        widths = [10.0**high - 10.0**low for low, high in zip(lows, highs, strict=True)]
        total = sum(found.counts) or 1
        axes.bar(
            [10.0**low for low in lows], [count / total for count in found.counts], widths, align="edge",
            color=COLOURS[theme]["unmeasured"],
        )  # fmt: skip
        kl = measurement.kl
        for name, value in (("mean", kl.mean.value), ("median", kl.median.value), ("99 %", kl.p99.value)):
            axes.axvline(max(value, 10.0 ** lows[0]), color=INK[theme], linestyle=":", linewidth=1)
            axes.annotate(
                name, (max(value, 10.0 ** lows[0]), 1.0), (2, -9), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=8, color=INK[theme],
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("KL divergence of a token (nats)")
        axes.set_ylabel("share of tokens")

    return _svg(draw, theme)


def _svg(draw: Callable[[Any], None], theme: Theme) -> bytes:
    """The same figures give the same bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context({"svg.hashsalt": "quantserve", "svg.fonttype": "none", "font.family": "sans-serif"}):
        canvas = Canvas(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasSVG(canvas)
        axes: Any = canvas.add_subplot()
        draw(axes)
        axes.grid(True, color=GRID[theme], linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_facecolor("none")
        axes.tick_params(colors=INK[theme], which="both", labelsize=8)
        for spine in axes.spines.values():
            spine.set_color(GRID[theme])
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(INK[theme])
            label.set_fontsize(9)
        out = io.BytesIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()
