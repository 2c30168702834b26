"""Models from a hub: pinned, checked before the weights come, and there again without a network."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quant.errors import BadSource, DiskFull, DownloadBroken
from quant.hub import Hub, HubId, parse_hub_id
from quant.progress import Progress
from quant.source import Source, open_source
from tests.quant.checkpoints import write_checkpoint, write_json
from tests.quant.gguf.support import converted
from tests.quant.hub_server import COMMIT, FakeHub, serve

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "remote" / "model", shards=2)
    (folder / "README.md").write_text("not needed")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "consolidated.safetensors").write_bytes(b"not in the index")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[FakeHub]:
    with serve({"org/model": model}) as running:
        yield running


class Opener:
    """open_source with everything below one folder."""

    def __init__(self, folder: Path, hub: FakeHub) -> None:
        self.cache = folder / "cache"
        self.snapshots = folder / "snapshots"
        self.hub = hub
        self.seen: list[Progress] = []

    def __call__(self, ref: str, *, offline: bool = False, **options: object) -> Source:
        endpoint = NOWHERE if offline else self.hub.endpoint
        revision = options.get("revision")
        assert revision is None or isinstance(revision, str)
        return open_source(
            ref,
            cache=self.cache,
            revision=revision,
            local_only=bool(options.get("local_only")),
            progress=self.seen.append,
            hub=Hub(endpoint, self.snapshots),
        )

    def refused(self, ref: str, *, offline: bool = False, **options: object) -> str:
        with pytest.raises(BadSource) as caught:
            self(ref, offline=offline, **options)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200
        assert not self.cache.exists()
        return str(caught.value)


@pytest.fixture
def tiny_gguf(model: Path, tmp_path: Path) -> Path:
    return converted(model, tmp_path / "tiny.gguf", "bf16")


@pytest.fixture
def opener(tmp_path: Path, hub: FakeHub) -> Opener:
    return Opener(tmp_path / "here", hub)


def test_a_model_is_downloaded_pinned_and_checked(opener: Opener, model: Path) -> None:
    source = opener("org/model")
    assert (source.kind, source.id, source.revision) == ("hf", "org/model", COMMIT)
    assert source.path.name == COMMIT
    assert source.digest == open_source(str(model), cache=opener.cache).digest
    got = set(opener.hub.downloads)
    assert {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors"} <= got
    assert not got & {"README.md", "pytorch_model.bin", "consolidated.safetensors"}
    pulled = [one for one in opener.seen if one.stage == "pull"]
    assert pulled
    assert all(0 <= one.done <= one.total for one in pulled)


def test_a_second_time_downloads_nothing(opener: Opener) -> None:
    first = opener("org/model")
    opener.hub.requests.clear()
    assert opener("org/model") == first
    assert opener.hub.downloads == []


def test_without_a_network_the_snapshot_serves(opener: Opener) -> None:
    first = opener("org/model")
    opener.hub.requests.clear()
    assert opener("org/model", local_only=True) == first
    assert opener.hub.requests == []
    assert opener("org/model", offline=True) == first
    assert opener(f"org/model@{COMMIT}", offline=True).digest == first.digest


def test_a_revision_can_be_named_in_two_ways(opener: Opener) -> None:
    assert opener("org/model@main").revision == COMMIT
    assert opener("org/model", revision=COMMIT).revision == COMMIT
    assert "revision nope" in Opener(opener.cache.parent / "b", opener.hub).refused("org/model@nope")


def test_what_is_not_here_is_not_fetched_when_that_is_forbidden(opener: Opener) -> None:
    assert "not on this machine" in opener.refused("org/model", local_only=True).replace(
        ", or not wholly,", ""
    )
    assert opener.hub.requests == []


def test_an_interrupted_download_is_not_taken_for_the_model(opener: Opener) -> None:
    source = opener("org/model")
    shard = source.path / "model-00001-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(BadSource, match=f"{shard.name} is missing"):
        opener("org/model", local_only=True)
    assert opener("org/model").digest == source.digest


def test_code_is_refused_before_the_weights_come(opener: Opener, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", {**config, "auto_map": {"AutoModel": "evil.Model"}})
    assert "auto_map" in opener.refused("org/model")
    assert not [name for name in opener.hub.downloads if name.endswith(".safetensors")]


def test_pickles_are_refused_before_anything_comes(opener: Opener, model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    assert "'pytorch_model.bin' is a pickle" in opener.refused("org/model")
    assert not [name for name in opener.hub.downloads if name.endswith(".bin")]


def test_an_index_that_leads_out_is_refused_before_the_weights_come(opener: Opener, model: Path) -> None:
    write_json(model / "model.safetensors.index.json", {"weight_map": {"t": "../../x.safetensors"}})
    assert "'../../x.safetensors'" in opener.refused("org/model")
    assert not [name for name in opener.hub.downloads if name.endswith(".safetensors")]


def test_a_repository_of_gguf_files_says_what_to_do(opener: Opener, model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    (model / "m.gguf").write_bytes(b"GGUF")
    assert "holds GGUF files" in opener.refused("org/model")


@pytest.mark.parametrize("seed", range(3))
def test_ten_interruptions_at_random_end_with_verified_files(
    opener: Opener, model: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer goes on where the one before it broke off: no byte comes twice."""
    monkeypatch.setattr("quant.fetch.PAUSES", (0.0,))
    opener.hub.cuts = [random.Random(seed * 100 + n).randrange(1, 9_000) for n in range(10)]
    source = opener("org/model")
    assert not opener.hub.cuts
    assert source.digest == open_source(str(model), cache=opener.cache).digest
    shards = sum(path.stat().st_size for path in model.glob("model-*.safetensors"))
    assert opener.seen[-1].done >= shards
    assert len([name for name in opener.hub.downloads if name.endswith(".safetensors")]) > 2
    assert not list(opener.snapshots.rglob("*.part"))
    assert all(one.done <= one.total for one in opener.seen)


def test_a_pull_that_was_killed_goes_on_with_what_had_come(opener: Opener, model: Path) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    blobs = opener.snapshots / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    data = shard.read_bytes()
    part = blobs / f"{hashlib.sha256(data).hexdigest()}.part"
    part.write_bytes(data[:5000])
    opener("org/model")
    ranges = opener.hub.ranges[shard.name]
    assert ranges == ["bytes=5000-"]


def test_what_came_before_is_not_trusted(opener: Opener, model: Path) -> None:
    shard = model / "model-00001-of-00002.safetensors"
    blobs = opener.snapshots / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(shard.read_bytes()).hexdigest()}.part"
    for wrong in (b"x" * 5000, b"x" * (shard.stat().st_size + 1), b"x" * shard.stat().st_size):
        part.write_bytes(wrong)
        assert opener("org/model").digest == open_source(str(model), cache=opener.cache).digest
        part.with_suffix("").unlink()


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json", "config.json"])
def test_a_wrong_checksum_is_refused_by_name_and_nothing_of_the_file_stays(opener: Opener, name: str) -> None:
    opener.hub.false = frozenset({name})
    message = opener.refused("org/model")
    assert message.startswith(f"'{name}': its {'sha256' if 'safetensors' in name else 'git sha1'} is ")
    assert not [path for path in opener.snapshots.rglob("*") if path.name == name or path.suffix == ".part"]
    opener.hub.false = frozenset()
    opener("org/model")


def test_a_hub_that_sends_nothing_more_is_given_up_and_what_came_is_kept(
    opener: Opener, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.fetch.PAUSES", (0.0,))
    opener.hub.cuts = [400] + [0] * 30
    with pytest.raises(DownloadBroken, match="broke off after 400 of"):
        opener("org/model")
    assert [path.stat().st_size for path in opener.snapshots.rglob("*.part")] == [400]
    opener.hub.cuts = []
    assert opener("org/model").digest == open_source(str(model), cache=opener.cache).digest


def test_a_gguf_file_is_named_by_its_type(opener: Opener, tmp_path: Path, tiny_gguf: Path) -> None:
    folder = tmp_path / "remote" / "ggufs"
    (folder / "Q8_0").mkdir(parents=True)
    for name in ("m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-BF16.gguf", "mmproj-m-F16.gguf"):
        (folder / name).write_bytes(tiny_gguf.read_bytes())
    for number in (1, 2):
        (folder / "Q8_0" / f"m-Q8_0-0000{number}-of-00002.gguf").write_bytes(tiny_gguf.read_bytes())
    opener.hub.repos["org/ggufs"] = folder
    source = opener("org/ggufs:q4_k_m")
    assert (source.kind, source.path.name, source.revision) == ("gguf", "m-Q4_K_M.gguf", COMMIT)
    assert opener.hub.downloads == ["m-Q4_K_M.gguf"]
    split = opener("org/ggufs:Q8_0@main")
    assert split.path.name == "m-Q8_0-00001-of-00002.gguf"
    assert split.bytes == 2 * tiny_gguf.stat().st_size
    assert opener("org/ggufs:q4_k_m", local_only=True) == source
    for ref, words in {
        "org/ggufs:F16": "there are: BF16, Q4_K_M, Q4_K_S, Q8_0",
        "org/ggufs": "name one as org/ggufs:BF16",
    }.items():
        with pytest.raises(BadSource, match=words):
            opener(ref)


def test_files_can_be_chosen_but_no_pickles(opener: Opener, model: Path) -> None:
    hub, wanted = Hub(opener.hub.endpoint, opener.snapshots), HubId("org/model", None)
    found = hub.snapshot(wanted, local_only=False, report=opener.seen.append, include=("conso*", "*.bin"))
    assert (found / "consolidated.safetensors").read_bytes() == b"not in the index"
    assert "pytorch_model.bin" not in opener.hub.downloads
    for pattern, words in {"*.bin": "is a pickle", "*.x": "no file that matches"}.items():
        with pytest.raises(BadSource, match=words):
            hub.snapshot(wanted, local_only=False, report=opener.seen.append, include=(pattern,))


def test_what_the_hub_refuses_is_one_line(opener: Opener) -> None:
    assert "no hub repository org/nothing" in opener.refused("org/nothing")
    opener.hub.gated = frozenset({"org/model"})
    assert "permission" in opener.refused("org/model")
    assert "was not downloaded" in opener.refused("org/model", offline=True)


def test_a_full_disk_is_noticed_before_the_download(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(self: Hub, folder: Path, needed: int) -> None:
        assert needed > 100_000
        raise DiskFull("no room")

    monkeypatch.setattr(Hub, "_require_room", tiny)
    with pytest.raises(DiskFull):
        opener("org/model")
    assert not [name for name in opener.hub.downloads if name.endswith(".safetensors")]


def test_the_environment_names_the_hub(opener: Opener, tmp_path: Path) -> None:
    """As a user does it: HF_ENDPOINT and HF_HOME, in a process of its own."""
    code = "import sys; from pathlib import Path; from quant.source import open_source; "
    code += "print(open_source('org/model', cache=Path(sys.argv[1])).revision)"
    environment = {**os.environ, "HF_ENDPOINT": opener.hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache")],
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == f"{COMMIT}\n"
    assert ended.stderr == ""
    assert list((tmp_path / "home" / "hub").glob("models--org--model"))


@pytest.mark.parametrize(
    ("ref", "revision", "wanted"),
    [
        ("org/name", None, HubId("org/name", None)),
        ("org/name@v1.0", None, HubId("org/name", "v1.0")),
        ("org/name@refs/pr/3", None, HubId("org/name", "refs/pr/3")),
        ("org/name", "main", HubId("org/name", "main")),
        ("org/name@main", "main", HubId("org/name", "main")),
        ("org/name:Q4_K_M", None, HubId("org/name", None, "Q4_K_M")),
        ("org/name:iq4_xs@v1", None, HubId("org/name", "v1", "iq4_xs")),
        ("org/name:", None, None),
        ("name", None, None),
        ("a/b/c", None, None),
        ("../name", None, None),
        ("org/..", None, None),
        ("https://org/name", None, None),
        ("org/name\n", None, None),
    ],
)
def test_hub_ids(ref: str, revision: str | None, wanted: HubId | None) -> None:
    assert parse_hub_id(ref, revision) == wanted


@pytest.mark.parametrize(
    ("ref", "revision"), [("a/b@x", "y"), ("a/b@../x", None), ("a/b", "x y"), ("a/b", "../x")]
)
def test_bad_revisions(ref: str, revision: str | None) -> None:
    if revision is None:
        assert parse_hub_id(ref, revision) is None
    else:
        with pytest.raises(BadSource):
            parse_hub_id(ref, revision)
