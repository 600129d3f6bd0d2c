"""Nystrom attention (Xiong et al., AAAI 2021, arXiv 2102.03902) for one sequence, and the positions of TransMIL.

In: a sequence (n, E) whose first row is a class token. Out: attended rows, and what the class token attends to.
Knows no bag and no model.

The mathematics is the published one, the order of the products is not: (A1 Z)(A3 V) is taken as A1 (Z (A3 V)); Z, the
pseudo-inverse after six steps, is never formed but applied; and where only the first row is read, only it is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mil.models._layers import dropout

KERNEL = 33  # taps of the value convolution
CHUNK = 2048  # keys per block when the attention itself is asked for: 8 heads x 256 x 2048 floats are 16 MB


class _Schulz(torch.autograd.Function):
    """p(X_5) ... p(X_0) r, or in the other order, for symmetric x = X_0 (H, m, m) and r (H, m, w).

    The published iteration z <- z (13 - A z (15 - A z (7 - A z))) / 4 makes X = A z a polynomial of A A^T: symmetric,
    and X <- X p(X) with p(X) = (13 - 15 X + 7 X^2 - X^3) / 4 needs no z: 2 products a step instead of 4, and 3 instead
    of 8 backward, since only the symmetric part of a gradient to a symmetric matrix counts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, steps: int, first_to_last: bool) -> Tensor:
        xs, ys = [x], []
        for _ in range(steps - 1):
            y = xs[-1] @ xs[-1]
            w = 7.0 * xs[-1] - y
            w.diagonal(dim1=-2, dim2=-1).sub_(15.0)
            xs.append(torch.baddbmm(xs[-1], y, w, beta=3.25, alpha=0.25))
            ys.append(y)
        order = list(range(steps)) if first_to_last else list(range(steps - 1, -1, -1))
        rs = [r]
        for k in order:
            rs.append(_polynomial(xs[k], rs[-1])[0])
        ctx.order = order
        ctx.save_for_backward(*xs, *ys, *rs[:-1])
        return rs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        order = ctx.order
        steps = len(order)
        saved = ctx.saved_tensors
        xs, ys, rs = saved[:steps], saved[steps : 2 * steps - 1], saved[2 * steps - 1 :]
        h = grads[0]
        direct: list[Tensor] = [h] * steps
        for j in range(steps - 1, -1, -1):
            x, r = xs[order[j]], rs[j]
            t1 = x @ r
            t2 = x @ t1
            down, u1, u2 = _polynomial(x, h)
            left = torch.cat([h, u1, u2], dim=2)
            right = torch.cat([-15.0 * r + 7.0 * t1 - t2, 7.0 * r - t1, -r], dim=2)
            direct[order[j]] = (left @ right.mT).mul_(0.125)  # half of the quarter: see S below
            h = down
        # X' = (13 X + Y W) / 4 with Y = X^2, W = 7 X - Y - 15. With S(.) the symmetric part and G of X' symmetric,
        # dY = S(7 G X - 2 G Y) / 4 - 15 G / 4,  dX = 13 G / 4 + S(7 G Y / 4 + 2 dY X); S's halves are in the factors.
        g = direct[-1] + direct[-1].mT
        for k in range(steps - 2, -1, -1):
            x, y = xs[k], ys[k]
            part = g @ torch.sub(0.875 * x, y, alpha=0.25)
            dy = (part + part.mT).sub_(g, alpha=3.75)
            part = torch.baddbmm(direct[k], g, y, alpha=0.875).baddbmm_(dy, x)
            g = (part + part.mT).add_(g, alpha=3.25)
        return g, h, None, None


def _polynomial(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p(x) r, x r and x x r."""
    t1 = x @ r
    t2 = x @ t1
    return torch.baddbmm(13.0 * r - 15.0 * t1 + 7.0 * t2, x, t2, beta=0.25, alpha=-0.25), t1, t2


def apply_pinv(a: Tensor, r: Tensor, steps: int = 6, left: bool = False) -> Tensor:
    """Z r for a (H, m, m) of softmax rows and r (H, m, w), Z its pseudo-inverse after `steps` iterations from
    Z_0 = A^T / (largest row sum * largest column sum, over all heads); left: Z^T r, so that r^T Z is its transpose."""
    scale = 1.0 / (a.sum(-1).amax() * a.sum(-2).amax())
    x = (a @ a.transpose(1, 2)) * scale
    if left:
        return cast(Tensor, _Schulz.apply(x, a @ r, steps, True)) * scale
    return a.transpose(1, 2) @ cast(Tensor, _Schulz.apply(x, r, steps, False)) * scale


@dataclass(frozen=True)
class Attended:
    """rows: (n, E), or (1, E) where only the first was asked for. values: (n, H, E/H). attention: (H, n), the class
    token's row of A1 Z A3; it may be negative. The last two are filled on demand."""

    rows: Tensor
    values: Tensor | None = None
    attention: Tensor | None = None


class Nystrom(nn.Module):
    """H heads, m landmarks (means of consecutive groups), value convolution along the sequence, output projection.

    The sequence is padded with zeros in front to a multiple of m; the padding takes part in landmarks and softmax, as
    published.
    """

    def __init__(self, width: int, heads: int, landmarks: int, drop: float, steps: int = 6) -> None:
        super().__init__()
        self.heads, self.landmarks, self.drop, self.steps = heads, landmarks, drop, steps
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.conv = nn.Parameter(torch.empty(heads, KERNEL).uniform_(-(KERNEL**-0.5), KERNEL**-0.5))

    def forward(
        self, x: Tensor, log_count: Tensor | None = None, first_only: bool = False, detail: bool = False
    ) -> Attended:
        """x: (n, E), normalised. log_count: (n,), row i counts exp(log_count_i) times as a key, or None.
        first_only: compute the first row only. detail: fill values and attention (never differentiated)."""
        n, width = x.shape
        pad = -n % self.landmarks
        padded = F.pad(x, (0, 0, pad, 0)) if pad else x
        bias = None if log_count is None else F.pad(log_count, (pad, 0))
        q_marks, k_marks = self._landmarks(x, pad, log_count)
        if first_only:
            q = self._split(F.linear(x[:1], self.to_qkv.weight[:width]))
            flat = F.linear(padded, self.to_qkv.weight[width:])
            k, v = (self._split(t) for t in flat.split(width, dim=1))
        else:
            flat = self.to_qkv(padded)
            q, k, v = (self._split(t) for t in flat.split(width, dim=1))
            q = q[:, pad:]
        with torch.autocast(x.device.type, enabled=False):
            wide = x.dtype if x.dtype == torch.float64 else torch.float32
            scale = (width // self.heads) ** -0.5
            a2 = torch.softmax(scale * (q_marks.to(wide) @ k_marks.to(wide).transpose(1, 2)), dim=-1)  # (H, m, m)
            first = torch.softmax(scale * (q[:, :1].to(wide) @ k_marks.to(wide).transpose(1, 2)), dim=-1)
            row = None
            if first_only or detail:
                row = apply_pinv(a2, first.transpose(1, 2), self.steps, left=True).transpose(1, 2)  # (H, 1, m)
        attention = None
        if detail:
            mixed, attention = _blockwise(q_marks, k, v, bias, row, scale)  # (H, m, d), (H, n_padded)
            attention = attention[:, pad:]
        else:
            mask = None if bias is None else bias.to(q_marks.dtype).expand(1, 1, len(q_marks[0]), -1)
            mixed = F.scaled_dot_product_attention(q_marks[None], k[None], v[None], mask, scale=scale)[0]
        values = v[:, pad:].transpose(0, 1) if detail else None
        if first_only:
            assert row is not None
            near = v[:, max(0, pad - KERNEL // 2) : pad + KERNEL // 2 + 1]  # (H, <= 33, d) around the class token
            taps = self.conv[:, max(0, KERNEL // 2 - pad) :][:, : near.shape[1]]
            out = row.to(mixed.dtype) @ mixed + torch.einsum("hk,hkd->hd", taps.to(near.dtype), near)[:, None]
            return Attended(self._out(out), values, attention)
        with torch.autocast(x.device.type, enabled=False):
            solved = apply_pinv(a2, mixed.to(wide), self.steps).to(q.dtype)  # (H, m, d)
        out = F.scaled_dot_product_attention(q[None], k_marks.to(q.dtype)[None], solved[None], scale=scale)[0]
        out = self._merge(out) + self._convolve(flat[:, 2 * width :])[pad:]
        return Attended(self._project(out), values, attention)

    def _landmarks(self, x: Tensor, pad: int, log_count: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys of the group means (H, m, d): projections are linear, so means come first."""
        n, width = x.shape
        size = (n + pad) // self.landmarks
        empty, inside = divmod(pad, size)  # groups of padding only; padding rows of the first group that is not
        weight = None if log_count is None else log_count.exp().to(x.dtype)
        weighed = x if weight is None else x * weight[:, None]
        lead = (size - inside) % size
        sums = weighed[lead:].unflatten(0, (-1, size)).sum(1)
        if lead:
            sums = torch.cat([weighed[:lead].sum(0, keepdim=True), sums])
        if weight is None:
            means = sums / size
        else:
            total = F.pad(weight, (pad, 0), value=1.0)[empty * size :].unflatten(0, (-1, size)).sum(1)
            means = sums / total.clamp_min(1e-6)[:, None]
        means = F.pad(means, (0, 0, empty, 0))
        q, k = F.linear(means, self.to_qkv.weight[: 2 * width]).split(width, dim=1)
        return self._split(q), self._split(k)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1)).transpose(0, 1)  # (H, n, d)

    @staticmethod
    def _merge(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1)  # (n, E)

    def _out(self, x: Tensor) -> Tensor:
        return self._project(self._merge(x))

    def _project(self, x: Tensor) -> Tensor:
        out = self.to_out(x)
        return dropout(out, self.drop) if self.training else out

    def _convolve(self, v: Tensor) -> Tensor:
        """One filter per head along the sequence: v (n, E) -> (n, E). As a depth-wise convolution over E channels that
        lie side by side in memory it takes a quarter of the time of one over (H, n, d)."""
        weight = self.conv.to(v.dtype).repeat_interleave(v.shape[1] // self.heads, dim=0)[:, None, :, None]
        image = v[None, :, None].permute(0, 3, 1, 2)  # (1, E, n, 1), channels last
        out = F.conv2d(image, weight, padding=(KERNEL // 2, 0), groups=v.shape[1])
        return out.permute(0, 2, 3, 1)[0, :, 0]


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, row: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """A3 V (H, m, d) and row A3 (H, n) for A3 = softmax(q k^T + bias), in blocks of keys, so that A3 (H, m, n) need not
    fit in memory. Not differentiated through its second result."""
    assert row is not None
    n = k.shape[1]
    if n <= CHUNK:
        logits = scale * (q @ k.transpose(1, 2))
        a3 = torch.softmax(logits if bias is None else logits + bias, dim=-1)
        return a3 @ v, (row.to(a3.dtype) @ a3)[:, 0]
    with torch.no_grad():
        found = []
        total = norm = top = None
        for start in range(0, n, CHUNK):
            block = slice(start, start + CHUNK)
            logits = scale * (q @ k[:, block].transpose(1, 2))
            logits = logits if bias is None else logits + bias[block]
            high = logits.amax(-1, keepdim=True)
            new = high if top is None else torch.maximum(top, high)
            p = (logits - new).exp_()
            if top is None or total is None or norm is None:
                total, norm = p @ v[:, block], p.sum(-1, keepdim=True)
            else:
                fade = (top - new).exp_()
                total, norm = total * fade + p @ v[:, block], norm * fade + p.sum(-1, keepdim=True)
            top = new
        assert total is not None
        assert norm is not None
        assert top is not None
        lse = top + norm.log()
        for start in range(0, n, CHUNK):
            block = slice(start, start + CHUNK)
            logits = scale * (q @ k[:, block].transpose(1, 2))
            logits = logits if bias is None else logits + bias[block]
            found.append((row.to(lse.dtype) @ (logits - lse).exp_())[:, 0])
    return total / norm, torch.cat(found, dim=1)


class Ppeg(nn.Module):
    """Pyramid position encoding: the sequence folded into a square, row by row, plus its depth-wise convolutions with
    kernels 7, 5 and 3. They are summed, so they are one convolution with the sum of the kernels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for size in (7, 5, 3):
            self.register_module(f"conv{size}", nn.Conv2d(width, width, size, padding=size // 2, groups=width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, E) -> (n, E). The square is filled up with the first rows; below 7 x 7, with zeros beyond it."""
        n = len(x)
        side = math.isqrt(n - 1) + 1
        full = torch.cat([x, x[: side * side - n]]) if side * side > n else x
        if side < 7:
            side = 7
            full = F.pad(full, (0, 0, 0, side * side - len(full)))
        weight, bias = self.kernel()
        image = full.view(1, side, side, -1).permute(0, 3, 1, 2)  # channels last
        out = F.conv2d(image, weight.to(x.dtype), bias.to(x.dtype), padding=3, groups=x.shape[1])
        return out.permute(0, 2, 3, 1).flatten(0, 2)[:n]

    def on_grid(self, x: Tensor, grid: Tensor, weight: Tensor | None = None) -> Tensor:
        """The same convolutions where the instances really lie. x: (n, E); grid: (n, 2), tile edges, x then y;
        weight: (n,), 0 for instances that are to count as absent. Returns (n, E).

        Every instance takes the nearest cell; several in one cell are averaged, and each keeps its own x. More than
        three empty rows or columns in a row are cut to three, which no 7 x 7 kernel can tell, so that the distance
        between pieces of tissue, or slides, costs nothing.
        """
        column, row = (_close(grid[:, axis]) for axis in (0, 1))
        width, height = int(column.max()) + 1, int(row.max()) + 1
        cell = row * width + column
        counts = x.new_ones(len(x)) if weight is None else weight.to(x.dtype)
        held = x.new_zeros(height * width).index_add(0, cell, counts).clamp_min(1e-6)
        total = x.new_zeros(height * width, x.shape[1]).index_add(0, cell, x * counts[:, None])
        image = total / held[:, None]
        kernel, bias = self.kernel()
        spread = image.view(1, height, width, -1).permute(0, 3, 1, 2)  # channels last
        out = F.conv2d(spread, kernel.to(x.dtype), bias.to(x.dtype), padding=3, groups=x.shape[1])
        return out.permute(0, 2, 3, 1).flatten(0, 2)[cell] + (x - image[cell])

    def kernel(self) -> tuple[Tensor, Tensor]:
        """The one 7 x 7 kernel (E, 1, 7, 7), the identity included, and its bias (E,)."""
        parts = [cast(nn.Conv2d, getattr(self, f"conv{size}")) for size in (7, 5, 3)]
        weight = sum(F.pad(c.weight, ((7 - c.kernel_size[0]) // 2,) * 4) for c in parts)
        bias = sum(c.bias for c in parts if c.bias is not None)
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        identity = torch.zeros(7, 7, dtype=weight.dtype, device=weight.device)
        identity[3, 3] = 1.0
        return weight + identity, bias


def _close(place: Tensor) -> Tensor:
    """int64 (n,) whole places from 0 on, in which no two neighbouring values are more than 4 apart."""
    values, which = torch.unique(place.round().long(), return_inverse=True)
    return F.pad(values.diff().clamp_max(4).cumsum(0), (1, 0))[which]
