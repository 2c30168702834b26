"""What `quantserve doctor` says of this machine, and of machines that lack something."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from server.backends import registry
from server.cli import app, doctor


def run(monkeypatch: pytest.MonkeyPatch, cache: Path) -> str:
    monkeypatch.setenv("QUANTSERVE_CACHE", str(cache / "not" / "there"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    return result.output


def test_it_prints_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = run(monkeypatch, tmp_path)
    assert f"torch {torch.__version__}" in output or f"torch {version('torch')}" in output
    for name in registry.names():
        if not name.startswith("toy"):
            assert f" {name} (" in output
    assert "llama (gguf): ready" in output
    assert "GB free for the cache" in output


def test_what_is_missing_gets_one_line_of_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without(package: str) -> str:
        if package in {"torch", "transformers"}:
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(doctor, "version", without)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr("server.backends.torch_.backend.find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    output = run(monkeypatch, tmp_path)
    advice = [line for line in output.splitlines() if line.startswith("advice")]
    assert len(advice) == 3
    assert all("pip install" in line for line in advice)
    assert "awq (awq): torch and transformers are not installed" in output


def test_a_torch_for_cpus_beside_a_driver_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build of torch" in run(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "update the driver" in run(monkeypatch, tmp_path)
