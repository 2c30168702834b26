"""What the command line refuses, how, and how fast; nothing here starts a server."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli.serve import cannot_encrypt
from server.settings import Settings
from tests.server.cli.conftest import REPO, Cli, command, environment

HEAVY = {"rich", "yaml", "msgspec", "fastapi", "uvicorn", "numpy", "gguf", "tokenizers", "huggingface_hub"}
SIX = """\
models:
  tiny:
    sorce: ./tiny
    parallel: many
    variants: [q4_k_m, q4_k_n]
    default: q8_0
  a:b:
    source: org/name
    aliases: [tiny]
"""


def children_cpu_s() -> float:
    """Of all children that have ended; unlike the clock it does not count what else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_six_mistakes_are_six_lines(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(SIX)
    before = children_cpu_s()
    done = cli("serve")
    assert children_cpu_s() - before < 2
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"models.yaml:{at}" for at in (3, 4, 5, 6, 7, 9)]


def test_help_is_quick_and_loads_nothing_heavy(tmp_path: Path) -> None:
    probe = "import sys, server.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    env = environment(tmp_path)
    loaded = subprocess.run(
        [sys.executable, "-c", probe], env=env, capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(loaded.stdout.split())
    before = children_cpu_s()
    shown = subprocess.run(command("--help"), env=env, capture_output=True, text=True, check=True)
    assert children_cpu_s() - before < 0.7
    assert all(name in shown.stdout for name in ("serve", "quantize", "variants", "chat", "pull"))


REFUSED = [
    (["serve", "--port", "http"], "--port: 'http' is not a whole number from 1 to 65535"),
    (["serve", "--models", "gone.yaml"], "--models: no such file: gone.yaml"),
    (["serve", "--host", "0.0.0.0"], "refusing to listen on 0.0.0.0 without API keys"),
    (["serve", "--api-keys-file", "gone"], "--api-keys-file: no such file: gone"),
    (["serve", "--log", "loud"], "--log: 'loud' is not one of debug, info, warning, error"),
    (["serve", "--variant", "q4_k_n"], "unknown recipe 'q4_k_n'"),
    (["serve", "gone"], "'gone': no such folder or GGUF file"),
    (["serve", "https://example.org/model"], "is a URL"),
    (["quantize", "gone"], "'gone': no such folder or GGUF file"),
    (["quantize", str(REPO / "models" / "tiny-chat"), "--recipe", "q9"], "unknown recipe 'q9'"),
    (["quantize", str(REPO / "models" / "tiny-chat"), "--recipe", "{"], "the recipe is no JSON"),
    (["pull", "gone"], "'gone': no such folder or GGUF file"),
]


@pytest.mark.parametrize(("arguments", "expected"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_a_wrong_value_is_one_line_and_exit_2(cli: Cli, arguments: list[str], expected: str) -> None:
    done = cli(*arguments)
    (line,) = done.stderr.splitlines()
    assert expected in line
    assert (done.returncode, done.stdout) == (2, "")


def test_wrong_sources_and_wrong_file_are_reported_together(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("models: {}")
    done = cli("serve", "gone", "away", "--models", "mine.yaml")
    assert done.stderr.splitlines() == [
        "'gone': no such folder or GGUF file",
        "'away': no such folder or GGUF file",
        "mine.yaml:1: models is empty",
    ]


def test_with_sources_models_yaml_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("not: [read")
    done = cli("serve", "gone")
    assert done.stderr.splitlines() == ["'gone': no such folder or GGUF file"]


def test_two_sources_of_one_name_clash(cli: Cli, tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "tiny").mkdir(parents=True)
        (tmp_path / parent / "tiny" / "config.json").touch()
    done = cli("serve", "one/tiny", "two/tiny")
    (line,) = done.stderr.splitlines()
    assert line.startswith("two models are called 'tiny': ")
    assert done.returncode == 2


def test_a_taken_port_is_one_line_and_exit_1(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cli("serve", REPO / "models" / "tiny-chat", "--port", str(port))
    (line,) = done.stderr.splitlines()
    assert line == f"quantserve: cannot listen on 127.0.0.1 port {port}: address already in use"
    assert done.returncode == 1


def test_an_unknown_host_is_one_line_and_exit_1(cli: Cli) -> None:
    done = cli("serve", REPO / "models" / "tiny-chat", "--host", "nowhere.invalid", "--allow-no-key")
    (line,) = done.stderr.splitlines()
    assert line.startswith("quantserve: cannot listen on nowhere.invalid port 8000: ")
    assert done.returncode == 1


def test_misspelt_variables_are_told(cli: Cli) -> None:
    done = cli("serve", "gone", QUANTSERVE_PROT="1")
    assert done.stderr.splitlines()[0] == (
        "quantserve: QUANTSERVE_PROT is not a setting: did you mean QUANTSERVE_PORT?"
    )


def test_without_the_bundled_model_the_way_out_is_told(tmp_path: Path) -> None:
    """As installed from a wheel: the package without the folder models/ beside it."""
    for package in ("server", "quant"):
        (tmp_path / package).symlink_to(REPO / package)
    (tmp_path / "server").unlink()
    (tmp_path / "server").mkdir()
    for part in (REPO / "server").iterdir():
        copy = tmp_path / "server" / part.name
        copy.symlink_to(part) if part.is_dir() else copy.write_bytes(part.read_bytes())
    (tmp_path / "work").mkdir()
    env = environment(tmp_path, PYTHONPATH=str(tmp_path))
    done = subprocess.run(
        command("serve"), env=env, cwd=tmp_path / "work", capture_output=True, text=True, check=False
    )
    problem, way_out = done.stderr.splitlines()
    assert problem.endswith("default.yaml:4: source: '../models/tiny-chat': no such folder or GGUF file")
    assert (
        way_out == "there is no bundled model here: name one (quantserve serve FOLDER) or write a models.yaml"
    )
    assert done.returncode == 2


def test_the_repository_serves_its_own_models_yaml() -> None:
    from server.catalog import load_catalog

    bundled = load_catalog(REPO / "server" / "default.yaml").models
    assert load_catalog(REPO / "models.yaml").models == bundled
    assert [(model.id, model.default, model.preload) for model in bundled] == [("tiny-chat", "q4_k_m", True)]


def test_a_cache_that_cannot_be_written_is_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "variants").write_text("in the way")
    done = cli(
        "serve", str(REPO / "models" / "tiny-chat"), "--port", "8199", "--cache", str(tmp_path / "cache")
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "cannot write to the cache" in line


MISSING = [
    ("llama_cpp", "auto", "q4_k_m", "llama-cpp-python is not installed"),
    ("torch", "auto", "nf4", "torch is not installed"),
    ("torch", "bitsandbytes", "nf4", "torch is not installed"),
]


@pytest.mark.parametrize(("library", "backend", "variant", "reason"), MISSING)
def test_a_missing_library_is_one_line_and_exit_1(
    cli: Cli, tmp_path: Path, library: str, backend: str, variant: str, reason: str
) -> None:
    """As it is where it was never installed: nobody finds it, and importing it fails."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{library!r}] = None\n")
    source = REPO / "models" / "tiny-chat"
    (tmp_path / "models.yaml").write_text(
        f"models:\n  m: {{source: {source}, variants: [{variant}], backend: {backend}}}\n"
    )
    before = children_cpu_s()
    done = cli("serve", PYTHONPATH=f"{tmp_path}{os.pathsep}{REPO}")
    assert children_cpu_s() - before < 5
    (line,) = done.stderr.splitlines()
    assert line.startswith("quantserve: m cannot be served here: ")
    assert reason in line
    assert done.returncode == 1


def test_a_gpu_that_is_not_there_is_one_line_and_exit_1(cli: Cli) -> None:
    arguments = ("--recipe", "nf4", "--device", "cuda")
    done = cli("quantize", REPO / "models" / "tiny-chat", *arguments, CUDA_VISIBLE_DEVICES="")
    *_, line = done.stderr.splitlines()
    assert line == "quantserve: tiny-chat:nf4: there is no CUDA device here"
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
NEW_CERTIFICATE = ("openssl", "req", "-x509", *CURVE, "-nodes", "-subj", "/CN=localhost")


def test_tls_files_that_do_not_go_together_are_one_line_and_exit_1(cli: Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        subprocess.run(
            [*NEW_CERTIFICATE, "-keyout", f"{name}.key", "-out", f"{name}.pem"],
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
    (tmp_path / "bad.pem").write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    for certificate, key in (("bad.pem", "a.key"), ("a.pem", "bad.pem"), ("a.pem", "b.key")):
        files = {"QUANTSERVE_TLS_CERTIFICATE": certificate, "QUANTSERVE_TLS_KEY": key}
        done = cli("serve", REPO / "models" / "tiny-chat", **files)
        (line,) = done.stderr.splitlines()
        assert "QUANTSERVE_TLS_CERTIFICATE and QUANTSERVE_TLS_KEY are no PEM files" in line
        assert done.returncode == 1
    good = Settings(tls_certificate=tmp_path / "a.pem", tls_key=tmp_path / "a.key")
    assert cannot_encrypt(good) is None


def test_a_backend_that_does_not_open_the_default_variant_ends_the_start(cli: Cli, tmp_path: Path) -> None:
    source = REPO / "models" / "tiny-chat"
    (tmp_path / "models.yaml").write_text(
        f"models:\n  a: {{source: {source}, variants: [bf16], backend: plain}}\n"
    )
    done = cli("serve")
    (line,) = done.stderr.splitlines()
    assert "a cannot be served here: backend 'plain' does not open format 'gguf'; it opens " in line
    assert done.returncode != 0
