"""Rounding learned by signed gradient descent on the output error of a whole block.

Cheng, Zhang, Shen, Cai, He, Lv, Liu: "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs", 2023 (arXiv 2309.05516). Code = round(w / s + v) with an offset v in [-1/2, 1/2] for
each weight and a factor for each scale. Gradients go straight through the rounding; only their signs are
used, with steps that fall to nought. Ours starts from any codes: w is what those were rounded from, so that
v = 0 is the start.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.layer import AffineLinear
from quant.methods.base import Block
from quant.methods.gptq import Compensated
from quant.methods.ranges import by_column
from quant.numerics import grouped

SEED = 17
OFFSET_TRAVEL = 0.05  # how far an offset gets if all its steps go one way
FACTOR_RATE = 0.05  # of a factor's steps, in an offset's: 1 % more scale moves the largest code by 0.07
REACH = (0.5, 1.5)  # of the factors
AT_ONCE = 4  # samples that the error is computed of


@dataclass(slots=True, eq=False)
class _Rounding:
    """What is learned of one linear."""

    start: AffineLinear
    aimed: Tensor  # float32 [out, in]
    offsets: Tensor  # float32 [out, in]
    factors: Tensor  # float32 [out, groups]

    @classmethod
    def of(cls, done: Compensated) -> "_Rounding":
        return cls(
            done.layer,
            done.aimed,
            torch.zeros_like(done.aimed),
            torch.ones_like(done.layer.scales, dtype=torch.float32),
        )

    def layer(self) -> AffineLinear:
        scheme, columns = self.start.scheme, self.aimed.shape[1]
        scales = (self.start.scales.float() * self.factors).to(self.start.scales.dtype)
        codes = self._signed(scales).round_().clamp_(0, scheme.top).to(self.start.codes.dtype)
        assert codes.shape[1] == columns
        return AffineLinear(scheme, codes, scales, self.start.zeros)

    def _signed(self, scales: Tensor) -> Tensor:
        scheme, columns = self.start.scheme, self.aimed.shape[1]
        places = self.aimed / by_column(scales, scheme, columns)
        return places.add_(self.offsets).add_(by_column(self.start.zeros, scheme, columns))

    def step(self, layer: AffineLinear, gradient: Tensor, rate: float) -> None:
        """Down the signs of the gradient [out, in] of the weights that `layer` gave."""
        scheme, columns = layer.scheme, self.aimed.shape[1]
        inside = self._signed(layer.scales)
        inside = (inside > -0.5) & (inside < scheme.top + 0.5)
        moved = layer.codes.float() - by_column(layer.zeros, scheme, columns)
        moved -= inside * self.aimed / by_column(layer.scales, scheme, columns)
        slope = grouped(gradient * moved, scheme).sum(2)
        self.factors.sub_(slope.sign_(), alpha=rate * FACTOR_RATE).clamp_(*REACH)
        self.offsets.sub_(gradient.sign() * inside, alpha=rate).clamp_(-0.5, 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What enters a block, what ought to leave it, and how much the error of each token counts."""

    hidden: Tensor  # float32 [samples, tokens, hidden]
    targets: Tensor
    weights: Tensor  # [samples, tokens, 1], 1 in the mean

    @classmethod
    def of(cls, hidden: Tensor, targets: Tensor) -> "Sample":
        """Errors count relative to the token's size: the norm that reads the output next divides by it, and
        a few tokens that are a hundred times larger would else be all that is learned from."""
        weights = 1.0 / targets.square().mean(-1, keepdim=True).clamp(min=1e-20)
        return cls(hidden, targets, weights / weights.mean())

    def part(self, which: Tensor) -> "Sample":
        return Sample(self.hidden[which], self.targets[which], self.weights[which])

    def split(self) -> tuple["Sample", "Sample"]:
        """(to learn from, to judge by): every fourth sample is held out; one sample has to do for both."""
        held = torch.arange(len(self.hidden), device=self.hidden.device) % 4 == 3
        return (self.part(~held), self.part(held)) if bool(held.any()) else (self, self)

    def error(self, block: Block) -> Tensor:
        return ((block(self.hidden) - self.targets).square() * self.weights).mean()


def learn_rounding(
    block: Block, sample: Sample, done: Mapping[str, Compensated], steps: int, batch: int
) -> dict[str, AffineLinear]:
    """The layers with the least error of the block's output on samples that are not learned from, among a few
    moments of the descent, the start among them. `batch`: samples a step. The block is float32 and holds
    some of the layers afterwards."""
    taught, held = sample.split()
    roundings = {name: _Rounding.of(one) for name, one in done.items()}
    best = {name: one.layer for name, one in done.items()}
    least = _error(block, held, best)
    order = _shuffled(len(taught.hidden), steps * batch).view(steps, batch)
    for step, some in enumerate(order):
        layers = {name: rounding.layer() for name, rounding in roundings.items()}
        if step and step % max(1, steps // 5) == 0 and (error := _error(block, held, layers)) < least:
            best, least = layers, error
        gradients = _gradients(block, taught.part(some), layers)
        for name, rounding in roundings.items():
            rounding.step(layers[name], gradients[name], 2.0 * OFFSET_TRAVEL * (1.0 - step / steps) / steps)
    layers = {name: rounding.layer() for name, rounding in roundings.items()}
    return layers if _error(block, held, layers) < least else best


def _shuffled(samples: int, count: int) -> Tensor:
    """Indices of samples, each as often as the others, in a random order that is always the same."""
    generator = torch.Generator().manual_seed(SEED)
    rounds = -(-count // samples)
    return torch.cat([torch.randperm(samples, generator=generator) for _ in range(rounds)])[:count]


def _gradients(block: Block, sample: Sample, layers: Mapping[str, AffineLinear]) -> dict[str, Tensor]:
    """Of the error of the block's output, with respect to each linear's weights."""
    weights = [block.linears[name].weight for name in layers]
    for weight, layer in zip(weights, layers.values(), strict=True):
        weight.data = layer.dequantize()
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(sample.error(block), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return dict(zip(layers, gradients, strict=True))


@torch.no_grad()
def _error(block: Block, sample: Sample, layers: Mapping[str, AffineLinear]) -> float:
    for name, layer in layers.items():
        block.linears[name].weight.data = layer.dequantize()
    every = torch.arange(len(sample.hidden), device=sample.hidden.device)
    errors = [float(sample.part(some).error(block)) * len(some) for some in torch.split(every, AT_ONCE)]
    return sum(errors) / len(every)
