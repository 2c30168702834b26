"""The quantizer's benchmark runs where neither llama.cpp nor gguf is, and goes on where it stopped."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BARE = """
import runpy, sys
for name in ("gguf", "llama_cpp", "bitsandbytes", "compressed_tensors", "fastapi", "uvicorn"):
    sys.modules[name] = None
sys.argv[0] = "quantize"
runpy.run_module("benchmarks.gpu.quantize", run_name="__main__")
"""


def bench(folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    sizes = ["--shape", "tiny", "--device", "cpu", "--samples", "4", "--length", "32", "--methods", "gptq"]
    command = [sys.executable, "-c", BARE, "--folder", str(folder), *sizes, *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_it_prints_a_table_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    stopped = bench(tmp_path, "--stop-after", "0.001")
    assert stopped.returncode == 3, stopped.stderr
    assert "the same call goes on" in stopped.stdout
    done = bench(tmp_path)
    assert done.returncode == 0, done.stderr
    header, line, row = done.stdout.splitlines()[-3:]
    assert header.count("|") == line.count("|") == row.count("|")
    assert row.split("|")[2:4] == [" 128 ", " 3 "]
