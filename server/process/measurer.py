"""`python -m server.process.measurer`: one variant is measured in a process of its own, which starts engines.

It ends with its parent, says how far it is in a progress file, and leaves measurement.json in the variant.
"""

import argparse
import asyncio
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from quant.errors import BadSource, BuildFailed
from quant.measure.measurement import Block, Measurement, Rounding, write_measurement
from quant.source import Source, open_source
from quant.store import Variant, VariantStore
from server.process.builder import Reporter, guarded, take_stdout
from server.process.child import die_with
from server.process.measuring import Measuring
from server.process.orders import MeasureOrder
from server.process.reference import ReferenceMaker
from server.process.reports import BuildAnswer, Problem


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    answers = take_stdout()
    die_with(options.parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reporter = Reporter(options.progress)
    done = guarded(lambda: asyncio.run(measure(options.order, reporter)), BuildFailed.code, "the measurement")
    problem = done if isinstance(done, Problem) else None
    reporter.end(problem)
    key = options.order.key
    answer = BuildAnswer(error=problem) if problem else BuildAnswer(outcome="measured", key=key)
    os.write(answers, msgspec.json.encode(answer) + b"\n")
    return 1 if problem else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.process.measurer", description=__doc__)
    parser.add_argument("--order", type=partial(msgspec.json.decode, type=MeasureOrder), required=True)
    parser.add_argument("--progress", type=Path, required=True, help="file to keep replacing")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process does")
    return parser.parse_args(arguments)


async def measure(order: MeasureOrder, reporter: Reporter) -> Measurement:
    """Raises QuantError, ServerError."""
    store = VariantStore(Path(order.cache))
    source = open_source(
        order.source, cache=store.cache, revision=order.revision, progress=reporter.progress, local_only=True
    )
    with store.use(order.key) as variant:
        async with ReferenceMaker(order, source, store) as maker:
            measuring = Measuring(
                order=order,
                source=source,
                variant=variant,
                maker=maker,
                report=reporter.progress,
                blocks=partial(_blocks, order, maker.files, variant),
                compared=partial(compared, source, maker.files, variant),
                strange=partial(strangers, source, maker.files, variant),
            )
            found = await measuring.run(partial(write_measurement, variant.path))
        write_measurement(variant.path, found)
    return found


def _blocks(order: MeasureOrder, source: Path, variant: Variant, tokens: Sequence[int]) -> tuple[Block, ...]:
    """None where torch is missing, which one of the two is read with."""
    from quant.measure.blocks import block_errors

    with suppress(ModuleNotFoundError):
        return block_errors(source, variant.path, tokens, order.threads)
    return ()


def strangers(source: Source, reference: Path, variant: Variant) -> tuple[str, ...]:
    """What beside the weights is not the source's; nothing where the source cannot be read so."""
    from quant.measure.beside import strange

    with suppress(BadSource):
        return strange(source, reference, variant.path)
    return ()


def compared(source: Source, reference: Path, variant: Variant) -> Rounding | None:
    """`reference`: what `source` was read as. None where the two cannot be held side by side."""
    from quant.measure.rounding import gguf_pairs, rounding_of

    model, base = variant.path / "model.gguf", reference / "model.gguf"
    with suppress(ModuleNotFoundError, BadSource):
        if model.is_file():
            base = base if base.is_file() else reference
            return rounding_of(gguf_pairs(base, model)) if base.is_file() else None
        from quant.measure.unfolded import torch_pairs

        method = str(variant.manifest.recipe.body.get("method"))
        return rounding_of(torch_pairs(source.path, variant.path, method)) if source.kind == "hf" else None
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
