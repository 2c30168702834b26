"""Sources are opened by headers, named by content, and refused in one line before anything is written."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant import digests
from quant.checkpoint import checkpoint_tensors
from quant.errors import BadSource
from quant.progress import Progress
from quant.source import Source, digest_again, open_source
from tests.quant.checkpoints import (
    weights_of,
    write_checkpoint,
    write_json,
    write_raw_safetensors,
    write_safetensors,
    write_weights,
)
from tests.quant.test_gguf_header import gguf_file, write_reference

FIRST = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=2)


def refused(ref: Path | str, cache: Path) -> str:
    with pytest.raises(BadSource) as caught:
        open_source(str(ref), cache=cache, local_only=True)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 400
    assert not cache.exists()
    return line


def edit(file: Path, **fields: Any) -> None:
    write_json(file, {**json.loads(file.read_text()), **fields})


def test_a_folder_is_opened(folder: Path, cache: Path) -> None:
    source = open_source(str(folder), cache=cache)
    assert (source.kind, source.id, source.path) == ("hf", str(folder), folder)
    assert (source.architecture, source.revision) == ("LlamaForCausalLM", None)
    assert source.config["hidden_size"] == 64
    assert source.bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_a_gguf_file_is_opened(tmp_path: Path, cache: Path) -> None:
    write_reference(tmp_path / "m.gguf")
    source = open_source(str(tmp_path / "m.gguf"), cache=cache)
    assert (source.kind, source.architecture, source.config) == ("gguf", "llama", {})
    assert source.bytes == (tmp_path / "m.gguf").stat().st_size


def test_the_digest_is_of_the_content(tmp_path: Path, cache: Path) -> None:
    def digest(folder: Path) -> str:
        return open_source(str(folder), cache=cache).digest

    one, same = write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b")
    assert digest(one) == digest(same)
    (same / "README.md").write_text("a file that no variant depends on")
    assert digest(one) == digest(same)
    seen = {digest(one)}
    for number, name in enumerate(sorted(path.name for path in one.iterdir())):
        other = write_checkpoint(tmp_path / f"changed-{number}")
        if name == WEIGHTS:
            write_weights(other, weights_of(64, 2, "BF16", seed=1))
        else:
            (other / name).write_text((other / name).read_text() + " ")
        seen.add(digest(other))
    assert len(seen) == 1 + len(list(one.iterdir()))


def test_a_second_start_reads_headers_only_and_adds_no_file(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_source(str(folder), cache=cache)
    before = sorted(cache.rglob("*")), (cache / "digests.json").stat()

    def never(path: Path, progress: object = None) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(digests, "hash_file", never)
    read = int(Path("/proc/thread-self/io").read_text().split()[1])
    assert open_source(str(folder), cache=cache) == first
    assert int(Path("/proc/thread-self/io").read_text().split()[1]) - read < (folder / WEIGHTS).stat().st_size
    assert (sorted(cache.rglob("*")), (cache / "digests.json").stat()) == before


def test_a_changed_weight_is_noticed(folder: Path, cache: Path) -> None:
    source = open_source(str(folder), cache=cache)
    assert digest_again(source, cache) == source.digest
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)
    assert digest_again(source, cache) != source.digest


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_check_comes_before_hashing_and_only_then(
    kind: str, folder: Path, tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "model.gguf"
    write_reference(file)
    ref = str(folder if kind == "folder" else file)
    seen: list[Source] = []

    def refuse(source: Source) -> None:
        seen.append(source)
        raise BadSource("no")

    for _ in range(2):
        with pytest.raises(BadSource, match="no"):
            open_source(ref, cache=cache, check=refuse)
        assert not cache.exists()
    assert [source.digest for source in seen] == ["", ""]
    opened = open_source(ref, cache=cache, check=seen.append)
    assert (seen[2].path, seen[2].architecture) == (opened.path, opened.architecture)
    assert open_source(ref, cache=cache, check=refuse) == opened


def test_hashing_is_reported(folder: Path, cache: Path) -> None:
    seen: list[Progress] = []
    source = open_source(str(folder), cache=cache, progress=seen.append)
    assert {(one.stage, one.unit, one.total) for one in seen} == {("pull", "bytes", source.bytes)}
    assert seen[-1].done == source.bytes


def test_shards_and_one_file_hold_the_same_tensors(tmp_path: Path) -> None:
    one = checkpoint_tensors(write_checkpoint(tmp_path / "one"))
    many = checkpoint_tensors(write_checkpoint(tmp_path / "many", shards=3))
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        other = many[name]
        assert (
            tensor.file.read_bytes()[tensor.start : tensor.end]
            == (other.file.read_bytes()[other.start : other.end])
        )


def test_links_inside_a_hub_snapshot_are_fine(folder: Path, tmp_path: Path, cache: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_source(str(snapshot), cache=cache).architecture == "LlamaForCausalLM"


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **fields)


def raw_config(content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_bytes(content)

    return change


def code_in(name: str, **fields: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / name, fields)


def truncated(folder: Path) -> None:
    os.truncate(folder / FIRST, (folder / FIRST).stat().st_size - 1)


def cut_to_nothing(folder: Path) -> None:
    os.truncate(folder / FIRST, 4)


def missing_shard(folder: Path) -> None:
    (folder / FIRST).unlink()


def overlapping(folder: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]},
    }
    write_raw_safetensors(folder / FIRST, json.dumps(header).encode(), b"\0" * 12)


def huge_header(folder: Path) -> None:
    write_raw_safetensors(folder / FIRST, b"{}", length=2**60)


def pickles_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def shard_at(place: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        mapped = json.loads((folder / INDEX).read_text())["weight_map"]
        edit(folder / INDEX, weight_map={**mapped, "model.norm.weight": place})

    return change


def weight_map(value: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / INDEX, weight_map=value)


def promised(folder: Path) -> None:
    mapped = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={**mapped, "model.ghost": FIRST})


def unnamed(folder: Path) -> None:
    mapped = json.loads((folder / INDEX).read_text())["weight_map"]
    mapped.pop(next(name for name, file in mapped.items() if file == FIRST))
    edit(folder / INDEX, weight_map=mapped)


def twice(folder: Path) -> None:
    second = FIRST.replace("00001-of", "00002-of")
    shutil.copy(folder / FIRST, folder / second)


def linked_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def loop(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(FIRST)


def pipe(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def device(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to("/dev/zero")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def unknown_dtype(folder: Path) -> None:
    entry = {"t": {"dtype": "Q4_WEIRD", "shape": [1], "data_offsets": [0, 1]}}
    write_raw_safetensors(folder / FIRST, json.dumps(entry).encode(), b"\0")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (no_config, ["config.json is missing"]),
        (raw_config(b""), ["config.json is not valid JSON"]),
        (raw_config(b"[" * 100_000), ["config.json is not valid JSON"]),
        (raw_config(b"[]"), ["config.json is not a JSON object"]),
        (raw_config(b'{"a": NaN}'), ["config.json is not valid JSON"]),
        (raw_config(b'{"a": ' + b"9" * 5000 + b"}"), ["config.json is not valid JSON"]),
        (raw_config(b" " * (17 << 20)), ["config.json is larger than"]),
        (config(architectures=[]), ["config.json names no architecture"]),
        (config(architectures=["../x"]), ["config.json names no architecture"]),
        (config(architectures="Llama"), ["config.json names no architecture"]),
        (config(num_hidden_layers=10**9), ["config.json", "1,000,000,000 layers"]),
        (config(auto_map={"AutoModel": "m.M"}), ["config.json has an auto_map"]),
        (config(text_config={"x": [{"auto_map": {}}]}), ["config.json has an auto_map"]),
        (code_in("tokenizer_config.json", auto_map={}), ["tokenizer_config.json has an auto_map"]),
        (code_in("preprocessor_config.json", auto_map={}), ["preprocessor_config.json has an auto_map"]),
        (truncated, [FIRST, "truncated: tensor 'model"]),
        (cut_to_nothing, [FIRST, "truncated"]),
        (missing_shard, [FIRST, "is missing"]),
        (overlapping, [FIRST, "'b' overlaps tensor 'a'"]),
        (huge_header, [FIRST, f"{2**60:,}"]),
        (unknown_dtype, [FIRST, "'t' has unknown dtype 'Q4_WEIRD'"]),
        (pickles_only, ["pytorch_model.bin", "pickle"]),
        (no_weights, ["neither model.safetensors nor"]),
        (shard_at("../../etc/passwd"), [INDEX, "'model.norm.weight'", "'../../etc/passwd'"]),
        (shard_at("/etc/passwd"), [INDEX, "'/etc/passwd'"]),
        (shard_at("sub/m.safetensors"), [INDEX, "'sub/m.safetensors'"]),
        (shard_at("..\\m.safetensors"), [INDEX, "no safetensors file of the folder"]),
        (shard_at("m.bin"), [INDEX, "'m.bin'"]),
        (weight_map([]), [f"{INDEX} has no weight_map"]),
        (weight_map({}), [f"{INDEX} has no weight_map"]),
        (weight_map({"t": 5}), [INDEX, "'t' lies in 5"]),
        (promised, [FIRST, "lacks tensor 'model.ghost'"]),
        (unnamed, [FIRST, "which model.safetensors.index.json does not name"]),
        (twice, ["both hold tensor 'model"]),
        (linked_out(FIRST), [FIRST, "leads out of the folder"]),
        (linked_out("tokenizer.json"), ["tokenizer.json", "leads out of the folder"]),
        (linked_out("config.json"), ["config.json", "leads out of the folder"]),
        (loop, [FIRST]),
        (pipe, [FIRST, "not a regular file"]),
        (device, [FIRST, "leads out of the folder"]),
        (no_tokenizer, ["tokenizer.json is missing"]),
    ],
)
def test_bad_checkpoints_are_refused_before_anything_is_written(
    sharded: Path, cache: Path, spoil: Callable[[Path], None], what: list[str]
) -> None:
    spoil(sharded)
    started = time.monotonic()
    line = refused(sharded, cache)
    assert time.monotonic() - started < 5
    for part in what:
        assert part in line
    assert str(sharded) not in line


def test_code_beside_a_model_does_not_run(folder: Path, cache: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert "auto_map" in refused(folder, cache)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("weights.bin", "pickle"),
        ("weights.pt", "pickle"),
        ("weights.ckpt", "pickle"),
        ("model.safetensors", "name its folder"),
        ("notes.txt", "no GGUF file"),
        ("cut.gguf", "truncated"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, cache: Path, name: str, what: str) -> None:
    if name == "cut.gguf":
        gguf_file(tmp_path / name, data=b"")
    else:
        (tmp_path / name).write_bytes(b"\x80\x04 something else than a model")
    line = refused(tmp_path / name, cache)
    assert what in line
    assert name in line


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "nowhere",
        "./nowhere",
        "/nowhere/at/all",
        "nowhere.gguf",
        "org/nowhere.gguf",
        "../a/b",
        "https://example.com/model",
        "file:///etc/passwd",
        "org/name/extra",
        "org/..",
        "org/na me",
        "~nobody/x",
        "a\0b",
        "x" * 5000,
        "org/" + "x" * 300,
    ],
)
def test_names_of_nothing_are_refused(
    cache: Path, ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(ref, cache)


def test_a_local_source_has_no_revision(folder: Path, cache: Path) -> None:
    with pytest.raises(BadSource, match="revision"):
        open_source(str(folder), cache=cache, revision="main")


def test_a_read_only_cache_is_no_reason_to_refuse(folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made below this")
    assert isinstance(open_source(str(folder), cache=blocked / "cache"), Source)


def test_the_bundled_model_is_sound(tiny_chat: Path, cache: Path) -> None:
    source = open_source(str(tiny_chat), cache=cache)
    assert len(checkpoint_tensors(tiny_chat)) == 110
    assert source.config["num_hidden_layers"] == 12


def test_a_lone_file_of_another_name_is_no_checkpoint(folder: Path, cache: Path) -> None:
    (folder / WEIGHTS).unlink()
    write_safetensors(folder / "adapter_model.safetensors", weights_of(64, 2, "F32", 0))
    assert "neither" in refused(folder, cache)
