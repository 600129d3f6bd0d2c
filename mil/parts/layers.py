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

from mhim.configs.schema import Settings

Activation = Literal["relu", "gelu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


class EmbeddingParams(Settings):
    """Settings of the instance embedding, common to all models."""

    width: int = Field(512, ge=8, description="width of an embedded instance")
    activation: Activation = Field("gelu", description="activation of the instance embedding")
    dropout: float = Field(0.25, ge=0, lt=1, description="dropout of the embedded instances")


class Embedding(nn.Module):
    """z = dropout(activation(W x + b)): (M, D) -> (M, width)."""

    def __init__(self, in_dim: int, params: EmbeddingParams, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, params.width, bias=bias)
        self.activation, self.dropout = params.activation, params.dropout

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """rows: int64 (R,), which rows of x to embed, in this order (R, width); None: all."""
        p = self.dropout if self.training else 0.0
        weight, bias = self.linear.weight, self.linear.bias
        if (
            x.device.type == "cpu"
            and x.dtype == weight.dtype
            and not x.requires_grad
            and bias is not None
            and not torch.is_autocast_enabled("cpu")
        ):
            if torch.is_grad_enabled() and weight.requires_grad:
                return cast(Tensor, _Embed.apply(x, rows, weight, bias, self.activation, p))
            return _embed(x, rows, weight, bias, self.activation, p)[0]
        z = ACTIVATIONS[self.activation](self.linear(x if rows is None else x.index_select(0, rows)))
        return dropout(z, p)


BLOCK = 1024  # rows at a time: 4 MB of features of width 1024 and 2 MB of results stay in the cache


def _embed(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, activation: Activation, p: float, slope: bool = False
) -> tuple[Tensor, Tensor]:
    """The embedding in blocks of rows, and (slope) its derivative by W x + b, dropout included, else an empty tensor.

    Chosen rows are gathered into the same 4 MB again and again: a copy of all of them, 40 MB for 10,000 of width 1024,
    takes 25 ms on one thread, mostly for fresh pages; this way it is 4. Everything after the product works on numbers
    that are still in the cache.
    """
    n, width = len(x) if rows is None else len(rows), len(weight)
    most = min(n, BLOCK)
    z = x.new_empty(n, width)
    slopes = x.new_empty(n if slope else 0, width)
    gathered = None if rows is None else x.new_empty(most, x.shape[1])
    before = x.new_empty(most, width) if slope else None
    keep = x.new_ones(most, width) if slope or p > 0 else None
    for start in range(0, n, BLOCK):
        out = z[start : start + BLOCK]
        size = len(out)
        linear = out if before is None else before[:size]
        torch.addmm(bias, _block(x, rows, start, size, gathered), weight.t(), out=linear)
        _activate(activation, linear, out)
        if keep is None:
            continue
        if p > 0:
            _draw_keep(keep[:size], p)
        if slope:
            _slope(activation, keep[:size], linear, out, slopes[start : start + size])
        if p > 0:
            out.mul_(keep[:size])
    return z, slopes


def _block(x: Tensor, rows: Tensor | None, start: int, size: int, room: Tensor | None) -> Tensor:
    """Rows start ... start + size of x, or of x[rows], which come into `room`."""
    if rows is None or room is None:
        return x[start : start + size]
    return torch.index_select(x, 0, rows[start : start + size], out=room[:size])


class _Embed(torch.autograd.Function):
    """The embedding with gradients to its weights, none to x. What it keeps: x as it is, the derivative, no copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, activation: Activation, p: float
    ) -> Tensor:
        z, slopes = _embed(x, rows, weight, bias, activation, p, slope=True)
        ctx.save_for_backward(x, rows, slopes)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, slopes = ctx.saved_tensors
        n, width = slopes.shape
        most = min(n, BLOCK)
        gathered = None if rows is None else x.new_empty(most, x.shape[1])
        room, ones = x.new_empty(most, width), x.new_ones(most)
        weight, bias = x.new_zeros(width, x.shape[1]), x.new_zeros(width)
        for start in range(0, n, BLOCK):
            size = min(BLOCK, n - start)
            block = slice(start, start + size)
            g = torch.mul(grads[0][block], slopes[block], out=room[:size])
            weight.addmm_(g.t(), _block(x, rows, start, size, gathered))
            bias.addmv_(g.t(), ones[:size])
        return None, None, weight, bias, None, None


def _activate(activation: Activation, x: Tensor, out: Tensor) -> None:
    """activation(x) into `out`, which may be x."""
    if activation == "gelu":
        torch.ops.aten.gelu.out(x, out=out)
    elif activation == "relu":
        torch.clamp_min(x, 0.0, out=out)
    else:
        torch.tanh(x, out=out)


def _slope(activation: Activation, factor: Tensor, x: Tensor, y: Tensor, out: Tensor) -> None:
    """factor times the derivative of the activation at x, where it is y, into `out`."""
    if activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(factor, x, grad_input=out)
    elif activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(factor, y, 0.0, grad_input=out)
    else:
        torch.ops.aten.tanh_backward.grad_input(factor, y, grad_input=out)


def _draw(count: int, p: float) -> tuple[Tensor, int, float]:
    """Random integers, from which number on a value is kept, and the scale of kept ones, for `count` values.

    Eight (or four) decisions come out of each random 64-bit word: for 10,000 x 512 values on one thread that takes
    3 ms, one draw per value 60 ms, half the time of the product that made them.
    """
    steps, per_word = (256, 8) if (p * 256).is_integer() else (65536, 4)
    bound = round(p * steps)
    words = torch.empty(-(-count // per_word), dtype=torch.int64).random_(-(2**63), None)
    if steps == 256:
        return words.view(torch.uint8)[:count], bound, steps / (steps - bound)
    # unsigned 16-bit numbers cannot be compared; signed ones cover the same range shifted
    return words.view(torch.int16)[:count], bound - 32768, steps / (steps - bound)


def _draw_keep(out: Tensor, p: float) -> None:
    """Fill `out` (contiguous) with 0 (probability p) and 1 / (1 - p). A comparison that writes numbers takes a fifth of
    the time of one that writes truth values, which then have to become numbers."""
    drawn, bound, scale = _draw(out.numel(), p)
    torch.ge(drawn, bound, out=out.view(-1)).mul_(scale)


class _Dropout(torch.autograd.Function):
    """Dropout that keeps its random integers, one or two bytes per value; the backward pass compares them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drawn: Tensor, bound: int, scale: float) -> Tensor:
        ctx.save_for_backward(drawn)
        ctx.bound, ctx.scale = bound, scale
        return _masked(x, drawn, bound, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (drawn,) = ctx.saved_tensors
        return _masked(grads[0], drawn, ctx.bound, ctx.scale), None, None, None


def _masked(x: Tensor, drawn: Tensor, bound: int, scale: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(drawn, bound, out=out.view(-1))
    return out.mul_(x).mul_(scale)


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with probability p (rounded to 1/65536; 0.25 is exact)."""
    if p == 0.0 or x.numel() == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return cast(Tensor, _Dropout.apply(x, *_draw(x.numel(), p)))


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


def load_exact(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load `state` into `module`; ValueError names every key that is missing, unexpected or of another shape."""
    own = module.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if wrong:
        raise ValueError(
            f"the weights of {what} do not fit: {'; '.join(wrong)}. "
            "Train it with the same features, task and model settings."
        )
    module.load_state_dict(state)
