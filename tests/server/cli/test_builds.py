"""quantize, variants and pull on the bundled model, with real builds."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from quant.store import VariantStore
from tests.quant.checkpoints import write_checkpoint
from tests.server.cli.conftest import Cli, command, environment

LINE = re.compile(
    r"(built|cached) tiny-chat:(\S+) ([0-9a-f]{32}) (\S+) (\d+\.\d) MB (\d+\.\d\d) bits/weight\n"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_chat: Path) -> Path:
    """A cache with tiny-chat:q8_0, for tests that do not change it."""
    folder = tmp_path_factory.mktemp("cache")
    done = subprocess.run(
        command("quantize", tiny_chat, "--recipe", "q8_0", "--cache", folder),
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = LINE.fullmatch(done.stdout)
    assert outcome is not None, done.stdout
    assert outcome[1] == "built"
    shown = list(dict.fromkeys(line.split()[1] for line in done.stderr.splitlines()))
    stages = ["pull", "convert", "check", "quantize", "publish"]
    assert shown == [stage for stage in stages if stage in shown]
    assert len(shown) >= 3  # a stage may be over between two looks at the builder's report
    return folder


def listed(cli: Cli, cache: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(cli("variants", "ls", "--json", "--cache", cache).stdout)
    return rows


def test_a_second_build_is_cached(cli: Cli, cache: Path, tiny_chat: Path) -> None:
    before = sorted(path for path in cache.rglob("*") if path.is_file())
    done = cli("quantize", tiny_chat, "--recipe", "q8_0", QUANTSERVE_CACHE=str(cache))
    found = LINE.fullmatch(done.stdout)
    assert found is not None, done.stderr
    outcome, recipe, key, path, megabytes, bits = found.groups()
    assert (outcome, recipe) == ("cached", "q8_0")
    assert Path(path) == cache / "variants" / key
    assert (Path(path) / "model.gguf").stat().st_size / 1e6 == pytest.approx(float(megabytes), rel=0.2)
    assert 8.0 < float(bits) < 9.0
    assert sorted(path for path in cache.rglob("*") if path.is_file()) == before


def test_eight_at_once_are_one_built_and_seven_cached(tmp_path: Path, tiny_chat: Path) -> None:
    arguments = command("quantize", tiny_chat, "--recipe", "q4_0", "--cache", tmp_path)
    children = [
        subprocess.Popen(
            arguments, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(8)
    ]
    outcomes = [child.communicate(timeout=120)[0].split() for child in children]
    assert sorted(words[0] for words in outcomes) == ["built", *["cached"] * 7]
    assert len({tuple(words[1:]) for words in outcomes}) == 1
    assert len(list((tmp_path / "variants").iterdir())) == 1


def test_ctrl_c_leaves_scratch_that_the_next_build_resumes(cli: Cli, tmp_path: Path, tiny_chat: Path) -> None:
    cache = tmp_path / "cache"
    arguments = command("quantize", tiny_chat, "--recipe", "q4_k_m", "--cache", cache)
    child = subprocess.Popen(arguments, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if " quantize" in line:
            child.send_signal(signal.SIGINT)
            break
    last = child.stderr.read().splitlines()[-1]
    child.stderr.close()
    assert child.wait(timeout=30) == 130
    said = re.fullmatch(r"interrupted; [\d.]+ MB stay in (\S+), from which the same command goes on", last)
    assert said is not None, last
    (left,) = listed(cli, cache)
    assert (left["state"], left["path"]) == ("unfinished", said[1])
    done = cli("quantize", tiny_chat, "--recipe", "q4_k_m", "--cache", cache)
    assert done.stdout.startswith("built tiny-chat:q4_k_m ")
    assert " convert" not in done.stderr  # done before the interruption
    assert [row["state"] for row in listed(cli, cache)] == ["built"]


def test_a_dry_run_says_what_would_be_done_and_writes_no_variant(
    cli: Cli, tmp_path: Path, tiny_chat: Path
) -> None:
    cache = tmp_path / "cache"
    done = cli("quantize", tiny_chat, "--recipe", "w8a8", "--dry-run", "--device", "cpu", "--cache", cache)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        r"tiny-chat:w8a8 \(smoothquant, compressed-tensors-int8\) would be [0-9a-f]{32}", lines[0]
    )
    assert lines[2].split() == ["COUNT", "MODULE", "SHAPE", "SCHEME", "MB"]
    assert lines[3].split()[:6] == ["12", "self_attn.q_proj", "256", "x", "256", "W8"]
    names = [line.split()[0] for line in lines[11:]]
    assert names == ["weights", "output", "disk", "memory", "time", "calibration"]
    assert not (cache / "variants").exists()
    odd = {"method": "rtn", "format": "awq", "scheme": {"bits": 4, "group": 96, "symmetric": False}}
    for recipe, words in ((json.dumps(odd), "groups of 32, 64, 128 only"), ("nf5", "did you mean")):
        refused = cli("quantize", tiny_chat, "--recipe", recipe, "--dry-run", "--cache", cache)
        assert refused.returncode != 0
        assert refused.stdout == ""
        assert words in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_a_target_that_nothing_meets_ends_with_1_and_says_so(cli: Cli, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    done = cli("quantize", source, "--target", "max_bytes=1000", "--cache", tmp_path / "cache")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "nothing in the space of the search has at most 1,000 bytes"
    for wrong in ("bits=4", "max_kl", "max_kl=x"):
        refused = cli("quantize", source, "--target", wrong)
        assert refused.returncode == 2, refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_a_torch_format_is_built_and_summed_up(cli: Cli, tmp_path: Path, tiny_chat: Path) -> None:
    spec = {"method": "gptq", "format": "gptq", "calibration": {"samples": 4, "length": 32}}
    recipe, cache = json.dumps(spec), tmp_path / "cache"
    done = cli("quantize", tiny_chat, "--recipe", recipe, "--device", "cpu", "--cache", cache)
    assert done.returncode == 0, done.stderr
    found = LINE.fullmatch(done.stdout)
    assert found is not None, done.stdout
    assert found[2].startswith("custom-")
    assert re.search(r"84 modules, output error 0\.\d\d of round-to-nearest's \(median\)", done.stderr)
    stages = [line.split()[1] for line in done.stderr.splitlines()]
    assert "calibrate" in stages
    again = cli("quantize", tiny_chat, "--recipe", recipe, "--cache", cache)
    assert again.stdout == done.stdout.replace("built", "cached", 1)


TRUNCATED = r"model.safetensors is truncated: tensor '[\w.]+' ends at byte [\d,]+ of [\d,]+"
NO_GROUPS = (
    r"model.safetensors: tensor 'model.layers.0.self_attn.q_proj.weight': "
    r"64 input columns do not divide into groups of 128"
)
UNKNOWN = r"config.json: architecture 'MambaForCausalLM' is not supported \(known: .*\)"


@pytest.mark.parametrize(
    ("recipe", "spoil", "said"),
    [
        ("q8_0", "cut", TRUNCATED),
        ("w4a16", "cut", TRUNCATED),
        ("w4a16", None, NO_GROUPS),
        ("q8_0", "architecture", UNKNOWN),
        ("nf4", "architecture", UNKNOWN),
    ],
)
def test_what_headers_show_is_one_line_and_leaves_no_file(
    cli: Cli, tmp_path: Path, recipe: str, spoil: str | None, said: str
) -> None:
    """Before anything is hashed."""
    model, cache = write_checkpoint(tmp_path / "model"), tmp_path / "cache"
    if spoil == "cut":
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    if spoil == "architecture":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    done = cli("quantize", model, "--recipe", recipe, "--cache", cache)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"quantserve: model:{recipe}: {said}\n", done.stderr), done.stderr
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_ls(cli: Cli, cache: Path) -> None:
    (row,) = listed(cli, cache)
    assert row["state"] == "built"
    assert row["id"] == "tiny-chat:q8_0"
    head, line = cli("variants", "ls", "--cache", cache).stdout.splitlines()
    assert head.split() == ["ID", "KEY", "SIZE", "BITS", "USED"]
    assert line.split()[:2] == ["tiny-chat:q8_0", row["key"]]


def test_an_empty_cache(cli: Cli, tmp_path: Path) -> None:
    done = cli("variants", "ls", "--cache", tmp_path / "none")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("no variants yet")
    assert not (tmp_path / "none").exists()
    assert listed(cli, tmp_path / "none") == []


def test_verify_and_rm(cli: Cli, cache: Path, tmp_path: Path) -> None:
    mine = tmp_path / "cache"
    shutil.copytree(cache, mine)
    (row,) = listed(cli, mine)
    key = str(row["key"])
    sound = cli("variants", "verify", "tiny-chat:q8_0", "--cache", mine)
    assert (sound.returncode, sound.stdout) == (0, f"ok tiny-chat:q8_0 {key}\n")

    model = mine / "variants" / key / "model.gguf"
    with model.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    broken = cli("variants", "verify", "--cache", mine)
    assert broken.returncode == 1
    assert broken.stdout.startswith(f"damaged tiny-chat:q8_0 {key}: ")

    model.write_bytes(b"cut")
    assert [row["state"] for row in listed(cli, mine)] == ["damaged"]
    assert cli("variants", "verify", "--cache", mine).stdout.startswith(f"damaged - {key}: ")

    VariantStore(mine).quarantine(key)
    assert [row["state"] for row in listed(cli, mine)] == ["quarantined"]
    assert cli("variants", "verify", "--cache", mine).stdout == ""
    gone = cli("variants", "rm", key[:8], "--cache", mine)
    assert (gone.returncode, gone.stdout) == (0, f"removed quarantined {key}\n")
    assert listed(cli, mine) == []
    again = cli("variants", "rm", key, "--cache", mine)
    assert again.returncode == 1
    assert again.stderr.startswith(f"quantserve: no variant '{key}'")


def test_rm_refuses_before_it_removes_anything(cli: Cli, cache: Path) -> None:
    done = cli("variants", "rm", "tiny-chat:q8_0", "tiny-chat:q2_k", "--cache", cache)
    assert done.returncode == 1
    assert len(listed(cli, cache)) == 1


def test_pull_checks_a_folder_and_says_when_the_hub_is_out_of_reach(
    cli: Cli, tmp_path: Path, tiny_chat: Path
) -> None:
    done = cli("pull", tiny_chat, "--cache", tmp_path / "cache")
    assert done.returncode == 0
    assert done.stdout.startswith(f"pulled {tiny_chat} {tiny_chat} ")
    away = cli("pull", "no-such-org/no-such-model", "--cache", tmp_path / "cache")
    assert away.returncode == 1
    (line,) = away.stderr.splitlines()
    assert line.startswith("quantserve: ")


def test_a_cache_that_cannot_be_made_is_named(tiny_chat: Path, cli: Cli) -> None:
    refused = cli("quantize", tiny_chat, "--cache", "/proc/none")
    assert refused.returncode == 1
    assert "cannot write to the cache /proc/none" in refused.stderr
    assert refused.stderr.count("\n") == 1
