"""RRT-MIL: instance features re-embedded by regional attention (Tang et al., CVPR 2024, arXiv 2402.17228).

z_n = embedding of x_n (N, h).  t = z + R(LN(z)) regional, t = t + C(LN(t)) across regions, t = LN(t), then ABMIL on t.
Tokens in the order of the bag fill a square, row by row, cut into `regions` x `regions` equal regions;
what is missing at the end is filled with zeros, which attention does not see.

R, regional self-attention with a positional code from the attention itself (EPEG): per head
A = softmax(L + conv(L)), L = q k^T / sqrt(d), conv 1-D over the queries (kernel 15, one filter per head).
C, attention across regions: per region k representatives, combined from its tokens with softmax over tokens of phi^T t;
self-attention among the k-th representatives of all regions; handed back to the tokens with the softmax over
representatives of phi^T t, each weighted by that logit scaled to 0..1 within its region. phi: h x k.

In small bags a region holds 4 x 4 tokens at least, where the published 8 x 8 would leave each token alone. Instance n
adds a_n W t_n to the logits, exactly, where t_n already saw its surroundings.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances, of_shares
from mhim.mil.parts.layers import (
    ACTIVATIONS,
    Activation,
    Embedding,
    EmbeddingParams,
    initialise,
    weighted_softmax,
)
from mhim.mil.parts.queries import whole_heads
from mhim.mil.ranges import Choice

USES_POSITION = True


class Params(EmbeddingParams):
    """Settings of RRT-MIL."""

    activation: Activation = Field("relu", description="activation of the instance embedding")
    regions: int = Field(8, ge=1, description="regions along each side of the square")
    heads: int = Field(8, ge=1, description="attention heads")
    kernel: int = Field(15, ge=1, description="kernel of the positional code, odd")
    representatives: int = Field(3, ge=1, description="representatives per region (k of the paper)")
    layer_dropout: float = Field(0.1, ge=0, lt=1, description="dropout after each of the two attentions")
    attention_width: int = Field(128, ge=1, description="width of the pooling attention's hidden layer")
    attention_activation: Activation = Field("relu", description="activation inside the pooling attention")

    @model_validator(mode="after")
    def _fits(self) -> Params:
        whole_heads(self.width, self.heads)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} must be odd, so that it has a middle")
        return self


TUNED = {"dropout": Choice((0.0, 0.25, 0.5)), "regions": Choice((4, 8)), "kernel": Choice((5, 9, 15))}


class Attention(nn.Module):
    """Self-attention inside each of R groups of P tokens, (R, P, h) -> (R, P, h). kernel: of the EPEG code, or 0.

    The code's convolution runs over the queries of L = q k^T / sqrt(d), so it is the same as one over q:
    L + conv(L) = (q + conv(q)) k^T / sqrt(d). No matrix of logits is formed; its bias would cancel in the softmax.
    """

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.code = nn.Parameter(torch.empty(heads, kernel).uniform_(-1, 1) / kernel**0.5) if kernel else None

    def forward(self, t: Tensor, real: Tensor) -> Tensor:
        """real: bool (R, P), the tokens that may be seen."""
        q, k, v = self.qkv(t).chunk(3, dim=2)  # (R, P, h) each
        if self.code is not None:
            taps = self.code.to(q.dtype).repeat_interleave(q.shape[2] // self.heads, dim=0)[:, None]  # (h, 1, kernel)
            q = q + F.conv1d(q.mT, taps, padding=taps.shape[2] // 2, groups=q.shape[2]).mT
        # A finite value: a region of filling alone must not become NaN.
        mask = torch.where(real, 0.0, -1e4).to(q.dtype)[:, None, None]
        found = F.scaled_dot_product_attention(self._split(q), self._split(k), self._split(v), mask)
        mixed: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        """(R, P, h) -> (R, H, P, d)."""
        of_heads: Tensor = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return of_heads


class Rrt(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params = params
        h = params.width
        self.feature = Embedding(in_dim, params)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(h), nn.LayerNorm(h), nn.LayerNorm(h)
        self.inside = Attention(h, params.heads, params.kernel)
        self.across = Attention(h, params.heads, 0)
        self.phi = nn.Linear(h, params.representatives, bias=False)
        self.drop = nn.Dropout(params.layer_dropout)
        self.attend = nn.Linear(h, params.attention_width, bias=False)
        self.score = nn.Linear(params.attention_width, 1, bias=False)
        self.classifier = nn.Linear(h, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        t = self.reembed(instances)
        s = self.score(ACTIVATIONS[self.params.attention_activation](self.attend(t)))[:, 0]
        a = weighted_softmax(s, instances.log_count)
        embedding = a.to(t.dtype) @ t  # (h,)
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = t @ self.classifier.weight.T  # (N, n_out)
        return of_shares(logits, embedding, a[None], a, evidence)

    def reembed(self, instances: Instances) -> Tensor:
        """(N, h) -> (N, h), each token having seen its region and the representatives of all regions."""
        z = instances.z
        n = len(z)
        regions, side = layout(n, self.params.regions)
        alive = z.new_ones(n, dtype=torch.bool) if instances.log_count is None else ~instances.log_count.isneginf()
        real = cut(alive[:, None], regions, side)[..., 0]  # (R, P)
        t = z + self.drop(whole(self.inside(cut(self.norm1(z), regions, side), real), regions, side, n))
        t = t + self.drop(whole(self._cross(cut(self.norm2(t), regions, side), real), regions, side, n))
        normed: Tensor = self.norm3(t)
        return normed

    def _cross(self, t: Tensor, real: Tensor) -> Tensor:
        """(R, P, h) -> (R, P, h). real: bool (R, P)."""
        low = torch.finfo(t.dtype).min
        logits = self.phi(t)  # (R, P, k)
        seen = real[..., None]
        top = logits.masked_fill(~seen, low).amax(dim=1, keepdim=True)
        bottom = logits.masked_fill(~seen, -low).amin(dim=1, keepdim=True)
        combine = torch.softmax(logits.masked_fill(~seen, low), dim=1) * seen
        held = torch.einsum("rpk,rph->krh", combine, t)  # (k, R, h)
        present = real.any(dim=1).expand(len(held), -1)  # (k, R)
        answered = self.across(held, present)  # the k-th representatives of all regions speak with each other
        scaled = ((logits - bottom) / (top - bottom).clamp_min(1e-8)).masked_fill(~seen, 0.0)
        back = torch.softmax(logits, dim=2) * scaled  # (R, P, k)
        return torch.einsum("rpk,krh->rph", back, answered)


def layout(n: int, regions: int) -> tuple[int, int]:
    """Regions per side, and tokens per side of a region, for n tokens in a square."""
    edge = math.isqrt(n - 1) + 1
    per_side = max(1, min(regions, edge // 4))
    return per_side, -(-edge // per_side)


def cut(t: Tensor, regions: int, side: int) -> Tensor:
    """Tokens (N, h) -> (regions^2, side^2, h); zeros fill the square."""
    edge = regions * side
    square = F.pad(t, (0, 0, 0, edge * edge - len(t)))
    return square.view(regions, side, regions, side, -1).transpose(1, 2).reshape(regions**2, side**2, -1)


def whole(t: Tensor, regions: int, side: int, n: int) -> Tensor:
    """The way back from `cut`: (regions^2, side^2, h) -> (N, h)."""
    return t.view(regions, regions, side, side, -1).transpose(1, 2).reshape((regions * side) ** 2, -1)[:n]


def build(in_dim: int, n_out: int, params: Params) -> Rrt:
    """A new model with fresh weights."""
    return Rrt(in_dim, n_out, params)
