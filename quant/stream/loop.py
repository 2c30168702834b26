"""The loop over the blocks: what is done already is not done again, and what is done is on the disk."""

import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quant.block import DecoderBlock
from quant.errors import BuildFailed
from quant.journal import Journal
from quant.methods.base import BlockResult, LayerRecord, Method
from quant.methods.registry import load_method
from quant.progress import Detail, Progress, Report
from quant.store import Build
from quant.stream import machine
from quant.stream.activations import Chain, DiskChain, Hidden, MemoryChain, Place
from quant.stream.blocks import Workshop
from quant.tensors import read_file, read_rows, read_tensors, write_file
from quant.torch_plan import BATCH_TOKENS, TorchPlan
from quant.torch_recipe import TorchRecipe

HALF_LIMIT = 30_000.0  # float16 ends at 65,504: hidden states above this are told of


class Order(Protocol):
    """What the loop needs to know of the build."""

    @property
    def recipe(self) -> TorchRecipe: ...
    @property
    def place(self) -> Build: ...
    @property
    def report(self) -> Report: ...


class Loop:
    def __init__(
        self, order: Order, plan: TorchPlan, workshop: Workshop, journal: Journal, tokens: Tensor | None
    ) -> None:
        self.notes: list[str] = []
        self._order = order
        self._plan = plan
        self._shop = workshop
        self._journal = journal
        self._tokens = tokens
        self._blocks = plan.layout.blocks
        self._modules = 0  # that are quantized
        self._began, self._here = time.monotonic(), 0  # blocks that this process has done
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._largest = 0.0

    def run(self) -> None:
        """Every block's file is in scratch when it returns."""
        left = [index for index in range(len(self._blocks)) if not self._has(index)]
        done = self._shop.schemes.keys() - {name for index in left for name in self._names(index)}
        self._modules = len(done)
        if not left:
            return
        self.file(0).parent.mkdir(exist_ok=True)
        machine.give_back_memory()
        method = load_method(self._order.recipe.method)
        with ExitStack() as stack:
            if self._shop.device.type == "cuda":
                self._reader = stack.enter_context(ThreadPoolExecutor(1, "reader"))
            if method.calibrated:
                self._calibrated(method, left)
            else:
                for index in left:
                    self._quantize(index, method, None)
                    machine.give_back_memory()

    def file(self, index: int) -> Path:
        return self._order.place.scratch / "blocks" / f"{index}.safetensors"

    def records(self) -> list[dict[str, Any]]:
        """How every quantized module went, in the order of computation."""
        return [record for index in range(len(self._blocks)) for record in self._facts(index)["records"]]

    def costs(self) -> list[dict[str, Any]]:
        """What every block cost, whichever process did it."""
        return [{"block": index, **self._facts(index)["costs"]} for index in range(len(self._blocks))]

    # -- with activations ---------------------------------------------------------------------------

    def _calibrated(self, method: Method, left: list[int]) -> None:
        chain = self._chain()
        first = chain.resume()
        if first is None or first > left[0]:
            chain.begin(self._embedded())
            first = 0
        for index in range(first, len(self._blocks)):
            if self._has(index):
                tensors = read_file(self.file(index))
            else:
                tensors = self._quantize(index, method, chain.inputs())
            if index < left[-1]:
                self._advance(chain, self._shop.unpack(index, self._blocks[index], tensors))
            machine.give_back_memory()
        self._warn()

    @torch.no_grad()
    def _advance(self, chain: Chain, block: DecoderBlock) -> None:
        def through(hidden: Tensor) -> Tensor:
            output = block(hidden)
            self._largest = max(self._largest, float(output.abs().max()))
            return output

        chain.advance(through)

    def _chain(self) -> Chain:
        place = self._place()
        home = machine.home_of(place.bytes, self._shop.device)
        if home is not None:
            return MemoryChain(place, home)
        folder = self._order.place.scratch / "activations"
        return DiskChain(folder, self._journal, place, len(self._blocks))

    def _place(self) -> Place:
        assert self._tokens is not None
        samples, length = self._tokens.shape
        device = self._shop.device
        return Place(
            shape=(samples, length, self._plan.layout.hidden),
            batch=max(1, BATCH_TOKENS[device.type] // length),
            dtype=self._shop.computed,
            device=device,
        )

    def _embedded(self) -> Iterator[Tensor]:
        """Inputs of block 0; rows of the embedding are read as they are needed."""
        assert self._tokens is not None
        place = self._place()
        scale = torch.tensor(self._shop.decoder.embedding_scale, dtype=place.dtype, device=place.device)
        for batch in torch.split(self._tokens, place.batch):
            ids, where = torch.unique(batch, return_inverse=True)
            rows = read_rows(self._plan.layout.embedding, ids.tolist())
            yield rows[where].to(place.device, place.dtype) * scale

    def _warn(self) -> None:
        half = self._shop.format.scale_dtype(self._shop.stored) is torch.float16
        if half and self._shop.stored is torch.bfloat16 and self._largest > HALF_LIMIT:
            self.notes.append(
                f"hidden states reach {self._largest:,.0f}: readers that compute in float16 may overflow"
            )

    # -- one block ----------------------------------------------------------------------------------

    def _quantize(self, index: int, method: Method, inputs: Hidden | None) -> dict[str, Tensor]:
        """The tensors of the finished block, which are in its file and in the journal."""
        began, records = time.monotonic(), list[LayerRecord]()
        infos = self._blocks[index]
        block = self._shop.make(index, self._read(index))
        result = self._applied(method, block, inputs, records)
        tensors = self._shop.pack(block, result, infos)
        del block, result
        write_file(self.file(index), tensors)
        size, memory = self.file(index).stat().st_size, machine.peak_memory(self._shop.device)
        seconds = round(time.monotonic() - began, 3)
        costs = {"seconds": seconds, "bytes": size, "memory_bytes": memory}
        facts = {"records": [asdict(record) for record in records], "costs": costs}
        self._journal.add(f"block.{index}", self.file(index), facts)
        self._here += 1
        self._tell(Detail(bytes=size, memory_bytes=memory, eta_s=self._eta()))
        return tensors

    def _applied(
        self, method: Method, block: DecoderBlock, inputs: Hidden | None, records: list[LayerRecord]
    ) -> BlockResult:
        def done(record: LayerRecord) -> None:
            if not math.isfinite(record.loss or 0.0):
                raise BuildFailed(f"{record.module}: the error of its output is not finite")
            records.append(record)
            self._modules += 1
            self._tell(Detail(**asdict(record)))

        plans = self._shop.plans(block)
        if not plans:
            return BlockResult(layers={})
        result = method.quantize(block, inputs, plans, dict(self._order.recipe.options), done)
        assert result.layers.keys() == plans.keys(), f"{method.name} left out a module of {block.name}"
        return result

    def _read(self, index: int) -> dict[str, Tensor]:
        """The source's tensors; on GPUs the next block's are read meanwhile."""
        ahead = self._ahead.pop(index, None)
        tensors = ahead.result() if ahead else read_tensors(self._blocks[index], finite=True)
        if self._reader and index + 1 < len(self._blocks) and not self._has(index + 1):
            self._ahead[index + 1] = self._reader.submit(read_tensors, self._blocks[index + 1], finite=True)
        return tensors

    def _tell(self, detail: Detail) -> None:
        done, total = self._modules, len(self._shop.schemes)
        self._order.report(Progress("quantize", min(done, total), total, "modules", detail))

    def _eta(self) -> float:
        left = sum(not self._has(index) for index in range(len(self._blocks)))
        return round((time.monotonic() - self._began) / self._here * left, 1)

    def _has(self, index: int) -> bool:
        return self._journal.has(f"block.{index}")

    def _facts(self, index: int) -> Mapping[str, Any]:
        return self._journal.facts(f"block.{index}")

    def _names(self, index: int) -> list[str]:
        family = self._plan.layout.family
        return [f"{family.block_name(index)}.{name}" for name in family.linears]
