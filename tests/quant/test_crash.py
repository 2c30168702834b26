"""Kills at any moment leave a whole variant or none, and the next build ends well and tidies up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quant.checkpoints import write_checkpoint
from tests.quant.killed import BEFORE

ROOT = Path(__file__).parents[2]


def kill(*arguments: str) -> int:
    """How many were killed. What went wrong is in the failing assertion's traceback."""
    command = [sys.executable, "-m", "tests.quant.killed", *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return int(ended.stdout)


@pytest.mark.parametrize("act", sorted(BEFORE))
def test_before_every_file_operation_of_the_store(tmp_path: Path, act: str) -> None:
    assert kill(act, str(tmp_path)) >= 10


def test_whole_builds_at_random_moments(tmp_path: Path) -> None:
    """Convert, check, quantize and publish; what is resumed is byte for byte what is built undisturbed."""
    model = write_checkpoint(tmp_path / "model", hidden=256, layers=1, dtype="F32")
    assert kill("random", str(tmp_path / "caches"), str(model), "q4_k_m", "20") >= 20


def torch_kills(folder: Path, kills: int) -> int:
    """Qwen2 of 4 blocks by GPTQ, calibrated on what it writes itself."""
    from tests.quant.stream.checkpoints import family_checkpoint

    model = family_checkpoint(folder / "model", "Qwen2ForCausalLM", num_hidden_layers=4)
    spec = {"method": "gptq", "format": "gptq", "calibration": {"samples": 8, "length": 32}}
    return kill("random", str(folder / "caches"), str(model), json.dumps(spec), str(kills))


def test_torch_builds_at_random_moments(tmp_path: Path) -> None:
    assert torch_kills(tmp_path, 6) >= 6


@pytest.mark.slow
def test_torch_builds_at_thirty_random_moments(tmp_path: Path) -> None:
    assert torch_kills(tmp_path, 30) >= 30


def test_float_builds_at_random_moments(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", layers=2)
    assert kill("random", str(tmp_path / "caches"), str(model), "f16", "4") >= 4
