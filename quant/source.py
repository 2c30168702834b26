"""The checkpoint a user brings, checked by headers and named by what is in it."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from quant.checkpoint import PICKLES, read_checkpoint
from quant.digests import DigestMemo
from quant.errors import BadSource
from quant.files import shown
from quant.gguf.header import read_header
from quant.gguf.parts import siblings
from quant.hub import Hub, parse_hub_id
from quant.progress import Progress, Report, ignore


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    kind: Literal["hf", "gguf"]
    id: str  # as the user named it
    path: Path  # folder, or .gguf file
    revision: str | None  # commit on the hub
    digest: str  # of the content of every file that a variant depends on
    architecture: str  # "LlamaForCausalLM", or GGUF's "llama"
    config: Mapping[str, Any]  # config.json; empty for GGUF
    bytes: int


Check = Callable[[Source], None]


def open_source(
    ref: str,
    *,
    cache: Path,
    revision: str | None = None,
    local_only: bool = False,
    progress: Report | None = None,
    hub: Hub | None = None,
    check: Check | None = None,
) -> Source:
    """Open a folder, a .gguf file or a hub id ("org/name", "org/name@revision", "org/name:Q4_K_M").

    Headers and small files are read; weights only to hash them, once, remembered in <cache>/digests.json.
    With `local_only` no network is touched. `check` gets a source without a digest before its weights are
    hashed, which takes minutes; what it raises ends it there. It is not asked about weights that were hashed.

    Raises BadSource before anything is written to the cache, and DiskFull for a download.
    """
    report, check = progress or ignore, check or _accept
    if path := _local(ref):
        if revision is not None:
            raise BadSource("only a hub repository has revisions")
        return (_open_folder if path.is_dir() else _open_file)(ref, path, None, cache, report, check)
    wanted = parse_hub_id(ref, revision)
    if wanted is None or ref.endswith(".gguf"):
        raise BadSource(_unknown(ref))
    found = (hub or Hub()).snapshot(wanted, local_only=local_only, report=report)
    if wanted.type:
        return _open_file(ref, found, _commit_of(found), cache, report, check)
    return _open_folder(ref, found, found.name, cache, report, check)


def _accept(_: Source) -> None:
    pass


def _commit_of(file: Path) -> str | None:
    """Of a file in a hub's snapshot."""
    return next((below.name for below in file.parents if below.parent.name == "snapshots"), None)


def _local(ref: str) -> Path | None:
    try:
        path = Path(ref).expanduser()
        return path if ref and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # no name that a file can have
        return None


def _open_folder(
    ref: str, folder: Path, revision: str | None, cache: Path, report: Report, check: Check
) -> Source:
    checkpoint = read_checkpoint(folder)
    source = Source(
        kind="hf",
        id=ref,
        path=folder.resolve(),
        revision=revision,
        digest="",
        architecture=checkpoint.architecture,
        config=checkpoint.config,
        bytes=0,
    )
    return _hashed(source, checkpoint.files, cache, report, check)


def _open_file(
    ref: str, file: Path, revision: str | None, cache: Path, report: Report, check: Check
) -> Source:
    if file.suffix in PICKLES:
        raise BadSource(f"{file.name} is a pickle, which is never opened; convert it to safetensors")
    if file.suffix == ".safetensors":
        raise BadSource(f"{file.name} is one file of a checkpoint: name its folder")
    header = read_header(file)
    source = Source(
        kind="gguf",
        id=ref,
        path=Path(os.path.abspath(file)),  # links keep their names: those of parts count
        revision=revision,
        digest="",
        architecture=header.architecture,
        config={},
        bytes=0,
    )
    return _hashed(source, _parts(file), cache, report, check)


def _hashed(source: Source, files: tuple[Path, ...], cache: Path, report: Report, check: Check) -> Source:
    memo = DigestMemo(cache)
    if not all(memo.is_known(file) for file in files):
        check(source)
    digest, size = _digest(source.kind, files, cache, report)
    return replace(source, digest=digest, bytes=size)


def _parts(file: Path) -> tuple[Path, ...]:
    """All parts of a split file. Raises BadSource where one is missing."""
    return tuple(
        file.parent / name for name in siblings(file.name, [one.name for one in file.parent.iterdir()])
    )


def digest_again(source: Source, cache: Path) -> str:
    """Digest of what lies at the source's place now; unchanged files are not read. Raises BadSource."""
    files = read_checkpoint(source.path).files if source.kind == "hf" else _parts(source.path)
    return _digest(source.kind, files, cache, ignore)[0]


def _digest(kind: str, files: tuple[Path, ...], cache: Path, report: Report) -> tuple[str, int]:
    """(digest over names and contents, bytes). The name of a GGUF file does not count, it is the user's."""
    memo = DigestMemo(cache)
    total = sum(file.stat().st_size for file in files if not memo.is_known(file))
    done = 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        report(Progress("pull", done, total, "bytes"))

    contents = [
        ["" if kind == "gguf" else file.name, memo.sha256(file, progress=count)] for file in sorted(files)
    ]
    memo.save()
    canonical = json.dumps([kind, contents], separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest(), sum(file.stat().st_size for file in files)


def _unknown(ref: str) -> str:
    if "://" in ref:
        return "a URL is never opened; name a folder, a .gguf file or a hub repository such as org/name"
    return f"there is no folder or file named {shown(Path(ref).name)}, and it is no hub repository's name"
