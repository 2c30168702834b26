"""The page on methods shows the figures that were committed, and has something on every method."""

import json
import re
from pathlib import Path

from docs.build import with_tables
from quant.torch_recipe import METHODS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quantization.md").read_text()
FIGURES = ROOT / "docs" / "figures"


def test_tables_are_those_of_the_figures() -> None:
    assert with_tables(PAGE, json.loads((FIGURES / "quality.json").read_text())) == PAGE


def test_every_method_has_a_section() -> None:
    """`copy` only changes the number type."""
    headings = " ".join(re.findall(r"^## .*", PAGE, re.MULTILINE))
    named = set(re.findall(r"`([^`]+)`", headings)) | {"smoothquant"}
    assert METHODS - {"copy"} <= named
    assert "SmoothQuant" in headings
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[4:]:
        for words in ("**What it does.**", "**Source.**", "**When.**", "| variant |"):
            assert words in part, part[:40]


def test_pictures_are_small() -> None:
    pictures = list(FIGURES.glob("*.svg"))
    assert {f"figures/{picture.name}" for picture in pictures} == set(re.findall(r"\((figures/\S+)\)", PAGE))
    assert all(picture.stat().st_size < 100_000 for picture in pictures)
