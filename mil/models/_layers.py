"""Layers that several models share: the instance embedding, its dropout, and small helpers.

In: features of instances as rows. Out: embedded rows. Knows no bag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.schema import Settings

Activation = Literal["relu", "gelu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


class EmbeddingParams(Settings):
    """Settings of the instance embedding, common to all models."""

    width: int = Field(512, ge=8, description="width of an embedded instance")
    activation: Activation = Field("gelu", description="activation of the instance embedding")
    dropout: float = Field(0.25, ge=0, lt=1, description="dropout of the embedded instances")


class Embedding(nn.Module):
    """z = dropout(activation(W x + b)): (M, D) -> (M, width)."""

    def __init__(self, in_dim: int, params: EmbeddingParams) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, params.width)
        self.activation, self.dropout = params.activation, params.dropout

    def forward(self, x: Tensor) -> Tensor:
        z = ACTIVATIONS[self.activation](self.linear(x))
        return dropout(z, self.dropout) if self.training else z


class _Dropout(torch.autograd.Function):
    """Multiplication by a mask that is kept as one byte per value; the backward pass repeats it.

    The mask becomes numbers first: for 5,000 x 512 values that and the product take 4 ms, the product of numbers with
    truth values 12.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return keep.to(x.dtype).mul_(x).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return keep.to(grads[0].dtype).mul_(grads[0]).mul_(ctx.scale), None, None


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with probability p (rounded to 1/65536; 0.25 is exact).

    On a CPU, eight (or four) decisions come out of each random 64-bit word: for 10,000 x 512 values on one thread the
    mask costs 3 ms, one draw per value 60 ms, half the time of the product that made them.
    """
    if p == 0.0 or x.numel() == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    steps, per_word = (256, 8) if (p * 256).is_integer() else (65536, 4)
    bound = round(p * steps)
    words = torch.empty(-(-x.numel() // per_word), dtype=torch.int64).random_(-(2**63), None)
    if steps == 256:
        drawn = words.view(torch.uint8)[: x.numel()] >= bound
    else:  # unsigned 16-bit numbers cannot be compared; signed ones cover the same range shifted
        drawn = words.view(torch.int16)[: x.numel()] >= bound - 32768
    return cast(Tensor, _Dropout.apply(x, drawn.view(x.shape), steps / (steps - bound)))


def initialise(module: nn.Module) -> None:
    """Xavier-normal weights and zero biases for every linear and convolutional layer, as these models are published."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_normal_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def weighted_softmax(logits: Tensor, log_count: Tensor | None) -> Tensor:
    """Softmax over the last axis in float32 (or wider), each entry counted exp(log_count) times."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.softmax(wide if log_count is None else wide + log_count, dim=-1)
