"""How children are started: with our packages, without secrets, with their end in words."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from server.pool.builds import Order, build_order, measure_order, pull_order, run_child, search_order
from server.pool.records import Job, JobRecord
from server.process.child import (
    ROOT,
    child_environment,
    describe_exit,
    engine_environment,
    is_secret,
    python_module,
)
from server.process.reports import BuildReport
from server.settings import VARIABLES

SECRETS = {
    name: f"MARK{number}"
    for number, name in enumerate(
        (
            "HF_TOKEN",
            "OPENAI_API_KEY",
            "db_password",
            "MY_SECRET",
            "QUANTSERVE_API_KEYS",
            "QUANTSERVE_ADMIN_KEYS",
            "AWS_SECRET_ACCESS_KEY",
            "GITHUB_TOKENS",
            "GOOGLE_CREDENTIALS",
            "APIKEY",
        )
    )
}


class Heard:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def report(self, report: BuildReport) -> None:
        pass

    def said(self, lines: Sequence[str]) -> None:
        self.lines += lines


def test_engines_get_no_secrets_and_no_network() -> None:
    clean = engine_environment({"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", **SECRETS}, None)
    assert not SECRETS.keys() & clean.keys()
    assert (clean["PATH"], clean["CUDA_VISIBLE_DEVICES"], clean["HF_HUB_OFFLINE"]) == ("/bin", "0", "1")
    assert "OMP_NUM_THREADS" not in clean
    assert engine_environment({"OMP_NUM_THREADS": "8"}, 2)["OMP_NUM_THREADS"] == "2"


def test_only_a_child_that_pulls_gets_a_secret_and_only_the_hubs() -> None:
    environ = {
        "PATH": "/bin",
        "HF_ENDPOINT": "http://hub",
        "QUANTSERVE_API_KEYS_FILE": "/run/keys",
        **SECRETS,
    }
    assert not SECRETS.keys() & child_environment(environ).keys()
    pulling = child_environment(environ, pulls=True)
    assert SECRETS.keys() & pulling.keys() == {"HF_TOKEN"}
    assert (pulling["HF_ENDPOINT"], pulling["QUANTSERVE_API_KEYS_FILE"]) == ("http://hub", "/run/keys")


def test_every_setting_that_holds_keys_has_the_name_of_a_secret() -> None:
    assert is_secret(VARIABLES["api_keys"])
    assert is_secret(VARIABLES["admin_keys"])


def test_of_jobs_only_a_pull_pulls(tmp_path: Path) -> None:
    job = Job(id="j", model="m", created=0.0)
    record = JobRecord(job=job, source="org/name", revision=None, recipe={"name": "q4_0"})
    assert pull_order(record, tmp_path, tmp_path / "p").pulls
    assert not build_order(record, tmp_path, tmp_path / "p", None).pulls
    assert not measure_order(record, tmp_path / "p").pulls
    assert not search_order(record, tmp_path / "p").pulls


async def test_a_build_process_is_started_without_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says of its environment."""
    (tmp_path / "telling.py").write_text(
        "import sys\n"
        "for entry in open('/proc/self/environ').read().split(chr(0)):\n"
        "    if 'MARK' in entry or entry.startswith('PATH='): print(entry, file=sys.stderr)"
    )
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for pulls in (False, True):
        heard = Heard()
        await run_child(Order(module="telling", options={}, progress=tmp_path / "p", pulls=pulls), heard)
        names = {line.partition("=")[0] for line in heard.lines}
        assert names == ({"PATH", "HF_TOKEN"} if pulls else {"PATH"})


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
