"""What reaches a linear layer when calibration runs through its block, and statistics of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import BuildFailed
from quant.methods.base import Activations, Block


class _Enough(Exception):
    pass


@torch.no_grad()
def feed(block: Block, inputs: Activations, linear: str, see: Callable[[Tensor], None]) -> None:
    """`see` gets the input [tokens, in] of `linear` for each batch; nothing behind it is computed."""

    def stop(_module: Any, arguments: tuple[Tensor, ...]) -> None:
        see(arguments[0].flatten(0, -2))
        raise _Enough

    handle = block.linears[linear].register_forward_pre_hook(stop)
    try:
        for hidden in inputs:
            try:
                block(hidden)
            except _Enough:
                continue
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """What reached a linear."""

    hessian: Tensor  # mean of x x^T over the tokens: float32 [in, in], symmetric, on the block's device
    tokens: int


def hessian_of(block: Block, inputs: Activations, linear: str) -> Tensor:
    """As `gram_of`."""
    return gram_of(block, inputs, linear).hessian


def gram_of(block: Block, inputs: Activations, linear: str) -> Gram:
    """An expert's linear is reached by the tokens that are sent to it, perhaps by none: then it is zero.

    Raises BuildFailed naming the linear for NaN or infinite inputs.
    """
    weight = block.linears[linear].weight
    total = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    tokens = 0

    def add(x: Tensor) -> None:
        nonlocal tokens
        tokens += x.shape[0]
        with exact_in_tf32(x.dtype):
            x = x.float()
            total.addmm_(x.T, x)

    feed(block, inputs, linear, add)
    if not bool(torch.isfinite(total).all()):
        raise BuildFailed(f"{block.name}.{linear}: its inputs have NaN or infinite values")
    total /= max(tokens, 1)
    return Gram(total.add_(total.T.clone()).mul_(0.5), tokens)


@contextmanager
def exact_in_tf32(dtype: torch.dtype) -> Iterator[None]:
    """TF32 keeps 10 bits of mantissa and sums in float32: it takes products of 16-bit floats exactly."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype in (torch.bfloat16, torch.float16)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def sampled(inputs: Activations, tokens: int) -> list[Tensor]:
    """Whole samples, spread evenly over the batches, of about `tokens` tokens: the same ones every time."""
    first = next(iter(inputs))
    batches, length = len(inputs), first.shape[1]
    wanted = max(1, tokens // length)  # samples
    each, stride = max(1, wanted // batches), max(1, batches // wanted)
    return [hidden[:each].clone() for number, hidden in enumerate(inputs) if number % stride == 0]


def output_error(hessian: Tensor, difference: Tensor) -> float:
    """Mean squared error of a layer's output when its weight is off by `difference` [out, in]."""
    return float((difference @ hessian).mul_(difference).sum(1).mean())
