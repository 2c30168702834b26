"""R15: spoilt model files are refused by our own readers before a native one sees them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.servers import REPO, amount, serving, told
from tests.quant.checkpoints import write_checkpoint


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_spoilt_files(tmp_path: Path, gguf_small: Path, kind: str) -> None:
    """All that kill the native reader, and nearly all that it would refuse, are refused by ours."""
    source = gguf_small if kind == "gguf" else gguf_small.with_name("model.safetensors")
    count = amount(short=150, full=1000)
    command = [sys.executable, "-m", "tests.faults.inputs", kind, str(source), str(tmp_path), str(count)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    told(f"R15 {kind}: {figures}")
    harmful = figures["deadly"] + figures["natively refused"]
    caught = figures["deadly and refused"] + figures["natively refused and refused"]
    assert harmful > count // 2
    assert caught >= 0.95 * harmful


@pytest.fixture(scope="module")
def gguf_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import build

    folder = write_checkpoint(tmp_path_factory.mktemp("model"), dtype="F32")
    variant = build(tmp_path_factory.mktemp("cache"), folder, "f16")
    path = folder / "model.gguf"
    path.write_bytes((variant / "model.gguf").read_bytes())
    return path


def test_the_web_process_outlives_what_ours_lets_through(tmp_path: Path, gguf_small: Path) -> None:
    """Truncated and garbled files as models of a server: one clear error each, and the next model answers."""
    raw = gguf_small.read_bytes()
    spoilt = {
        "cut": raw[: len(raw) // 2],
        "empty": b"",
        "zeros": bytes(4096),
        "counts": raw[:8] + b"\xff" * 16 + raw[24:],
        "text": raw[:200] + b"\xff" * 400 + raw[600:],
    }
    lines = [f"  good: {{source: {gguf_small}, context: 64, parallel: 1, threads: 1}}"]
    for name in spoilt:
        (tmp_path / f"{name}.gguf").write_bytes(raw)
        lines.append(f"  {name}: {{source: {tmp_path / name}.gguf, context: 64, parallel: 1}}")
    with serving(tmp_path / "run", "\n".join(["models:", *lines, ""])) as server:
        for name, data in spoilt.items():
            (tmp_path / f"{name}.gguf").write_bytes(data)
            answer = server.post("/v1/completions", {"model": name, "prompt": [5], "max_tokens": 1})
            assert answer.status_code == 503
            message = answer.json()["error"]["message"]
            assert str(tmp_path) not in message
            assert len(message) < 300
        answer = server.post("/v1/completions", {"model": "good", "prompt": [5], "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        assert server.process.poll() is None
