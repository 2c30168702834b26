"""`python -m benchmarks.samples`: whether standard errors are as large as they say, on a real model.

One variant is measured on many texts, which are then cut into disjoint samples. If the errors are right, the
samples' means lie within two of them of the pooled mean nearly always, and spread about as far as they say.
"""

import argparse
import asyncio
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quant.measure.estimate import Estimate, Values, mean_divergence
from quant.pipeline import build_variant
from quant.progress import ignore
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore
from server.process.measuring import Measuring
from server.process.orders import MeasureOrder
from server.process.reference import ReferenceMaker

WITHIN, ALLOWED = 2.0, (0.6, 1.5)  # errors; ratio of the spread of means to the stated error


def samples_of(texts: Sequence[Values], count: int) -> list[Estimate]:
    """Of each sample, from the tokens of its texts."""
    size = len(texts) // count
    return [mean_divergence(texts[at * size : (at + 1) * size]) for at in range(count)]


def judged(samples: Sequence[Estimate]) -> tuple[float, int, float]:
    """(pooled mean, samples within two errors of it, spread of the means over the stated error)."""
    pooled = float(np.mean([one.value for one in samples]))
    near = sum(abs(one.value - pooled) <= WITHIN * one.error for one in samples)
    stated = math.sqrt(float(np.mean([one.error**2 for one in samples])))
    return pooled, near, float(np.std([one.value for one in samples], ddof=1)) / stated


async def divergences(arguments: argparse.Namespace) -> list[Values]:
    """Token by token, of each text."""
    store = VariantStore(arguments.cache)
    source = open_source(str(arguments.model.absolute()), cache=arguments.cache)
    built = build_variant(source, parse_recipe(arguments.variant), store, progress=ignore).variant
    order = MeasureOrder(
        cache=str(arguments.cache),
        source=str(arguments.model.absolute()),
        key=built.key,
        backend="llama",
        context=arguments.context,
        threads=arguments.threads,
        texts=arguments.samples * arguments.texts,
        quick=True,
    )
    async with ReferenceMaker(order, source, store) as maker:
        measuring = Measuring(
            order=order,
            source=source,
            variant=built,
            maker=maker,
            report=ignore,
            blocks=lambda _: (),
            compared=lambda: None,
        )
        await measuring.run(lambda _: None)
    return [chunk for part in measuring.parts for chunk in part.divergence]


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samples", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-chat"))
    parser.add_argument("--variant", default="q4_k_m")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--texts", type=int, default=16, help="in each sample")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(words)
    samples = samples_of(asyncio.run(divergences(arguments)), arguments.samples)
    pooled, near, ratio = judged(samples)
    print("\n".join(str(one) for one in samples))
    print(f"pooled mean {pooled:.4f}; {near} of {len(samples)} within {WITHIN:g} errors of it")
    print(f"spread of the means {ratio:.2f} times the stated error")
    return 0 if near >= 0.85 * len(samples) and ALLOWED[0] <= ratio <= ALLOWED[1] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
