"""`python -m benchmarks.gpu.kernels`: each kernel on Llama-2-7B's shapes, and the fastest cuts.

Times are of graph replays over more weights than the second-level cache holds.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu import layers
from quant.scheme import Scheme
from server.backends.torch_.kernels import activations, attention, direct, linear, w8a8
from server.backends.torch_.kernels.packed import Packed, pack

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
LAYERS = 32
CACHE_BYTES = 256 * 2**20
DEVICE = torch.device("cuda")
Row = dict[str, object]


def timed(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Microseconds of one call, the median of some replays of all of them."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return float(statistics.median(times)) * 1000 / len(calls)


def copies(packed: Packed) -> list[Packed]:
    count = max(2, -(-CACHE_BYTES // packed.nbytes))
    return [replace(packed, words=packed.words.clone(), scales=packed.scales.clone()) for _ in range(count)]


def kinds(shape: tuple[int, int]) -> dict[str, Packed]:
    half = torch.float16
    return {
        "int4": pack(layers.affine(shape, Scheme(bits=4, symmetric=False), half, DEVICE)),
        "nf4": pack(layers.nf4(shape, 64, DEVICE)),
        "int8": pack(layers.affine(shape, Scheme(bits=8, group=None), half, DEVICE)),
    }


def sweep_linear(batches: Sequence[int], wide: bool) -> list[Row]:
    rows: list[Row] = []
    for shape_name, shape in SHAPES.items():
        for kind, packed in kinds(shape).items():
            several = copies(packed)
            for batch in batches:
                x = torch.randn(batch, shape[1], device=DEVICE).half()
                default = linear.chosen(packed, batch, linear.described(DEVICE))
                for cut in _plans(default, packed, batch, wide):
                    micros = timed([_call(x, item, cut) for item in several])
                    rows.append(
                        {
                            "shape": shape_name, "kind": kind, "batch": batch, "cut": _name(cut),
                            "us": round(micros, 2), "default": cut == default,
                        }
                    )  # fmt: skip
            del several
        rows += library(shape_name, shape, batches)
    return rows


Cut = linear.Plan | direct.Cut


def _name(cut: Cut) -> tuple[int, ...]:
    """Tiles, row warps, height, splits; or of the kernel for a few rows: tiles, spans ahead."""
    if isinstance(cut, direct.Cut):
        return cut.tiles, cut.ahead
    return cut.tiles, cut.row_warps, cut.height, cut.splits


EVERY = (
    (1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (2, 4, 1),
    (4, 4, 1), (4, 8, 1), (4, 4, 2), (8, 8, 1), (8, 4, 2), (8, 8, 2),
)  # fmt: skip


def _plans(default: Cut, packed: Packed, batch: int, wide: bool) -> list[Cut]:
    if not wide:
        return [default]
    found = dict.fromkeys([default, linear.plan(packed, batch, linear.described(DEVICE))])
    if batch <= direct.MOST_ROWS:
        found |= dict.fromkeys(cut for cut in direct.CUTS if batch <= 8 * cut.tiles < 2 * batch + 15)
    elif packed.bits == 4 and packed.book is None:
        for tiles, row_warps, height in EVERY:
            if batch <= 8 * tiles < 4 * batch or (tiles == 8 and batch > 64):
                some = [linear.Plan(tiles, row_warps, height, splits) for splits in (1, 2, 3, 4, 6, 8)]
                roomy = [item for item in some if item.partial_bytes(22016, batch) <= linear.PARTIAL_BYTES]
                found |= dict.fromkeys(roomy)
    return list(found)


def _call(x: Tensor, packed: Packed, cut: Cut) -> Callable[[], object]:
    def run() -> None:
        y = torch.empty(x.shape[0], packed.shape[0], dtype=torch.float32, device=DEVICE)
        linear.launch_chosen(x, packed, None, y, cut)

    return run


def library(shape_name: str, shape: tuple[int, int], batches: Sequence[int]) -> list[Row]:
    """fp16 through cuBLAS; int4 dequantized first; int8 times int8."""
    dense = [
        torch.randn(shape, device=DEVICE).half()
        for _ in range(max(2, CACHE_BYTES // (shape[0] * shape[1] * 2)))
    ]
    packed = kinds(shape)["int4"]
    signed = w8a8.sign(layers.affine(shape, Scheme(bits=8, group=None), torch.float16, DEVICE))
    rows: list[Row] = []
    for batch in batches:
        x = torch.randn(batch, shape[1], device=DEVICE).half()
        ways: dict[str, list[Callable[[], object]]] = {
            "fp16": [lambda weight=weight: functional.linear(x, weight) for weight in dense],  # type: ignore[misc]
            "fp16 to fp32": [lambda weight=weight: linear.wide_product(x, weight, None) for weight in dense],  # type: ignore[misc]
            "int4 dequantized": [lambda: linear.large(x, packed, None, True)] * 4,
            "w8a8": [lambda: w8a8.linear(x, signed, wide=True)] * 4,
        }
        for kind, calls in ways.items():
            rows.append(
                {
                    "shape": shape_name,
                    "kind": kind,
                    "batch": batch,
                    "us": round(timed(calls), 2),
                    "default": True,
                }
            )
    return rows


def sweep_attention() -> list[Row]:
    rows: list[Row] = []
    for kv_heads in (32, 8):
        for batch, length in ((1, 256), (1, 4096), (8, 512), (32, 256), (32, 2048), (128, 256), (128, 384)):
            pages = batch * length // 16
            caches = [
                torch.randn(2, pages, 16, kv_heads, 128, device=DEVICE).half()
                for _ in range(2 if batch > 8 else 6)
            ]
            q = torch.randn(batch, 32, 128, device=DEVICE).half()
            tables = torch.randperm(pages, device=DEVICE).view(batch, -1).int()
            wide = torch.nn.functional.pad(tables, (0, max(0, 256 - tables.shape[1])))
            lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
            for blocks in (4, 8, 16):
                attention.BLOCKS_PER_PROCESSOR = blocks
                calls = [
                    partial(attention.paged_decode, q, cache[0], cache[1], wide, lengths, 0.1)
                    for cache in caches * 3
                ]
                micros = timed(calls)
                tbs = caches[0].nbytes / micros / 1e6
                row: Row = {"kv_heads": kv_heads, "batch": batch, "length": length, "blocks": blocks}
                rows.append(row | {"us": round(micros, 2), "tbs": round(tbs, 3)})
            del caches
    attention.BLOCKS_PER_PROCESSOR = 4
    return rows


def sweep_others() -> list[Row]:
    rows: list[Row] = []
    for batch in (1, 32, 128):
        x, stream = torch.randn(batch, 4096, device=DEVICE).half(), torch.randn(batch, 4096, device=DEVICE)
        weight, out = torch.randn(4096, device=DEVICE).half(), torch.randn_like(stream)
        gate_up, qkv, cos = (torch.randn(batch, width, device=DEVICE) for width in (22016, 12288, 128))
        cache = torch.zeros(128, 16, 32, 128, device=DEVICE).half()
        places = torch.arange(batch, device=DEVICE)
        calls: dict[str, Callable[[], object]] = {
            "rms_norm": lambda: activations.rms_norm(stream, weight, 1e-5),
            "add_rms_norm": lambda: activations.add_rms_norm(out, stream, weight, 1e-5),
            "silu_mul": lambda: activations.silu_mul(gate_up, torch.float16),
            "rope_and_store": lambda: activations.rope_and_store(qkv, cos, cos, cache, cache, places, 32),
            "round_rows": lambda: activations.round_rows(x, 6.0),
        }
        rows += [
            {"what": name, "batch": batch, "us": round(timed([call] * 20), 2)} for name, call in calls.items()
        ]
    return rows


def ceiling() -> float:
    """TB/s of a large elementwise kernel, bytes read and written."""
    source = torch.randn(2**30, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed([lambda: torch.neg(source, out=target)] * 8) / 1e6


def print_linear(rows: Sequence[Row]) -> None:
    """Milliseconds of a whole model's linear layers, and for each shape the default and the best cut."""
    batches = sorted({int(str(row["batch"])) for row in rows})
    for kind in dict.fromkeys(str(row["kind"]) for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        total = [
            sum(float(str(row["us"])) for row in mine if row["batch"] == batch and row["default"])
            * LAYERS
            / 1000
            for batch in batches
        ]
        best = [
            sum(
                min(float(str(row["us"])) for row in mine if row["batch"] == batch and row["shape"] == shape)
                for shape in SHAPES
            )
            * LAYERS / 1000
            for batch in batches
        ]  # fmt: skip
        print(
            f"{kind:>17} ms: "
            + "  ".join(f"{b}: {t:.2f} ({m:.2f})" for b, t, m in zip(batches, total, best, strict=True))
        )
    packed = [row for row in rows if "cut" in row]
    for kind, shape in itertools.product(dict.fromkeys(str(row["kind"]) for row in packed), SHAPES):
        for batch in batches:
            own = [row for row in packed if (row["shape"], row["batch"], row["kind"]) == (shape, batch, kind)]
            ranked = sorted(own, key=lambda row: float(str(row["us"])))[:5]
            default = next(row for row in own if row["default"])
            shown = ", ".join(f"{row['cut']} {row['us']}" for row in ranked)
            print(
                f"{kind:>5} {shape:>8} batch {batch:>3}: "
                f"default {default['cut']} {default['us']} us; best {shown}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--narrow", action="store_true", help="only the cuts that are used")
    arguments = parser.parse_args()
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{where}, reading and writing {ceiling():.2f} TB/s", flush=True)
    others = sweep_others()
    print(" ".join(f"{row['what']}({row['batch']})={row['us']}" for row in others), flush=True)
    attentions = sweep_attention()
    for row in attentions:
        print(row, flush=True)
    linears = sweep_linear(arguments.batches, not arguments.narrow)
    if arguments.json:
        arguments.json.write_text(json.dumps({"linear": linears, "attention": attentions, "others": others}))
    print_linear(linears)


if __name__ == "__main__":
    main()
