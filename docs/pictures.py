"""The pictures of docs/quantization.md, drawn from docs/figures/quality.json and the package's own tables.

`python -m benchmarks.quality ... --json docs/figures/quality.json` measures; `make docs` draws. Colours and
backgrounds are such that pages may be light or dark.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from quant.codebooks import codebook

FIGURES = Path(__file__).resolve().parent / "figures"
PROSE, OWN = "prose-eval.txt", "self-generated"
METHODS = ("rtn", "awq", "gptq", "awq+gptq", "best")
GREY, COLOURS = "#808890", ("#3b82c4", "#d9822b", "#3fa66b", "#c0504d")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quantization",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "grid.alpha": 0.35,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), GREY
    ),
    "legend.frameon": False,
}


def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIGURES / "quality.json").read_text())
    return found


def main() -> None:
    plt.rcParams.update(STYLE)
    methods(figures())
    sizes(figures())
    layers(figures())
    grids()


@contextmanager
def picture(name: str, title: str, *, height: float = 2.8) -> Iterator[Axes]:
    figure, axes = plt.subplots(figsize=(6.4, height), layout="constrained")
    axes.set_title(title, loc="left")
    yield axes
    figure.savefig(FIGURES / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def methods(every: dict[str, Any]) -> None:
    """One row a method, one colour a model and text."""
    title = "Distance from the source, 4 bits, groups of 128 (less is better)"
    with picture("methods", title, height=3.2) as axes:
        series = [(model, text) for model in every for text in (PROSE, OWN)]
        for place, (model, text) in enumerate(series):
            measured = [n for n, method in enumerate(METHODS) if method in every[model]]
            found = np.array([every[model][METHODS[n]][text]["kl"] for n in measured])
            at = np.array(measured) + (place - (len(series) - 1) / 2) * 0.16
            label = f"{model}, {text}"
            axes.errorbar(found[:, 0], at, xerr=found[:, 1], fmt="o", ms=4, color=COLOURS[place], label=label)
        axes.set_yticks(range(len(METHODS)), METHODS)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("mean KL divergence, nats a token (bars: one standard error)")
        axes.grid(axis="x")
        axes.legend(loc="lower right", fontsize=8)


def sizes(every: dict[str, Any], model: str = "chat-34m") -> None:
    with picture("sizes", f"Size against distance from the source: {model}, {PROSE}", height=3.6) as axes:
        for name, one in every[model].items():
            bits, (kl, _) = one["bits_per_weight"], one[PROSE]["kl"]
            gguf = bool(one.get("gguf"))
            axes.plot(bits, kl, "s" if gguf else "o", ms=5, color=COLOURS[1 if gguf else 0])
            axes.annotate(name, (bits, kl), xytext=(5, 2), textcoords="offset points", fontsize=7.5)
        axes.set_yscale("log")
        axes.set_xlabel("bits a weight, of all weights in the file (embedding and head included)")
        axes.set_ylabel("mean KL divergence, nats a token")
        axes.plot([], [], "o", color=COLOURS[0], label="torch formats (embedding kept in 16 bits)")
        axes.plot([], [], "s", color=COLOURS[1], label="GGUF")
        axes.grid()
        axes.legend(fontsize=8)


def layers(every: dict[str, Any], model: str = "tiny-chat") -> None:
    """By kind of linear layer: the mean over the blocks."""
    shown = [name for name in ("awq", "gptq", "awq+gptq") if "layers" in every[model].get(name, {})]
    title = f"Error of a layer's output, round-to-nearest = 1: {model}, calibration text"
    with picture("layers", title) as axes:
        kinds = list(every[model][shown[0]]["layers"])
        for place, name in enumerate(shown):
            at = np.arange(len(kinds)) + (place - (len(shown) - 1) / 2) * 0.26
            values = [every[model][name]["layers"][kind] for kind in kinds]
            axes.bar(at, values, width=0.24, color=COLOURS[place], label=name)
        axes.set_xticks(range(len(kinds)), [kind.rpartition(".")[2].removesuffix("_proj") for kind in kinds])
        axes.set_xlabel("linear layer")
        axes.set_ylabel("squared error, relative")
        axes.axhline(1.0, color=GREY, lw=0.8)
        axes.legend(ncols=3, fontsize=8)


def grids() -> None:
    """What 16 codes stand for."""
    low, high = -0.6, 1.0  # a lopsided group
    rows = {
        "symmetric": np.arange(-8, 8) / 7.5,
        "asymmetric": (np.arange(16) - round(-low / (high - low) * 15)) * (high - low) / 15,
        "nf4": codebook("nf4").numpy(),
        "fp4": codebook("fp4").numpy(),
    }
    with picture("grids", "What the 16 codes of 4 bits stand for", height=2.4) as axes:
        for place, values in enumerate(rows.values()):
            axes.plot(values, [place] * len(values), "|", ms=15, mew=1.6, color=COLOURS[place])
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("weight / largest |weight| of the group (asymmetric: of a group from -0.6 to 1)")
        axes.grid(axis="x")


if __name__ == "__main__":
    main()
