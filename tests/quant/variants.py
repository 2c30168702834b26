"""A variant of two small files, built without a model: what the store does is the same for any file."""

from pathlib import Path

from quant.manifest import BuilderRecord, Manifest, RecipeRecord, SourceRecord
from quant.store import Build, Variant, VariantStore

KEYS = tuple(f"{n:032x}" for n in range(10))


def fill(build: Build, size: int = 1000) -> Manifest:
    """Write the files of a variant to the build's folder."""
    build.start()
    (build.out / "model.gguf").write_bytes(build.key.encode()[:1] * size)
    (build.out / "tokenizer.json").write_bytes(b"{}")
    files = build.records()
    return Manifest(
        key=build.key,
        source=SourceRecord(id="made-up", revision=None, digest="0" * 64),
        recipe=RecipeRecord(name="q4_k_m", body={"type": "q4_k_m"}, digest="1" * 64),
        format="gguf",
        bits_per_weight=4.5,
        bytes=sum(file.size for file in files),
        builder=BuilderRecord(version=1, packages={}),
        files=files,
    )


def publish(store: VariantStore, key: str, size: int = 1000) -> Variant:
    with store.building(key) as build:
        return build.publish(fill(build, size))


def files_in(cache: Path) -> list[str]:
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())


def files_of(key: str) -> list[str]:
    return [f"variants/{key}/{name}" for name in ("manifest.json", "model.gguf", "tokenizer.json")]
