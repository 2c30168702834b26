"""How much memory a build takes: one block of it, however many there are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BUILD = """
import json, sys, threading, time
from pathlib import Path
import torch, transformers
import transformers.models.llama.modeling_llama
import quant.methods.gptq, quant.stream.road
from benchmarks.gpu.quantize import Shape, make_checkpoint
from quant.pipeline import build_variant
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.store import VariantStore

folder, layers, hidden, ffn = Path(sys.argv[1]), *map(int, sys.argv[2:5])
torch.set_num_threads(2)
sizes = Shape(layers=layers, hidden=hidden, ffn=ffn, heads=32, kv_heads=8, vocab=1000, tied=True)
make_checkpoint(folder / "model", sizes, "cpu")
source = open_source(str(folder / "model"), cache=folder)
tokens = torch.randint(0, 256, (16, 512), generator=torch.Generator().manual_seed(0))

def resident():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024

idle = peak = resident()
between = []

def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.01)

def tell(progress):
    if progress.detail and progress.detail.bytes:
        between.append(resident() - idle)

threading.Thread(target=watch, daemon=True).start()
recipe = parse_recipe({"method": "gptq", "format": "compressed-tensors"})
build_variant(source, recipe, VariantStore(folder), progress=tell, threads=2, device="cpu", tokens=tokens)
print(json.dumps({"idle": idle, "peak": peak - idle, "between": between}))
"""


def measured(folder: Path, *sizes: int) -> dict[str, int | list[int]]:
    command = [sys.executable, "-c", BUILD, str(folder), *map(str, sizes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int | list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_finished_blocks_take_no_memory(tmp_path: Path) -> None:
    """Eight blocks of 5 MB in float32 each; a builder that kept them would grow by as much."""
    found = measured(tmp_path, 8, 256, 1408)
    assert isinstance(found["between"], list)
    assert len(found["between"]) == 8
    assert max(found["between"][1:]) - found["between"][0] < 24e6  # malloc keeps some


@pytest.mark.slow
def test_blocks_of_a_model_of_a_billion_weights(tmp_path: Path) -> None:
    """One of the 16 blocks of a Llama of 1.2 billion weights, 16 x 512 tokens; the next add nothing."""
    found = measured(tmp_path, 1, 2048, 8192)
    assert isinstance(found["peak"], int)
    assert found["peak"] < 2.5e9
