"""From a checkpoint to a variant of a torch format, with one decoder block in memory.

Block by block (quant.stream.loop): read it, quantize it, pack it, write it to scratch, note it in the
journal, and let the hidden states go on through what was written. A killed build loses the block it was at.
The end puts the pieces together. Everything but build.json follows from the source, the recipe and what
`_start` names.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.block import Decoder
from quant.building import Road, versions
from quant.calibrate import calibration_tokens, open_tokenizer
from quant.canonical import canonical_digest
from quant.checkpoint import CONFIG
from quant.errors import BadRecipe, BadSource, BuildFailed
from quant.formats.registry import load as load_format
from quant.journal import Journal
from quant.layout import Layout
from quant.methods.gptq import STARVED
from quant.plan import builder_version
from quant.progress import Detail, Progress
from quant.safetensors_header import TensorInfo, read_header
from quant.store import Variant
from quant.stream import machine
from quant.stream.blocks import Workshop
from quant.stream.loop import Loop
from quant.stream.shards import write_shards
from quant.tensors import DTYPES, read_file, require_finite_in_file
from quant.texts import Words, companion_files, read_words, text_files, write_texts
from quant.torch_plan import TorchPlan, plan_torch
from quant.torch_recipe import TorchRecipe

REPORT = "quantization.json"
PACKAGES = ("torch", "transformers")


@dataclass(kw_only=True)
class TorchRoad(Road):
    """Raises BadSource, BadRecipe, DiskFull, BuildFailed."""

    recipe: TorchRecipe
    threads: int | None = None
    device: str = "auto"
    tokens: Tensor | None = None  # int64 [samples, length] instead of the text that the recipe names

    def build(self) -> Variant:
        on = machine.choose_device(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        plan = plan_torch(self.source, self.recipe, on.type)
        with self.stage("check", "files"):
            workshop = self._workshop(plan, on)
        tokens = self._text(plan, on)
        restarted = self._start(on, tokens)
        journal = Journal(self.place.scratch)
        resumed = bool(journal)
        with self.stage("quantize", "modules"):
            loop = Loop(self, plan, workshop, journal, tokens)
            loop.run()
        with self.stage("assemble", "bytes"):
            bits = self._assemble(plan, workshop, loop)
        notes = [*([plan.text.note] if plan.text and plan.text.note else []), *loop.notes]
        notes += _starved(loop.records())
        facts = {"resumed": resumed, "restarted": restarted, "device": on.type, "notes": notes}
        return self.publish(bits, versions(*PACKAGES), blocks=loop.costs(), **facts)

    def _workshop(self, plan: TorchPlan, on: torch.device) -> Workshop:
        """Judge all that can be judged before anything is written."""
        decoder = Decoder(self.source.architecture, self.source.config)
        _check_shapes(decoder, plan)
        open_tokenizer(self.source)
        self._words(plan)
        form = load_format(self.recipe.format)
        for one in plan.modules:
            if not one.kept and (why := form.refuse(one.shape, one.scheme)):
                raise BadRecipe(f"{one.module}: {why}")
        for info in (*plan.layout.before, *plan.layout.after):
            require_finite_in_file(info)
        stored = DTYPES[plan.layout.dtype]
        return Workshop(
            decoder=decoder,
            format=form,
            schemes=plan.schemes,
            stored=stored,
            computed=machine.compute_dtype(stored, on),
            device=on,
        )

    def _text(self, plan: TorchPlan, on: torch.device) -> Tensor | None:
        if plan.text is None or self.tokens is not None:
            return self.tokens
        with self.stage("calibrate", "steps"):
            if plan.text.note:
                self.report(Progress("calibrate", 0, 1, "steps", Detail(note=plan.text.note)))
            rows, cache = plan.layout.embedding.shape[0], self.place.store.cache
            try:
                return calibration_tokens(
                    self.source, plan.text, rows, cache=cache, device=on, report=self.report
                )
            except BuildFailed:  # weights that are no numbers: they are named
                for info in plan.layout.tensors:
                    require_finite_in_file(info)
                raise

    def _start(self, on: torch.device, tokens: Tensor | None) -> str | None:
        """Make the scratch folder ready; why what lay there was thrown away, if anything did."""
        identity = {
            "source": self.source.digest,
            "recipe": self.recipe.digest,
            "calibration text": "" if tokens is None else canonical_digest(tokens.tolist()),
            "builder": str(builder_version(self.recipe)),
            "device": on.type,
            "threads": str(torch.get_num_threads()),
            **versions(*PACKAGES),
        }
        scratch = self.place.scratch
        why = machine.difference(scratch, identity)
        if why is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            self.report(Progress("quantize", 0, 1, "modules", Detail(note=f"starting afresh: {why}")))
        self.place.start()
        if not (scratch / machine.IDENTITY).exists():
            machine.write_identity(scratch, identity)
        return why

    def _assemble(self, plan: TorchPlan, workshop: Workshop, loop: Loop) -> float:
        """Everything that the variant has, in `out`; bits a weight."""
        layout = plan.layout
        pieces = [info for n in range(len(layout.blocks)) for info in read_header(loop.file(n))]
        tensors = [*layout.before, *pieces, *layout.after]
        out = self.place.out
        write_shards(tensors, out, lambda done, all: self.report(Progress("assemble", done, all, "bytes")))
        sample = workshop.sample(0, layout.blocks[0], read_file(loop.file(0)))
        kept = tuple(one.module for one in plan.modules if one.kept)
        config = workshop.format.config(plan.schemes, (*kept, *_routers(layout), layout.family.head), sample)
        files = {
            CONFIG: as_json({**self.source.config, "quantization_config": config}),
            REPORT: as_json({"text": plan.text and plan.text.said, "modules": loop.records()}),
            **companion_files(self.source),
            **text_files(self.source, self._words(plan)),
        }
        if self.recipe.format == "gptq":  # where readers of old look
            files["quantize_config.json"] = as_json(config)
        write_texts(files, out)
        return bits_per_weight(tensors, layout.elements)

    def _words(self, plan: TorchPlan) -> Words:
        return read_words(self.source, plan.layout.embedding.shape[0], plan.layout.context)


def _starved(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line about the experts that the calibration text did not reach often enough, if there are some."""
    found = [record["module"] for record in records if (record["fallback"] or "").startswith(STARVED)]
    if not found:
        return []
    return [f"{len(found)} linears of starved experts are rounded to nearest: {', '.join(found)}"]


def _routers(layout: Layout) -> tuple[str, ...]:
    """Kept as they are; named for readers that take them for linears."""
    experts, blocks = layout.family.experts, range(len(layout.blocks))
    return tuple(f"{layout.family.block_name(n)}.{experts.router}" for n in blocks) if experts else ()


def bits_per_weight(tensors: Sequence[TensorInfo], elements: int) -> float:
    return 8 * sum(info.end - info.start for info in tensors) / elements


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _check_shapes(decoder: Decoder, plan: TorchPlan) -> None:
    """By transformers' own word for the config."""
    implied = decoder.shapes()
    for name, info in plan.layout.blocks[0].items():
        if name not in implied:
            raise BadSource(f"{info.said} has no place in this architecture")
        if implied[name] != info.shape:
            have, wanted = list(info.shape), list(implied[name])
            raise BadSource(f"{info.said} has shape {have}, but config.json implies {wanted}")
    if missing := sorted(implied.keys() - plan.layout.blocks[0].keys()):
        raise BadSource(f"the checkpoint has no tensor {plan.layout.family.block_name(0)}.{missing[0]}")
