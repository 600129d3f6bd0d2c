"""Nystrom attention (Xiong et al., AAAI 2021, arXiv 2102.03902) for one sequence.

In: a sequence (n, E) whose first row is a class token. Out: attended rows, and what the class token attends to.
Knows no bag and no model.

The mathematics is the published one, the order of the products is not: (A1 Z)(A3 V) is taken as A1 (Z (A3 V)); Z, the
pseudo-inverse after six steps, is never formed but applied; and where only the first row is read, only it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhim.mil.parts.layers import dropout

KERNEL = 33  # taps of the value convolution
CHUNK = 2048  # keys per block where the attention itself is asked for: 8 heads x 256 x 2048 floats are 16 MB
KEPT = 4  # blocks whose exponentials wait for a second use where nothing is to be learned from them


class _Schulz(torch.autograd.Function):
    """p(X_0) ... p(X_5) r for symmetric x = X_0 (H, m, m) and r (H, m, w). The factors commute, so their order serves
    Z from either side; it is that of Z r.

    The published iteration z <- z (13 - A z (15 - A z (7 - A z))) / 4 makes X = A z a polynomial of A A^T: symmetric,
    and X <- X p(X) with p(X) = (13 - 15 X + 7 X^2 - X^3) / 4 needs no z: 2 products a step instead of 4, and 3 instead
    of 8 backward, since only the symmetric part of a gradient to a symmetric matrix counts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, steps: int) -> Tensor:
        xs, ys, rs = [x], [], [r]
        for _ in range(steps - 1):
            y = torch.bmm(xs[-1], xs[-1])
            base = torch.sub(xs[-1], y, alpha=15.0 / 13.0)
            ys.append(y)
            xs.append(torch.baddbmm(base, y, torch.sub(y, xs[-1], alpha=7.0), beta=3.25, alpha=-0.25))
        for x in reversed(xs):
            rs += _polynomial(x, rs[-1])
        ctx.save_for_backward(*xs, *ys, *rs[:-1])
        return rs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        steps = (len(saved) + 1) // 5
        xs, ys, rs = saved[:steps], saved[steps : 2 * steps - 1], saved[2 * steps - 1 :]
        h = grads[0]
        direct: list[Tensor] = []
        # With a = 7 r - x r and b = 15 r - x a, p(x) r = (13 r - x b) / 4, so -4 dx = h b^T - (x h) a^T + (x x h) r^T.
        # The a and b of h, which its own polynomial makes, give x h = 7 h - a_h and x x h = 34 h - 7 a_h + b_h.
        for n, x in enumerate(xs):
            r, a, b = rs[len(rs) - 3 * (n + 1) :][:3]
            a_h, b_h, down = _polynomial(x, h)
            left = torch.cat([h, a_h, b_h], dim=2)
            right = torch.cat([torch.sub(b, a, alpha=7.0).add_(r, alpha=34.0), torch.sub(a, r, alpha=7.0), r], dim=2)
            direct.append(torch.baddbmm(x, left, right.mT, beta=0, alpha=-0.125))  # half of the quarter: see S below
            h = down
        # X' = (13 X - Y W) / 4 with Y = X^2, W = Y - 7 X + 15. With S(.) the symmetric part and G of X' symmetric,
        # dY = S(7 G X - 2 G Y) / 4 - 15 G / 4,  dX = 13 G / 4 + S(7 G Y / 4 + 2 dY X); S's halves are in the factors.
        g = direct[-1] + direct[-1].mT
        for x, y, d in zip(reversed(xs[:-1]), reversed(ys), reversed(direct[:-1]), strict=True):
            part = torch.bmm(g, torch.sub(y, x, alpha=3.5))
            dy = (part + part.mT).add_(g, alpha=15.0)  # -4 dY
            part = d.baddbmm_(g, y, alpha=0.875).baddbmm_(dy, x, alpha=-0.25)
            g = (part + part.mT).add_(g, alpha=3.25)
        return g, h, None


def _polynomial(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a = 7 r - x r, b = 15 r - x a and p(x) r = (13 r - x b) / 4."""
    a = torch.baddbmm(r, x, r, beta=7.0, alpha=-1.0)
    b = torch.baddbmm(r, x, a, beta=15.0, alpha=-1.0)
    return a, b, torch.baddbmm(r, x, b, beta=3.25, alpha=-0.25)


def apply_pinv(
    a: Tensor, right: Tensor | None = None, left: Tensor | None = None, steps: int = 6
) -> tuple[Tensor, Tensor]:
    """Z right and Z^T left for a (H, m, m) of softmax rows and right, left (H, m, w) or None (then empty), Z its
    pseudo-inverse after `steps` iterations from Z_0 = A^T / (largest row sum * largest column sum, over all heads)."""
    scale = 1.0 / (a.sum(-1).amax() * a.sum(-2).amax())
    x = torch.bmm(a, a.transpose(1, 2)) * scale
    if left is None:
        sides = a[:, :, :0] if right is None else right
    else:
        sides = torch.bmm(a, left) if right is None else torch.cat([right, torch.bmm(a, left)], dim=2)
    both = cast(Tensor, _Schulz.apply(x, sides * scale, steps))
    if right is None:
        return both[:, :, :0], both
    width = right.shape[2]
    return torch.bmm(a.transpose(1, 2), both[:, :, :width]), both[:, :, width:]


class _Project(torch.autograd.Function):
    """W x with `pad` rows of zeros in front, without a copy of x or of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pad: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pad = pad
        out = x.new_empty(pad + len(x), len(weight))
        out[:pad] = 0.0
        torch.mm(x, weight.t(), out=out[pad:])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        g = grads[0][ctx.pad :]
        return g @ weight, g.t() @ x, None


def _project(x: Tensor, weight: Tensor, pad: int) -> Tensor:
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return cast(Tensor, _Project.apply(x, weight, pad))
    return F.pad(F.linear(x, weight), (0, 0, pad, 0))


def _exponentials(q: Tensor, k: Tensor, bias: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """exp(q k^T + bias - top) of block n of the keys (H, m, CHUNK), and top (H, m), the block's own largest."""
    at = slice(n * CHUNK, (n + 1) * CHUNK)
    block = torch.bmm(q, k[:, at].transpose(1, 2))
    if bias is not None:
        block += bias[at]
    top = block.amax(-1).clamp_min(torch.finfo(q.dtype).min)  # a block may hold removed keys only
    return block.sub_(top[:, :, None]).exp_(), top


def _softmax(
    q: Tensor, k: Tensor, bias: Tensor | None, v: Tensor | None, keep: int
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """softmax(q k^T + bias), (H, m, n), in blocks of keys: fade (blocks, H, m), by which each block's `_exponentials`
    are multiplied; those of the first `keep` blocks; and its product with v (H, n, d), if asked for."""
    kept, tops, sums, products = [], [], [], []
    for n in range(-(-k.shape[1] // CHUNK)):
        e, top = _exponentials(q, k, bias, n)
        tops.append(top)
        sums.append(e.sum(-1))
        if n < keep:
            kept.append(e)
        if v is not None:
            products.append(e @ v[:, n * CHUNK : (n + 1) * CHUNK])
    top = torch.stack(tops)
    fade = (top - top.amax(0)).exp_()
    fade /= (fade * torch.stack(sums)).sum(0)
    return fade, kept, None if v is None else (fade[..., None] * torch.stack(products)).sum(0)


def _read(row: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, fade: Tensor, kept: list[Tensor]) -> Tensor:
    """row (H, m) times the softmax of `_softmax` -> (H, n). Blocks that were not kept are made again."""
    found = []
    for n, f in enumerate(fade):
        e = kept[n] if n < len(kept) else _exponentials(q, k, bias, n)[0]
        found.append(torch.bmm((row * f)[:, None], e)[:, 0])
    return torch.cat(found, dim=1)


class _Row(torch.autograd.Function):
    """row softmax(q k^T + bias): row (H, m), q (H, m, d), k (H, n, d), bias (n,) or None -> (H, n).

    All exponentials are kept for the backward pass, which so needs one product less than attention otherwise; bias gets
    no gradient.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        fade, kept, _ = _softmax(q, k, bias, None, k.shape[1])
        ctx.save_for_backward(row, q, k, fade, *kept)
        return _read(row, q, k, bias, fade, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row, q, k, fade, *kept = ctx.saved_tensors
        parts = grads[0].split(CHUNK, dim=1)
        d_row = torch.zeros_like(row)
        for f, e, g in zip(fade, kept, parts, strict=True):
            d_row += f * torch.bmm(e, g[:, :, None])[:, :, 0]
        # logits get row p (g - d_row), with p = f e
        d_q, d_k = torch.zeros_like(q), torch.empty_like(k)
        for n, (f, e, g) in enumerate(zip(fade, kept, parts, strict=True)):
            at = slice(n * CHUNK, n * CHUNK + e.shape[2])
            inner = torch.sub(g[:, None], d_row[:, :, None]).mul_(e)
            weight = (row * f)[:, :, None]
            d_q += weight * torch.bmm(inner, k[:, at])
            d_k[:, at] = torch.bmm(inner.transpose(1, 2), weight * q)
        return d_row, d_q, d_k, None


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
    published. plain: without convolution and output projection.
    """

    def __init__(
        self, width: int, heads: int, landmarks: int, drop: float, steps: int = 6, plain: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.drop, self.steps, self.plain = heads, landmarks, drop, steps, plain
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        if plain:
            return
        self.to_out = nn.Linear(width, width)
        self.conv = nn.Parameter(torch.empty(heads, KERNEL).uniform_(-(KERNEL**-0.5), KERNEL**-0.5))

    def forward(
        self, x: Tensor, log_count: Tensor | None = None, first_only: bool = False, detail: bool = False
    ) -> Attended:
        """x: (n, E), normalised. log_count: (n,), row i counts exp(log_count_i) times as a key, or None.
        first_only: compute the first row only. detail: fill values and attention (never differentiated)."""
        n, width = x.shape
        pad = -n % self.landmarks
        bias = None if log_count is None else F.pad(log_count, (pad, 0))
        q_marks, k_marks = self._landmarks(x, pad, log_count)
        to_q, to_k, to_v = self.to_qkv.weight.split(width)
        q = self._split(F.linear(x[:1] if first_only else x, to_q))
        with torch.autocast(x.device.type, enabled=False):
            wide = x.dtype if x.dtype == torch.float64 else torch.float32
            scale = (width // self.heads) ** -0.5
            a2 = torch.softmax(scale * (q_marks.to(wide) @ k_marks.to(wide).transpose(1, 2)), dim=-1)  # (H, m, m)
            asked = None  # (H, m, 1): A1's first row
            if first_only or detail:
                asked = torch.softmax(scale * (k_marks.to(wide) @ q[:, :1].to(wide).transpose(1, 2)), dim=1)
        if first_only:
            k = self._split(_project(x, to_k, pad))
            with torch.autocast(x.device.type, enabled=False):
                row = apply_pinv(a2, left=asked, steps=self.steps)[1][:, :, 0]
                q_wide, k = scale * q_marks.to(wide), k.to(wide)
                if torch.is_grad_enabled():
                    weights = cast(Tensor, _Row.apply(row, q_wide, k, bias))
                else:
                    weights = _read(row, q_wide, k, bias, *_softmax(q_wide, k, bias, None, KEPT)[:2])
                weights = weights[:, pad:]
            read = weights.to(x.dtype) @ x  # (H, E): values are linear in x, so the mixture comes first
            out = torch.einsum("he,hde->hd", read, to_v.unflatten(0, (self.heads, -1)))[:, None]
            near = self._split(F.linear(x[: KERNEL // 2 + 1], to_v))  # (H, <= 17, d) from the class token on
            taps = self.conv[:, KERNEL // 2 :][:, : near.shape[1]]
            out = out + torch.einsum("hk,hkd->hd", taps.to(near.dtype), near)[:, None]
            return Attended(self._out(out))
        flat = _project(x, to_v, pad)
        k, v = self._split(_project(x, to_k, pad)), self._split(flat)
        q_wide, k_wide, v_wide = scale * q_marks.to(wide), k.to(wide), v.to(wide)
        mixed = None  # A3 V (H, m, d)
        if detail:  # one pass over the keys for both
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                fade, kept, mixed = _softmax(q_wide, k_wide, bias, v_wide, KEPT)
        if mixed is None or torch.is_grad_enabled():
            mask = None if bias is None else bias.to(q_marks.dtype).expand(1, 1, len(q_marks[0]), -1)
            mixed = F.scaled_dot_product_attention(q_marks[None], k[None], v[None], mask, scale=scale)[0]
        with torch.autocast(x.device.type, enabled=False):
            solved, row = apply_pinv(a2, mixed.to(wide), asked, self.steps)  # (H, m, d), (H, m, 1)
        out = F.scaled_dot_product_attention(q[None], k_marks.to(q.dtype)[None], solved.to(q.dtype)[None], scale=scale)[
            0
        ]
        rows = self._merge(out) if self.plain else self._project(self._merge(out) + self._convolve(flat[pad:]))
        if not detail:
            return Attended(rows)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            attention = _read(row[:, :, 0], q_wide, k_wide, bias, fade, kept)
        return Attended(rows, v[:, pad:].transpose(0, 1), attention[:, pad:])

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
        of_heads: Tensor = x.unflatten(1, (self.heads, -1)).transpose(0, 1)  # (H, n, d)
        return of_heads

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
