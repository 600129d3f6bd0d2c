"""A plain pre-norm transformer over the tiles of a bag with 2-D position from their coordinates.

Dosovitskiy et al., ICLR 2021, arXiv 2010.11929, with exact attention (Dao et al., NeurIPS 2022, arXiv 2205.14135, where
the device has such a kernel: memory linear in N, time quadratic) instead of an approximation.

z_n = embedding of x_n + P(grid_n) (N, h), P: sines and cosines, the first half of the channels for x, the second for y,
wavelengths 2 to 2 `span` tile edges, relative to the bag's own corner, so that a shifted slide is the same slide. A
class token is put in front. Each layer:  t += Attn(LN(t));  t += MLP(LN(t)).  logits = W LN(class token) + b. In the
last layer only the class token asks, because nothing else is read after it.

Share: the class token's attention in the last layer, mean over heads, over the instances. Evidence: what the values of
the last layer say by the straight path through output projection and classifier, leaving out the class token's MLP
and norm; it is a direction, not an exact part of the logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import Embedding, EmbeddingParams, initialise
from mhim.mil.ranges import Choice

USES_POSITION = True


class Params(EmbeddingParams):
    """Settings of the plain transformer."""

    layers: int = Field(2, ge=1, description="transformer layers")
    heads: int = Field(8, ge=1, description="attention heads")
    mlp_ratio: float = Field(2.0, gt=0, description="width of the MLP over the model's")
    layer_dropout: float = Field(0.1, ge=0, lt=1, description="dropout of each layer's two branches")
    span: float = Field(512.0, ge=4, description="half the longest wavelength of the position code, tile edges")

    @model_validator(mode="after")
    def _even(self) -> Params:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 and of heads ({self.heads})")
        return self


TUNED = {"layers": Choice((1, 2)), "dropout": Choice((0.0, 0.25, 0.5))}


class Layer(nn.Module):
    """One pre-norm layer on tokens (T, h)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        h = params.width
        self.heads, self.drop = params.heads, nn.Dropout(params.layer_dropout)
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.query, self.key_value, self.out = nn.Linear(h, h), nn.Linear(h, 2 * h), nn.Linear(h, h)
        hidden = int(h * params.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(h, hidden), nn.GELU(), nn.Linear(hidden, h))

    def forward(
        self,
        t: Tensor,
        bias: Tensor | None,
        first_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer's tokens (all, or the first alone), and queries, keys, values (H, ., d). bias: (T,) or None."""
        n = self.norm1(t)
        asking = n[:1] if first_only else n
        q = self._split(self.query(asking))
        k, v = (self._split(x) for x in self.key_value(n).chunk(2, dim=1))
        mask = None if bias is None else bias.to(q.dtype).expand(1, 1, 1, -1)
        found = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]  # (H, T', d)
        t = t[: len(asking)] + self.drop(self.out(found.transpose(0, 1).flatten(1)))
        return t + self.drop(self.mlp(self.norm2(t))), q, k, v

    def _split(self, x: Tensor) -> Tensor:
        """(T, h) -> (H, T, d)."""
        return x.view(len(x), self.heads, -1).transpose(0, 1)


class Transformer(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.span = params.span
        self.feature = Embedding(in_dim, params)
        self.token = nn.Parameter(torch.empty(1, params.width).normal_(std=0.02))
        self.layers = nn.ModuleList(Layer(params) for _ in range(params.layers))
        self.norm = nn.LayerNorm(params.width)
        self.classifier = nn.Linear(params.width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        if instances.grid is not None:
            z = z + position(instances.grid, z.shape[1], self.span).to(z.dtype)
        t = torch.cat([self.token.to(z.dtype), z])
        bias = None if instances.log_count is None else F.pad(instances.log_count, (1, 0))
        for layer in self.layers[:-1]:
            t = layer(t, bias)[0]
        last = self.layers[-1]
        assert isinstance(last, Layer)
        t, q, k, v = last(t, bias, first_only=True)
        embedding = self.norm(t)  # (1, h)
        logits = self.classifier(embedding)[0]
        if not detail:
            return Encoded(logits, embedding)
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        asked = (q @ k.mT)[:, 0].to(wide) / math.sqrt(q.shape[-1])  # (H, T)
        a = torch.softmax(asked if bias is None else asked + bias, dim=1)[:, 1:]  # (H, N)
        share = a.mean(dim=0)
        rows = self.classifier.weight @ last.out.weight  # (n_out, h)
        per_head = torch.einsum("hnd,chd->hnc", v[:, 1:], rows.view(len(rows), last.heads, -1))
        evidence = per_head.sum(dim=0)
        contribution = (a[..., None] * per_head).sum(dim=0)
        return Encoded(
            logits,
            embedding,
            a,
            share / share.sum().clamp_min(1e-12),
            evidence,
            contribution,
            torch.softmax(contribution, dim=1).amax(dim=1),
        )


def position(grid: Tensor, width: int, span: float) -> Tensor:
    """Position code (N, width) of places (N, 2) in tile edges, from the bag's own corner."""
    place = grid - grid.amin(dim=0, keepdim=True)
    quarter = width // 4
    wave = 2.0 * span ** (torch.arange(quarter, device=grid.device, dtype=grid.dtype) / max(quarter - 1, 1))
    angle = 2.0 * math.pi * place[..., None] / wave  # (N, 2, quarter)
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1)


def build(in_dim: int, n_out: int, params: Params) -> Transformer:
    """A new model with fresh weights."""
    return Transformer(in_dim, n_out, params)
