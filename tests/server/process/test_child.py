"""How children are started: with our packages, without secrets, with their end in words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.process.child import (
    ROOT,
    child_environment,
    describe_exit,
    engine_environment,
    python_module,
)


def test_engines_get_no_secrets_and_no_network() -> None:
    secrets = {"HF_TOKEN": "x", "OPENAI_API_KEY": "x", "db_password": "x", "MY_SECRET": "x"}
    clean = engine_environment({"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", **secrets}, None)
    assert not secrets.keys() & clean.keys()
    assert (clean["PATH"], clean["CUDA_VISIBLE_DEVICES"], clean["HF_HUB_OFFLINE"]) == ("/bin", "0", "1")
    assert "OMP_NUM_THREADS" not in clean
    assert engine_environment({"OMP_NUM_THREADS": "8"}, 2)["OMP_NUM_THREADS"] == "2"


def test_builders_keep_what_a_download_needs() -> None:
    assert child_environment({"HF_TOKEN": "x"})["HF_TOKEN"] == "x"


def test_our_packages_come_before_what_the_user_has_on_the_path() -> None:
    assert child_environment({"PYTHONPATH": "/mine"})["PYTHONPATH"] == f"{ROOT}{os.pathsep}/mine"


def test_a_child_imports_our_packages_and_nothing_from_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit('hijacked')")
    done = subprocess.run(
        python_module("server.process.builder", "--help"),
        cwd=tmp_path,
        env=child_environment(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--progress" in done.stdout


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was killed by SIGKILL"),
        (-11, "was killed by SIGSEGV"),
        (-63, "was killed by signal 63"),
        (None, "closed its connection"),
    ],
)
def test_an_end_in_words(code: int | None, text: str) -> None:
    assert describe_exit(code) == text


def test_the_web_process_side_is_light() -> None:
    heavy = [
        "numpy",
        "gguf",
        "torch",
        "transformers",
        "llama_cpp",
        "bitsandbytes",
        "huggingface_hub",
        "ctypes.util",
    ]
    program = f"import sys, server.pool.pool; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
