"""`python -m benchmarks.divergence`: our mean KL divergences beside those of llama.cpp's own tool.

Both hold GGUF variants against the same float32 GGUF file, on the same chunks of 512 tokens, second halves:
ours through the engine that serves, theirs by `llama-perplexity --kl-divergence`, which is built from the
sources that llama-cpp-python brings (--sources: its unpacked sdist) or named (--tool).
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from quant.measure.measurement import Measurement
from quant.pipeline import build_variant
from quant.progress import ignore
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import Variant, VariantStore
from server.process.builder import Reporter
from server.process.measurer import measure
from server.process.orders import MeasureOrder

CHUNK = 512
SHARE, FLOOR = 0.05, 0.0006  # how far apart the two may be
MEAN = re.compile(r"Mean\s+KLD:\s+(-?[\d.]+)\s+±\s+([\d.]+)")


def build_tool(sources: Path, target: Path) -> Path:
    """llama-perplexity, compiled from llama.cpp's sources."""
    folder = sources / "vendor" / "llama.cpp"
    flags = ["-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_OPENSSL=OFF"]
    subprocess.run(["cmake", "-S", folder, "-B", target, "-DCMAKE_BUILD_TYPE=Release", *flags], check=True)
    subprocess.run(["cmake", "--build", target, "--target", "llama-perplexity", "-j2"], check=True)
    return target / "bin" / "llama-perplexity"


def theirs(tool: Path, base: Path, model: Path, arguments: argparse.Namespace) -> float:
    """Mean KL divergence as the tool prints it; `base` is written by the first call."""
    common = [tool, "-f", arguments.corpus, "-c", str(CHUNK), "--chunks", str(arguments.chunks)]
    common += ["-t", str(arguments.threads), "-ngl", "0", "--kl-divergence-base", base]
    command = [*common, "-m", model, *(["--kl-divergence"] if base.exists() else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = MEAN.search(done.stdout + done.stderr)
    return float(found[1]) if found else 0.0


def ours(variant: Variant, arguments: argparse.Namespace, folder: Path) -> Measurement:
    order = MeasureOrder(
        cache=str(arguments.cache),
        source=str(arguments.model.absolute()),
        key=variant.key,
        backend="llama",
        context=CHUNK,
        threads=arguments.threads,
        corpus=str(arguments.corpus.absolute()),
        reference="gguf",
        texts=arguments.chunks,
        quick=True,
    )
    return asyncio.run(measure(order, Reporter(folder / "progress.json")))


def run(arguments: argparse.Namespace, folder: Path) -> bool:
    store = VariantStore(arguments.cache)
    source = open_source(str(arguments.model.absolute()), cache=arguments.cache)
    tool = arguments.tool or build_tool(arguments.sources, folder / "build")
    built = {
        name: build_variant(source, parse_recipe(name), store, progress=ignore).variant
        for name in ("f32", *arguments.variants)
    }
    base = folder / "base.kld"
    theirs(tool, base, built["f32"].path / "model.gguf", arguments)
    print("| variant | ours | llama.cpp | difference | within 5 % + .0006 |\n|---|---|---|---|---|")
    agree = True
    for name in arguments.variants:
        own = ours(built[name], arguments, folder).kl.mean
        other = theirs(tool, base, built[name].path / "model.gguf", arguments)
        near = abs(own.value - other) <= SHARE * other + FLOOR
        agree &= near
        print(f"| {name} | {own} | {other:.6f} | {own.value - other:+.6f} | {'yes' if near else 'NO'} |")
    return agree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=Path("models/tiny-chat"))
    parser.add_argument("--corpus", type=Path, required=True, help="a text")
    parser.add_argument("--chunks", type=int, default=16, help="a multiple of 8")
    parser.add_argument("--variants", nargs="+", default=["q8_0", "q6_k", "q4_k_m", "q4_0", "q2_k"])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tool", type=Path, help="llama-perplexity")
    which.add_argument("--sources", type=Path, help="llama-cpp-python's sdist, unpacked")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/quantserve-divergence"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return 0 if run(arguments, Path(name)) else 1


if __name__ == "__main__":
    sys.exit(main())
