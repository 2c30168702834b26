"""Loading: little memory, little time, and one clear line for a checkpoint that cannot be served."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.errors import OpenError
from tests.server.backends.torch_.conftest import save_random
from tests.server.backends.torch_.quantized import KINDS, write
from tests.server.backends.torch_.support import open_model

MB = 1 << 20
SLACK = 16 * MB  # the allocator's, and one layer that is being merged or unpacked
PROGRAM = """
import ctypes, gc, json, sys, time
from pathlib import Path
from tests.server.backends.torch_.support import open_model
import server.backends.torch_.opening

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def measured(folder, weights):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = status("VmRSS"), time.process_time()
    executor = open_model(Path(folder), parallel=1, context=32, options={"weights": weights})
    peak, seconds = status("VmHWM") - before, time.process_time() - began
    ctypes.CDLL(None).malloc_trim(0)
    held = status("VmRSS") - before
    executor.close()
    return peak, held, seconds

first, *rest = json.loads(sys.argv[1])
measured(*first)  # imports
seconds = [measured(*each)[2] for each in rest]  # and each format has made what it makes once
print(json.dumps([(*measured(*each)[:2], taken) for each, taken in zip(rest, seconds)]))
"""
# Freed memory goes back at once: what is resident is what is held, not what malloc keeps for later.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
FORMATS = ("plain", *KINDS)


@dataclass(frozen=True)
class Loading:
    """Bytes at the worst moment and after it, beside what the process had; seconds of a processor."""

    peak: int
    held: int
    seconds: float


def measure(*models: tuple[Path, str]) -> list[Loading]:
    """Loading folders with weights of the kind "packed" or "dense" one after the other, in one process."""
    wanted = json.dumps([[str(folder), weights] for folder, weights in models])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, wanted],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | MALLOC,
    )
    return [Loading(*each) for each in json.loads(done.stdout)]


@dataclass(frozen=True)
class Loaded:
    folder: Path
    packed: Loading
    dense: Loading

    @property
    def shards(self) -> list[int]:
        return [path.stat().st_size for path in self.folder.glob("*.safetensors")]


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory, family_folder: Callable[[str], Path]
) -> dict[str, Loaded]:
    """A model of 22 million weights in every format, in shards."""
    place = tmp_path_factory.mktemp("loading")
    size: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5}
    plain = save_random(place / "plain", "llama", max_shard_size="25MB", vocab_size=4000, **size)
    folders = {"plain": plain}
    for kind in KINDS:
        folders[kind] = place / kind
        write(folders[kind], plain, kind, shards=4)
    wanted = [(folder, weights) for folder in folders.values() for weights in ("packed", "dense")]
    found = iter(measure((family_folder("llama"), "dense"), *wanted))
    return {kind: Loaded(folder, next(found), next(found)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_loading_holds_the_weights_and_one_shard(kind: str, loaded: dict[str, Loaded]) -> None:
    it = loaded[kind]
    assert len(it.shards) > 2
    assert it.packed.peak < sum(it.shards) + max(it.shards) + SLACK
    assert it.dense.peak < it.dense.held + max(it.shards) + SLACK  # where a CPU unpacks them


@pytest.mark.parametrize("weights", ["packed", "dense"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_loaded_model_lets_go_of_its_files(kind: str, weights: str, loaded: dict[str, Loaded]) -> None:
    """A tensor that is a view of a mapped file keeps all of it in memory."""
    folder = loaded[kind].folder
    executor = open_model(folder, parallel=1, context=32, options={"weights": weights})
    gc.collect()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    executor.close()
    assert not [name for name in mapped if name.startswith(str(folder))]


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, tiny_chat: Path, family_folder: Callable[[str], Path]
) -> dict[str, Loading]:
    place = tmp_path_factory.mktemp("tiny")
    for kind in KINDS:
        write(place / kind, tiny_chat, kind)
    folders = [tiny_chat, *(place / kind for kind in KINDS)]
    found = measure((family_folder("llama"), "auto"), *((folder, "auto") for folder in folders))
    return dict(zip(FORMATS, found, strict=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_tiny_chat_loads_in_seconds(kind: str, tiny: dict[str, Loading]) -> None:
    assert tiny[kind].seconds < 3


WAITING = """
import sys
from server.backends.torch_.backend import PLAIN
from server.types import Open

PLAIN.open(Open(backend="plain", variant=sys.argv[1], context=32, parallel=1), lambda _: None)
"""


@pytest.mark.parametrize(("given", "expected"), [({}, "'1000'"), ({"GOMP_SPINCOUNT": "77"}, "'77'")])
def test_threads_that_wait_for_each_other_spin_only_for_a_moment(
    given: dict[str, str], expected: str, family_folder: Callable[[str], Path]
) -> None:
    """As OpenMP's library itself reports it when it is loaded."""
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", WAITING, str(family_folder("llama"))],
        env=plain | given | {"OMP_DISPLAY_ENV": "verbose"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if not (lines := [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]):
        pytest.skip("torch is built without GNU OpenMP here")
    assert lines[0].split("=")[1].strip() == expected


# -- what cannot be served ----------------------------------------------------------------------------


def copy_with(source: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_missing_tensor_is_named(tiny_chat: Path, tmp_path: Path) -> None:
    folder = copy_with(tiny_chat, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OpenError, match=r"lacks tensor model\.layers\.3\.mlp\.up_proj\.weight"):
        open_model(folder)


def test_a_tensor_with_no_place_is_named(tiny_chat: Path, tmp_path: Path) -> None:
    folder = copy_with(tiny_chat, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.extra.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OpenError, match=r"no place for tensor model\.layers\.0\.extra\.weight"):
        open_model(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 128}, "config.json asks for"),
        ({"model_type": "no-such"}, "transformers cannot read config.json"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic RoPE"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(
    changes: dict[str, object], words: str, tiny_chat: Path, tmp_path: Path
) -> None:
    with pytest.raises(OpenError, match=words) as error:
        open_model(copy_with(tiny_chat, tmp_path / "m", **changes))
    assert "\n" not in str(error.value)


def test_a_model_that_keeps_other_state_is_refused(tmp_path: Path) -> None:
    folder = save_random(tmp_path, "mamba", state_size=8, num_hidden_layers=1, hidden_size=32)
    with pytest.raises(OpenError, match="Mamba"):
        open_model(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devise": "cpu"}, "unknown option 'devise'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"step_tokens": "1e9"}, "step_tokens"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_options_that_are_wrong_are_named(options: dict[str, str], words: str, tiny_chat: Path) -> None:
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(OpenError, match=words):
        open_model(tiny_chat, options=options)


def test_a_context_beyond_the_models_positions_is_refused(tiny_chat: Path) -> None:
    with pytest.raises(OpenError, match="positions end at 1024"):
        open_model(tiny_chat, context=2000)


def test_kv_memory_that_is_not_there_is_refused_with_the_numbers(tiny_chat: Path) -> None:
    with pytest.raises(OpenError, match=r"KV memory for 2,000,000,000 tokens needs"):
        open_model(tiny_chat, kv_tokens=2_000_000_000)
