"""Models from a hub: pinned, checked before the weights come, and there again without a network."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quant.errors import BadSource, DiskFull
from quant.hub import Hub, HubId, parse_hub_id
from quant.progress import Progress
from quant.source import Source, open_source
from tests.quant.checkpoints import write_checkpoint, write_json
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
