"""The presets that there are for a source on a device, in order."""

from collections.abc import Mapping
from dataclasses import dataclass

from quant.recommend.facts import Facts, read_facts
from quant.recommend.gguf import gguf_options
from quant.recommend.needs import Need, Option
from quant.recommend.torch_ import torch_options
from quant.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    facts: Facts
    options: tuple[Option, ...]  # best first, those that do not fit last
    refused: Mapping[str, str]  # presets that cannot be made, and why


def recommend(source: Source, need: Need) -> Advice:
    """Raises BadRecipe for an unknown task or too long a context, BadSource for a source that is no model."""
    facts = read_facts(source)
    need.check(facts.context)
    options, refused = list(gguf_options(facts, need)), dict[str, str]()
    if need.device == "cuda" and source.kind == "hf":
        more, refused = torch_options(source, facts, need)
        options += more
    return Advice(facts=facts, options=tuple(sorted(options, key=lambda o: o.place(need))), refused=refused)
