"""`python -m benchmarks.gpu.quantize`: random checkpoints through the quantizer, time and memory by block.

The checkpoint is made on the spot (bf16, random weights), calibrated on random tokens, and kept in the
folder: a run that was cut off, or ended by --stop-after, goes on when it is called again. Needs torch,
transformers and msgspec; neither llama.cpp nor a network.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.pipeline import build_variant
from quant.progress import Progress
from quant.recipe import parse_recipe
from quant.source import Source, open_source
from quant.store import Variant, VariantStore
from quant.tensors import bytes_of, header_of, write_all

SCHEME = {"bits": 4, "group": 128, "symmetric": True}
HEADER = (
    "| method | tokens | blocks | total s | s a block (median) | GPU GiB used | GPU GiB reserved "
    "| MB | bits |"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's sizes."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        keys = self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for name, shape in (
                ("input_layernorm", (self.hidden,)),
                ("self_attn.q_proj", (self.hidden, self.hidden)),
                ("self_attn.k_proj", (keys, self.hidden)),
                ("self_attn.v_proj", (keys, self.hidden)),
                ("self_attn.o_proj", (self.hidden, self.hidden)),
                ("post_attention_layernorm", (self.hidden,)),
                ("mlp.gate_proj", (self.ffn, self.hidden)),
                ("mlp.up_proj", (self.ffn, self.hidden)),
                ("mlp.down_proj", (self.hidden, self.ffn)),
            ):
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(layers=3, hidden=128, ffn=256, heads=4, kv_heads=2, vocab=300, tied=True),
    "1b": Shape(layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, vocab=128_256, tied=True),
    "8b": Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128_256, tied=False),
}


def make_checkpoint(folder: Path, shape: Shape, device: str) -> float:
    """Write it, unless it is there; seconds."""
    began = time.monotonic()
    if (folder / "config.json").exists():
        return 0.0
    folder.mkdir(parents=True, exist_ok=True)
    words = {f"t{number}": number for number in range(256)}
    model = {"type": "BPE", "vocab": words, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    random = torch.Generator(device).manual_seed(0)
    entries = {name: ("BF16", sizes, 2 * math.prod(sizes)) for name, sizes in shape.tensors()}
    with (folder / "model.safetensors").open("wb", buffering=0) as stream:
        stream.write(header_of(entries))
        for _, sizes in shape.tensors():
            weight = torch.ones(sizes, dtype=torch.bfloat16, device=device)
            if len(sizes) > 1:
                weight.normal_(0, 0.02, generator=random)
            write_all(stream, bytes_of(weight))
    (folder / "config.json").write_text(json.dumps(shape.config()))  # last: without it nothing is there
    return time.monotonic() - began


def recipe_for(method: str) -> dict[str, Any]:
    return {"method": method, "format": "compressed-tensors", "scheme": SCHEME}


class Watch:
    """Prints every block, and ends the build after so many seconds."""

    def __init__(self, stop_after: float) -> None:
        self._began = time.monotonic()
        self._limit = stop_after

    def __call__(self, progress: Progress) -> None:
        spent = time.monotonic() - self._began
        if spent > self._limit:
            raise KeyboardInterrupt
        detail = progress.detail
        if detail and detail.eta_s is not None:
            memory = (detail.memory_bytes or 0) / 2**30
            left = f"{progress.done}/{progress.total} modules, {detail.eta_s:.0f} s left, {memory:.1f} GiB"
            print(f"  {spent:6.1f} s {left}", flush=True)


def run(source: Source, method: str, arguments: argparse.Namespace) -> Variant:
    """Raises KeyboardInterrupt where its time is over."""
    ids = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (arguments.samples, arguments.length), generator=ids)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return build_variant(
        source,
        parse_recipe(recipe_for(method)),
        VariantStore(arguments.folder / "cache"),
        progress=Watch(arguments.stop_after),
        device=arguments.device,
        tokens=tokens,
    ).variant


def row(method: str, variant: Variant, tokens: int, seconds: float, device: str) -> str:
    made = json.loads((variant.path / "build.json").read_bytes())
    blocks = sorted(one["seconds"] for one in made["blocks"])
    used = max(one["memory_bytes"] for one in made["blocks"]) / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else float("nan")
    cells = [
        method + (" (resumed)" if made["resumed"] else ""),
        f"{tokens:,}",
        str(len(blocks)),
        f"{seconds:.1f}",
        f"{blocks[len(blocks) // 2]:.2f}",
        f"{used:.1f}",
        f"{reserved:.1f}",
        f"{variant.manifest.bytes / 1e6:,.0f}",
        f"{variant.manifest.bits_per_weight:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    arguments = _arguments()
    folder = arguments.folder / arguments.shape
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {arguments.shape}: {SHAPES[arguments.shape]}", flush=True)
    print(f"made in {make_checkpoint(folder, SHAPES[arguments.shape], arguments.device):.1f} s", flush=True)
    began = time.monotonic()
    source = open_source(str(folder), cache=arguments.folder / "cache")
    print(f"opened and hashed {source.bytes / 1e9:.1f} GB in {time.monotonic() - began:.1f} s", flush=True)
    rows = []
    for method in arguments.methods.split(","):
        print(method, flush=True)
        began = time.monotonic()
        try:
            variant = run(source, method, arguments)
        except KeyboardInterrupt:
            print(
                f"{method}: not finished after {arguments.stop_after:.0f} s; the same call goes on",
                flush=True,
            )
            return 3
        seconds = time.monotonic() - began
        rows.append(row(method, variant, arguments.samples * arguments.length, seconds, arguments.device))
        print(json.dumps(json.loads((variant.path / "build.json").read_bytes())["seconds"]), flush=True)
    print("\n".join([HEADER, "|" + "---|" * HEADER.count(" | ") + "---|", *rows]))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/quantize"))
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--methods", default="gptq,awq+gptq", help="names, separated by commas")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds for each method")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
