"""The torch road: what a variant has, what is told, what is refused, what a killed build goes on with."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.errors import BadRecipe, BadSource, BuildFailed, Cancelled, QuantError, UnsupportedArchitecture
from quant.plan import require_buildable
from quant.progress import Progress
from quant.recipe import parse_recipe
from quant.source import open_source
from quant.stream import machine, shards
from tests.quant.checkpoints import write_json
from tests.quant.stream.checkpoints import TOKENS, build, decoded, family_checkpoint, kl, logits_of
from tests.quant.variants import files_in

GPTQ: dict[str, Any] = {"method": "gptq", "format": "gptq"}
RTN: dict[str, Any] = {"method": "rtn", "format": "compressed-tensors"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases and a head of its own."""
    return family_checkpoint(tmp_path_factory.mktemp("models") / "qwen", "Qwen2ForCausalLM")


@pytest.fixture
def model(qwen: Path, tmp_path: Path) -> Path:
    """One that a test may spoil."""
    return Path(shutil.copytree(qwen, tmp_path / "model"))


def left(cache: Path) -> list[str]:
    return [name for name in files_in(cache) if name != "digests.json"]


def test_a_variant_has_what_readers_and_the_server_need(qwen: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    variant = build(qwen, GPTQ, tmp_path, seen.append).variant
    names = {file.path for file in variant.manifest.files}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "text.json", "quantization.json"}
    assert {path.name for path in variant.path.iterdir()} == names | {"manifest.json", "build.json"}
    config = json.loads((variant.path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert json.loads((variant.path / "quantize_config.json").read_text()) == config["quantization_config"]
    assert list(dict.fromkeys(one.stage for one in seen)) == ["check", "quantize", "assemble", "publish"]
    told = [one for one in seen if one.detail and one.detail.module]
    report = json.loads((variant.path / "quantization.json").read_text())
    assert [one.detail and one.detail.module for one in told] == [one["module"] for one in report["modules"]]
    assert [one.done for one in told] == list(range(1, 15))
    assert all(one["loss"] <= one["rtn_loss"] and one["damping"] for one in report["modules"])
    made = json.loads((variant.path / "build.json").read_text())
    assert [one["block"] for one in made["blocks"]] == [0, 1]
    assert (made["device"], made["resumed"]) == ("cpu", False)
    assert variant.manifest.builder.packages.keys() == {"torch", "transformers"}


def test_biases_and_what_is_skipped_keep_their_numbers(qwen: Path, tmp_path: Path) -> None:
    spec = {**RTN, "skip": ["down_proj"], "overrides": [["layers.1", {"bits": 8}], ["layers.0.mlp", None]]}
    variant = build(qwen, spec, tmp_path).variant
    ours, source = decoded(variant.path, "compressed-tensors"), decoded_source(qwen)
    assert ours.keys() == source.keys()
    for name, weight in source.items():
        kept = "_proj.weight" not in name or "down_proj" in name or "layers.0.mlp" in name
        assert torch.equal(ours[name], weight) == kept, name
    eight, four = (relative(ours, source, f"model.layers.{n}.self_attn.q_proj.weight") for n in (1, 0))
    assert eight < four / 8
    assert kl(logits_of(variant.path, ours), logits_of(variant.path)) < 1e-3  # transformers reads mixtures


def decoded_source(folder: Path) -> dict[str, torch.Tensor]:
    from quant.checkpoint import checkpoint_tensors
    from quant.tensors import read_tensors

    return {name: tensor.float() for name, tensor in read_tensors(checkpoint_tensors(folder)).items()}


def relative(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], name: str) -> float:
    return float((one[name] - other[name]).norm() / other[name].norm())


def test_many_shards_say_the_same(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(qwen, RTN, tmp_path / "one").variant
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    parts = build(qwen, RTN, tmp_path / "many").variant
    assert len(list(parts.path.glob("model-*.safetensors"))) > 3
    ours, theirs = decoded(whole.path, RTN["format"]), decoded(parts.path, RTN["format"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits_of(whole.path), logits_of(parts.path))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_plain_weights_are_the_sources(qwen: Path, tmp_path: Path, dtype: str) -> None:
    variant = build(qwen, {"method": "copy", "format": "plain", "dtype": dtype}, tmp_path).variant
    assert variant.manifest.bits_per_weight == {"bf16": 16, "f16": 16, "f32": 32}[dtype]
    assert kl(logits_of(qwen), logits_of(variant.path)) < 1e-6
    assert json.loads((variant.path / "config.json").read_text())["torch_dtype"] in {
        "bfloat16",
        "float16",
        "float32",
    }


# -- refused ---------------------------------------------------------------------------------------


def spoil_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", {**config, **changes})


def put_nan(model: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors[name][0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def without(model: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {key: value for key, value in load_file(model / "model.safetensors").items() if key != name}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


V = "model.layers.1.self_attn.v_proj"
BEFORE: dict[str, tuple[Callable[[Path], None], dict[str, Any], type[QuantError], str]] = {
    "truncated": (cut, RTN, BadSource, "model.safetensors is truncated: tensor"),
    "group": (
        lambda model: None,
        {**RTN, "overrides": [["down", {"bits": 4, "group": 128}]], "scheme": {"bits": 4, "group": 64}},
        BadRecipe,
        r"^model.safetensors: tensor 'model.layers.0.mlp.down_proj.weight': "
        "160 input columns do not divide into groups of 128",
    ),
    "rows of bitsandbytes": (
        lambda model: None,
        {"method": "nf4", "format": "bnb4"},
        BadRecipe,
        r"^model.safetensors: tensor 'model.layers.0.mlp.down_proj.weight': "
        "bitsandbytes' kernels for CPUs misread rows of 160 columns",
    ),
    "architecture": (
        lambda model: spoil_config(model, architectures=["MambaForCausalLM"]),
        RTN,
        UnsupportedArchitecture,
        "MambaForCausalLM",
    ),
    "quantized": (
        lambda model: spoil_config(model, quantization_config={"bits": 4}),
        RTN,
        BadSource,
        "full-precision",
    ),
    "code": (
        lambda model: spoil_config(model, auto_map={"a": "b"}),
        RTN,
        BadSource,
        "config.json has an auto_map",
    ),
    "pickle": (pickled, RTN, BadSource, "pytorch_model.bin' is a pickle"),
    "missing": (lambda model: without(model, f"{V}.weight"), RTN, BadSource, f"no tensor {V}.weight"),
    "no bias": (
        lambda model: without(model, f"{V}.bias"),
        RTN,
        BadSource,
        "differ in tensor 'self_attn.v_proj.bias'",
    ),
    "hidden": (lambda model: spoil_config(model, hidden_size=64), RTN, BadSource, "embed_tokens.*implies"),
    "samples": (
        lambda model: None,
        {**GPTQ, "calibration": {"length": 65}},
        BadRecipe,
        "samples of 65 tokens exceed the model's context of 64",
    ),
    "nothing": (lambda model: None, {**RTN, "skip": ["model"]}, BadRecipe, "nothing to quantize"),
}


@pytest.mark.parametrize("what", BEFORE)
def test_what_headers_show_is_refused_before_anything_is_written(what: str, tmp_path: Path) -> None:
    spoil, spec, error, words = BEFORE[what]
    wide = {"intermediate_size": 160} if what in {"group", "rows of bitsandbytes"} else {}
    model = family_checkpoint(tmp_path / "model", "Qwen2ForCausalLM", **wide)
    spoil(model)
    with pytest.raises(error, match=words) as caught:
        require_buildable(open_source(str(model), cache=tmp_path / "cache"), parse_recipe(spec))
    assert str(caught.value).isprintable()
    seen: list[Progress] = []
    with pytest.raises(error, match=words):
        build(model, spec, tmp_path / "cache", seen.append, tokens=None)
    assert {one.stage for one in seen} <= {"pull"}
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (2, r"^model.safetensors: tensor '.*q_proj.weight' has shape .* but config.json implies"),
        (3, "num_attention_heads must be a multiple of num_key_value_heads"),
    ],
)
def test_heads_that_are_not_the_weights_are_refused(
    model: Path, tmp_path: Path, heads: int, words: str
) -> None:
    spoil_config(model, num_attention_heads=heads)
    with pytest.raises(BadSource, match=words):
        require_buildable(open_source(str(model), cache=tmp_path / "cache"), parse_recipe(RTN))
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "name", [f"{V}.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
)
def test_nan_weights_stop_the_build_with_file_and_tensor(model: Path, tmp_path: Path, name: str) -> None:
    put_nan(model, name)
    with pytest.raises(BadSource, match=f"model.safetensors: tensor '{name}' has NaN or infinite values"):
        build(model, GPTQ, tmp_path / "cache")
    assert left(tmp_path / "cache") == []


def test_a_refused_build_takes_the_calibration_text_along_that_it_made(model: Path, tmp_path: Path) -> None:
    put_nan(model, f"{V}.weight")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Plants grow in the light of the sun. " * 200)
    look = {"corpus": str(corpus), "samples": 2, "length": 8}
    with pytest.raises(BadSource, match=f"tensor '{V}.weight' has NaN or infinite values"):
        build(model, {**GPTQ, "calibration": look}, tmp_path / "cache", tokens=None)
    assert left(tmp_path / "cache") == []


def test_nan_weights_that_end_the_sources_own_text_are_named_too(model: Path, tmp_path: Path) -> None:
    put_nan(model, f"{V}.weight")
    with pytest.raises(BadSource, match=f"model.safetensors: tensor '{V}.weight' has NaN or infinite values"):
        build(model, {**GPTQ, "calibration": {"samples": 2, "length": 8}}, tmp_path / "cache", tokens=None)
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_beyond_float16_scales_are_refused_by_name(model: Path, tmp_path: Path, method: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors[f"{V}.weight"][3, 5] = 1e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadSource, match=f"model.safetensors: tensor '{V}.weight' has weights too large for"):
        build(model, {"method": method, "format": "gptq"}, tmp_path / "cache")
    assert left(tmp_path / "cache") == []
    assert build(model, RTN, tmp_path / "cache").variant  # whose scales are of the source's type


def test_an_output_that_overflows_stops_the_build_with_the_module(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e35
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e35
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(BuildFailed, match=r"model\.layers\.0\.mlp\.up_proj: .* not finite"):
        build(model, GPTQ, tmp_path / "cache")
    assert left(tmp_path / "cache") == []


def test_a_number_that_the_files_type_cannot_hold_is_named(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadSource, match=r"model\.norm\.weight' has numbers that float16 cannot hold"):
        build(model, {"method": "copy", "format": "plain", "dtype": "f16"}, tmp_path / "cache")
    assert left(tmp_path / "cache") == []


# -- interrupted -----------------------------------------------------------------------------------


def interrupted(model: Path, cache: Path, after: int, spec: Any = GPTQ) -> None:
    """Stop, as Ctrl-C does, when so many modules are done."""

    def stop(progress: Progress) -> None:
        if progress.stage == "quantize" and progress.done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, spec, cache, stop)


@pytest.mark.parametrize("spec", [GPTQ, RTN], ids=["gptq", "rtn"])
def test_a_finished_block_is_not_done_again(qwen: Path, tmp_path: Path, spec: Any) -> None:
    interrupted(qwen, tmp_path / "a", 9, spec)
    seen: list[Progress] = []
    resumed = build(qwen, spec, tmp_path / "a", seen.append).variant
    modules = [one.detail.module for one in seen if one.detail and one.detail.module]
    assert len(modules) == 7
    assert all(str(name).startswith("model.layers.1.") for name in modules)
    assert json.loads((resumed.path / "build.json").read_text())["resumed"]
    calm = build(qwen, spec, tmp_path / "b").variant
    assert (resumed.path / "manifest.json").read_bytes() == (calm.path / "manifest.json").read_bytes()


def test_hidden_states_in_memory_are_those_on_disk(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs: then a killed build replays its finished blocks."""
    calm = build(qwen, GPTQ, tmp_path / "disk").variant
    monkeypatch.setattr(machine, "home_of", lambda size, device: torch.device("cpu"))
    memory = build(qwen, GPTQ, tmp_path / "memory").variant
    interrupted(qwen, tmp_path / "resumed", 9)
    resumed = build(qwen, GPTQ, tmp_path / "resumed").variant
    for other in (memory, resumed):
        assert (other.path / "manifest.json").read_bytes() == (calm.path / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda patch: patch.setattr("quant.stream.road.builder_version", lambda _recipe: 99),
            "builder was 2, and is 99",
        ),
        (lambda patch: patch.setattr("quant.stream.road.versions", lambda *_: {"torch": "9"}), "torch was"),
    ],
)
def test_another_identity_starts_afresh_and_says_why(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], why: str
) -> None:
    interrupted(qwen, tmp_path, 9)
    change(monkeypatch)
    seen: list[Progress] = []
    variant = build(qwen, GPTQ, tmp_path, seen.append).variant
    notes = [one.detail.note for one in seen if one.detail and one.detail.note]
    assert len(notes) == 1
    assert notes[0].startswith(f"starting afresh: {why}")
    assert len([one for one in seen if one.detail and one.detail.module]) == 14
    made = json.loads((variant.path / "build.json").read_text())
    assert why in made["restarted"]
    assert not made["resumed"]


def test_other_calibration_tokens_start_afresh(qwen: Path, tmp_path: Path) -> None:
    interrupted(qwen, tmp_path, 9)
    seen: list[Progress] = []
    build(qwen, GPTQ, tmp_path, seen.append, tokens=TOKENS.flip(0))
    assert any(one.detail and one.detail.note and "calibration text was" in one.detail.note for one in seen)


def test_a_block_that_was_lost_is_done_again(qwen: Path, tmp_path: Path) -> None:
    """Though the hidden states are beyond it."""
    calm = build(qwen, GPTQ, tmp_path / "calm").variant
    interrupted(qwen, tmp_path / "a", 9)
    (block,) = (tmp_path / "a").rglob("0.safetensors")
    block.unlink()
    again = build(qwen, GPTQ, tmp_path / "a").variant
    assert (again.path / "manifest.json").read_bytes() == (calm.path / "manifest.json").read_bytes()


@pytest.mark.parametrize("stage", ["check", "quantize", "assemble", "publish"])
@pytest.mark.parametrize(
    "error", [Cancelled("stop"), OSError(28, "No space left on device"), ZeroDivisionError()]
)
def test_an_error_at_any_stage_leaves_nothing(
    qwen: Path, tmp_path: Path, stage: str, error: Exception
) -> None:
    def fail(progress: Progress) -> None:
        if progress.stage == stage and (stage != "quantize" or progress.done > 8):
            raise error

    with pytest.raises((QuantError, ZeroDivisionError)):
        build(qwen, GPTQ, tmp_path, fail)
    assert left(tmp_path) == []


def test_threads_are_part_of_the_identity(qwen: Path, tmp_path: Path) -> None:
    assert machine.difference(tmp_path / "none", {}) is None
    identity = {"threads": "1", "torch": "2"}
    machine.write_identity(tmp_path, identity)
    assert machine.difference(tmp_path, identity) is None
    assert machine.difference(tmp_path, {**identity, "threads": "2"}) == "threads was 1, and is 2"
    (tmp_path / machine.IDENTITY).write_bytes(b"{")
    assert machine.difference(tmp_path, identity) == "it does not say what it was made with"


ON_A_SMALL_DISK = """
import json, sys
from pathlib import Path
from quant.errors import QuantError
from tests.quant.stream.checkpoints import build

disk, model, stage, after = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
spec = {"method": "gptq", "format": "gptq", "calibration": {"samples": 6, "length": 24}}

def fill(progress):
    if progress.stage == stage and progress.done >= after and not (disk / "filler").exists():
        with open(disk / "filler", "ab", buffering=0) as filler:
            try:
                while filler.write(b"x" * 4096):
                    pass
            except OSError:
                pass

code = "none"
try:
    build(model, spec, disk / "cache", fill)
except QuantError as error:
    code = error.code
left = [path.name for path in (disk / "cache").rglob("*") if path.is_file()]
(disk / "filler").unlink()
print(json.dumps([code, left, build(model, spec, disk / "cache").outcome]))
"""


@pytest.mark.parametrize(
    ("stage", "after"), [("quantize", 0), ("quantize", 8), ("assemble", 0), ("publish", 0)]
)
def test_a_disk_that_fills_up_at_any_stage(qwen: Path, tmp_path: Path, stage: str, after: int) -> None:
    """A real file system of 4 MiB, mounted in a name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    allowed = subprocess.run([*inside, f"mount -t tmpfs none {disk}"], check=False, capture_output=True)
    if allowed.returncode:
        pytest.skip("file systems cannot be mounted here")
    run = f'{sys.executable} -c "$0" {disk} {qwen} {stage} {after}'
    ended = subprocess.run(
        [*inside, f"mount -t tmpfs -o size=4m none {disk} && exec {run}", ON_A_SMALL_DISK],
        check=False,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == ["disk_full", ["digests.json"], "built"]
