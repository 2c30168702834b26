"""A model whose divergences are known: groups mind differently, and texts differ a little."""

import math
import random
import re
from collections.abc import Mapping

from msgspec.structs import replace

from quant.gguf.mixture import Stack, row_bytes, tensor_type
from quant.measure.measurement import Figure
from quant.recipe import GgufRecipe, Recipe
from quant.search.decide import Confirm, ProbeTypes, Step, Stop, TryRecipe, next_step
from quant.search.evidence import Evidence, Probe, Try
from quant.search.gguf_space import PRESETS, gguf_mixture, group_of
from quant.search.space import ERRORS, Preset, Space, from_large
from quant.search.target import Target

LAYERS = 8
FIXED = 1_000_000
TEXTS = 600_000  # of those, in files that count for no bits of weights
NOTHING = Evidence()
STACK = Stack(layers=LAYERS, shared_heads=2, tied=True)
SHAPES = {
    "attn_q": (256, 256),
    "attn_k": (128, 256),
    "attn_v": (128, 256),
    "attn_output": (256, 256),
    "ffn_gate": (1024, 256),
    "ffn_up": (1024, 256),
    "ffn_down": (256, 1024),
}
FUSED = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))


WEIGHTS = {
    "token_embd.weight": (8192, 256),
    **{f"blk.{layer}.{role}.weight": SHAPES[role] for layer in range(LAYERS) for role in SHAPES},
}


def space() -> Space:
    groups = [group_of("token_embd", ["token_embd.weight"], WEIGHTS)]
    for layer in range(LAYERS):
        for roles in FUSED:
            names = [f"blk.{layer}.{role}.weight" for role in roles]
            groups.append(group_of(f"{roles[0]} {layer}", names, WEIGHTS))
    presets = [
        Preset(name=name, bytes=FIXED + _bytes(preset_types(name)), kind=KINDS.get(name)) for name in PRESETS
    ]
    return Space(
        groups=tuple(groups),
        presets=from_large(presets),
        fixed=FIXED,
        elements=sum(rows * columns for rows, columns in WEIGHTS.values()),
        make=gguf_mixture,
        words="everything",
    )


KINDS = {"q8_0": "q8_0", "q6_k": "q6_k", "q5_k_m": "q5_k", "q4_k_m": "q4_k", "q3_k_m": "q3_k", "q2_k": "q2_k"}


def preset_types(name: str) -> dict[str, str]:
    return {tensor: tensor_type(name, tensor, shape[1], STACK) for tensor, shape in WEIGHTS.items()}


def _bytes(types: Mapping[str, str]) -> int:
    return sum(rows * row_bytes(types[name], columns) for name, (rows, columns) in WEIGHTS.items())


class World:
    """`scale`: how much the whole model minds. Some groups mind a hundred times as much as others.

    What has a divergence above `gate` is rejected.
    """

    def __init__(
        self, scale: float = 1.0, wobble: float = 0.04, carried: float = 1.15, gate: float = math.inf
    ) -> None:
        self.gate = gate
        self.space = space()
        dice = random.Random(7)
        self.minds = {
            tensor: scale * 10 ** dice.uniform(-1, 1)
            for group in self.space.groups
            for tensor in group.tensors
        }
        self.wobble, self.carried = wobble, carried
        self.steps: list[Step] = []

    def kl(self, types: Mapping[str, str], text: str) -> float:
        """Not quite additive, and another figure on other texts."""
        total = sum(self.minds[tensor] * ERRORS.get(kind, 2e-2) for tensor, kind in types.items())
        shaken = random.Random(f"{sorted(types.items())} {text}").uniform(1 - self.wobble, 1 + self.wobble)
        carried = self.carried if text == "evaluation" else 1.0
        return (total + 0.5 * total * math.sqrt(total)) * shaken * carried

    def search(self, target: Target, evidence: Evidence = NOTHING, most: int = 200) -> tuple[Stop, Evidence]:
        for _ in range(most):
            step = next_step(target, self.space, evidence)
            self.steps.append(step)
            match step:
                case Stop():
                    return step, evidence
                case TryRecipe(recipe, stage):
                    evidence = evidence.with_try(self.tried(recipe, stage))
                case ProbeTypes(types):
                    evidence = evidence.with_probe(self.probed(types))
                case Confirm(key):
                    (one,) = (one for one in evidence.tries if one.key == key)
                    evidence = evidence.with_try(replace(one, full=True))
        raise AssertionError("the search does not end")

    def probed(self, types: Mapping[str, str]) -> Probe:
        kinds = {
            tensor: types.get(group.name, "f16") for group in self.space.groups for tensor in group.tensors
        }
        size = 0 if len(types) == 1 else self.space.bytes(types)
        return Probe(types=dict(types), bytes=size, kl=Figure(self.kl(kinds, "search"), 1e-6))

    def tried(self, recipe: str | Recipe, stage: str) -> Try:
        if isinstance(recipe, str):
            kinds, name = preset_types(recipe), recipe
        else:
            kinds, name = self._types_of(recipe), recipe.name
        size = FIXED + _bytes(kinds) + 512  # a header that nobody predicts
        kl = self.kl(kinds, "evaluation")
        return Try(
            variant=name,
            recipe={"type": name},
            stage=stage,  # type: ignore[arg-type]
            key=name,
            bytes=size,
            bits_per_weight=8 * (size - TEXTS) / self.space.elements,
            kl=Figure(kl, 1e-5),
            top1=Figure(0.9, 0.01),
            texts=48,
            rejected="it is too far" if kl > self.gate else "",
        )

    def _types_of(self, recipe: Recipe) -> dict[str, str]:
        """As llama.cpp reads it: the first pattern that matches."""
        assert isinstance(recipe, GgufRecipe)
        tensors = [tensor for group in self.space.groups for tensor in group.tensors]
        found = {}
        for tensor in tensors:
            kinds = [kind for pattern, kind in recipe.overrides if re.search(pattern, tensor)]
            assert len(kinds) == 1, (tensor, kinds)  # exactly one pattern names it
            found[tensor] = kinds[0]
        return found
