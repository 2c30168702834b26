"""Short texts of our own that start what models write: to calibrate with, to search with, to evaluate with.

The sets are disjoint: whoever measures a variant must not use what it was made or chosen with.
"""

from importlib.resources import files
from typing import Literal

PromptSet = Literal["calibration", "search", "evaluation"]


def prompts(which: PromptSet) -> tuple[str, ...]:
    """In a fixed order: instructions, questions, stories, code and data, in several languages."""
    text = files("quant").joinpath("data", f"{which}.txt").read_text(encoding="utf-8")
    return tuple(text.removesuffix("\n").split("\n%\n"))
