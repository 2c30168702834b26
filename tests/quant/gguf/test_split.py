"""Models in several GGUF files: the first part stands for all of them, and parts that do not belong together
are refused before llama.cpp sees them."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from quant.errors import BadSource
from quant.gguf.header import read_header
from quant.gguf.kquant import quantize
from quant.recipe import GgufRecipe
from quant.source import open_source
from tests.server.backends.llama.conftest import open_model
from tests.server.backends.llama.support import Line, step

FIRST, SECOND = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"


@pytest.fixture(scope="module")
def parts(gguf_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny-chat in two parts, as gguf-py writes them."""
    folder = tmp_path_factory.mktemp("parts")
    reader = gguf.GGUFReader(gguf_f32 / "model.gguf")
    half = -(-len(reader.tensors) // 2)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=half)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], of)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.fixture
def copied(parts: Path, tmp_path: Path) -> Path:
    for name in (FIRST, SECOND):
        (tmp_path / name).hardlink_to(parts / name)
    return tmp_path


def test_the_first_part_stands_for_all(parts: Path, gguf_f32: Path) -> None:
    whole, joined = read_header(gguf_f32 / "model.gguf"), read_header(parts / FIRST)
    assert [(one.name, one.shape) for one in joined.tensors] == [
        (one.name, one.shape) for one in whole.tensors
    ]
    assert joined.bits_per_weight == whole.bits_per_weight
    assert joined.bytes == sum(file.stat().st_size for file in parts.iterdir())
    assert open_source(str(parts / FIRST), cache=parts.parent / "cache").bytes == joined.bytes


def test_it_is_served_and_quantized_like_one_file(parts: Path, gguf_f32: Path, tmp_path: Path) -> None:
    files = [gguf_f32 / "model.gguf", parts / FIRST]
    tokens = []
    for file in files:
        opened = open_model(file, parallel=1, options={"kv_type": "f32"})
        tokens.append(step(opened.executor, [Line([5, 6, 7]).row(0, 0)])[0].token)
        opened.executor.close()
    assert tokens[0] == tokens[1]

    recipe = GgufRecipe(type="q4_0", overrides=(("ffn_down", "q8_0"),))
    made = [tmp_path / "whole.gguf", tmp_path / "joined.gguf"]
    for source, target in zip(files, made, strict=True):
        quantize(source, target, recipe, progress=lambda _done, _total: None, threads=1)
    assert made[0].read_bytes() == made[1].read_bytes()


@pytest.mark.parametrize(
    ("spoil", "name", "what"),
    [
        (lambda folder: None, SECOND, "part 2 of 2 of a split model; name the first"),
        (lambda folder: (folder / SECOND).unlink(), FIRST, "not all of its 2 parts"),
        (
            lambda folder: (folder / FIRST).rename(folder / "m.gguf"),
            "m.gguf",
            r"ends with -00001-of-00002\.gguf",
        ),
        (
            lambda folder: (
                (folder / FIRST).replace(folder / SECOND) and (folder / FIRST).hardlink_to(folder / SECOND)
            ),
            FIRST,
            "this is not part 2 of 2",
        ),
    ],
    ids=["second", "missing", "renamed", "twice"],
)
def test_parts_that_do_not_belong_together_are_refused(
    spoil: Callable[[Path], object], name: str, what: str, copied: Path
) -> None:
    spoil(copied)
    with pytest.raises(BadSource, match=what):
        read_header(copied / name)
