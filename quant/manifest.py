"""What a published variant is: `manifest.json`, written once, before the variant's folder gets its name."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from msgspec import Struct

from quant.errors import DamagedVariant

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileRecord(Struct, frozen=True, kw_only=True):
    path: str  # below the variant's folder, "/" between parts
    size: int  # bytes
    sha256: str


class SourceRecord(Struct, frozen=True, kw_only=True):
    id: str  # as the user named it
    revision: str | None
    digest: str


class RecipeRecord(Struct, frozen=True, kw_only=True):
    name: str
    body: dict[str, Any]
    digest: str


class BuilderRecord(Struct, frozen=True, kw_only=True):
    version: int
    packages: dict[str, str]


class Manifest(Struct, frozen=True, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    key: str
    source: SourceRecord
    recipe: RecipeRecord
    format: str
    bits_per_weight: float
    bytes: int  # of all files together
    builder: BuilderRecord
    files: tuple[FileRecord, ...]


def encode_manifest(manifest: Manifest) -> bytes:
    """Equal manifests give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"


def decode_manifest(raw: bytes) -> Manifest:
    """The inverse of `encode_manifest`. Raises DamagedVariant."""
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedVariant("the variant's manifest is unreadable") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise DamagedVariant(
            f"the variant's manifest has schema {manifest.schema_version}, not {SCHEMA_VERSION}"
        )
    for file in manifest.files:
        if not _is_inside(file.path) or file.size < 0 or not _SHA256.fullmatch(file.sha256):
            raise DamagedVariant("the variant's manifest names an impossible file")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the variant in `folder`. Raises DamagedVariant, also where there is none."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise DamagedVariant("the variant has no readable manifest") from error
    return decode_manifest(raw)


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\0" not in path
