"""`import quant` is for everybody: it offers the whole of it and loads none of it."""

import subprocess
import sys
from pathlib import Path

import pytest

import quant

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "gguf", "huggingface_hub", "tokenizers", "torch", "transformers", "llama_cpp")


def loaded_by(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split())


def test_every_name_is_there() -> None:
    from quant import pipeline, recipe, source

    assert all(hasattr(quant, name) for name in quant.__all__)
    assert quant.build_variant is pipeline.build_variant
    assert quant.open_source is source.open_source
    assert quant.PRESETS is recipe.PRESETS
    with pytest.raises(AttributeError, match="nothing"):
        _ = quant.nothing


def test_importing_the_package_loads_no_module_of_it() -> None:
    assert {name for name in loaded_by("import quant") if name.startswith("quant")} == {"quant"}


def test_nothing_heavy_is_loaded_before_a_build(tmp_path: Path) -> None:
    code = "import quant.pipeline, quant.plan\nfrom quant import *\n"
    code += f"open_source('models/tiny-chat', cache=__import__('pathlib').Path({str(tmp_path)!r}))"
    assert not loaded_by(code) & set(HEAVY)
