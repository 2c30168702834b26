"""`quantserve doctor`: what this machine has for serving, and a line of advice for each thing it lacks."""

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import typer

INSTALL = "pip install 'quantserve[{}]'"
LIBRARIES = (  # package, what it is for, the extra that brings it
    ("llama-cpp-python", "GGUF variants", None),
    ("llguidance", "structured output", None),
    ("torch", "variants of the torch backends, and building them", "torch"),
    ("transformers", "variants of the torch backends", "torch"),
)
DRIVER = Path("/dev/nvidiactl")


class Finding(NamedTuple):
    topic: str
    text: str
    advice: str | None = None


def doctor() -> None:
    """Print devices, memory, libraries, kernels and backends, with advice for what is missing."""
    from server.settings import read_settings

    settings = read_settings(os.environ, ("cache",))
    advice = []
    topic = ""
    for finding in findings(settings.cache):
        typer.echo(f"{'' if finding.topic == topic else finding.topic:<10} {finding.text}")
        topic = finding.topic
        if finding.advice is not None:
            advice.append(finding.advice)
    for line in dict.fromkeys(advice):
        typer.echo(f"advice     {line}")


def findings(cache: Path) -> Iterator[Finding]:
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (_libraries, _devices, _backends)
    yield from _machine(cache)
    for part in parts:
        yield from part()


def _machine(cache: Path) -> Iterator[Finding]:
    from server.backends.llama.threads import allowed_threads

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("machine", f"{allowed_threads()} of {os.cpu_count()} CPUs may be used")
    yield Finding("machine", f"{memory / 1e9:.1f} GB of memory")
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    lacks = "the cache's disk is nearly full: name another folder in QUANTSERVE_CACHE"
    yield Finding("machine", f"{free / 1e9:.1f} GB free for the cache", lacks if free < 1e9 else None)


def _libraries() -> Iterator[Finding]:
    for package, purpose, extra in LIBRARIES:
        try:
            yield Finding("libraries", f"{package} {version(package)}")
        except PackageNotFoundError:
            install = INSTALL.format(extra) if extra else f"pip install {package}"
            yield Finding("libraries", f"{package} is missing", f"for {purpose}: {install}")


def _devices() -> Iterator[Finding]:
    if not find_spec("torch"):
        if DRIVER.exists():
            yield Finding("devices", "an NVIDIA driver", f"to use the GPU: {INSTALL.format('gpu')}")
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        yield Finding("devices", f"torch cannot be imported: {reason}", "reinstall torch for this machine")
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from _gpu(number)
        return
    yield Finding("devices", "no GPU that torch can use", _why_no_gpu(torch.version.cuda))
    yield Finding("kernels", "torch's own, for CPUs")


def _why_no_gpu(built_for: str | None) -> str | None:
    if not DRIVER.exists():
        return None
    if built_for is None:
        return "there is an NVIDIA driver, but torch is built for CPUs: install a CUDA build of torch"
    return f"torch is built for CUDA {built_for}, which the NVIDIA driver does not offer: update the driver"


def _gpu(number: int) -> Iterator[Finding]:
    import torch

    from server.backends.torch_.kernels.linear import compiled

    device = torch.device("cuda", number)
    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    text = f"{name} (sm_{major}{minor}), {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    yield Finding("devices", text)
    if compiled(device):
        yield Finding("kernels", f"compiled for {name}")
    else:
        old = "the kernels need a GPU of compute capability 8.0 or more; torch's own are used"
        lacks = "the kernels cannot be compiled: install nvidia-cuda-nvrtc for torch's version of CUDA"
        yield Finding("kernels", f"not compiled for {name}", old if major < 8 else lacks)


def _backends() -> Iterator[Finding]:
    from server.backends import registry
    from server.errors import RequestError

    for name in registry.names():
        try:
            backend = registry.load(name)
        except RequestError as error:
            yield Finding("backends", str(error), "remove or mend the package that brings it")
            continue
        reason = backend.probe()
        formats = ", ".join(sorted(backend.formats))
        if "toy" not in backend.formats:
            yield Finding("backends", f"{name} ({formats}): {reason or 'ready'}")
