"""TransMIL: correlated multiple-instance learning (Shao et al., NeurIPS 2021, arXiv 2106.00908).

z_n = embedding of x_n (N, h), a class token in front;  x <- x + Attn_1(LN x);  PPEG on the instances;
x <- x + Attn_2(LN x);  LN;  the class token is the bag embedding;  logits = W embedding + b. Attn is Nystrom attention
(8 heads, 256 landmarks, 6 steps of the pseudo-inverse, dropout 0.1), see `_nystrom`. It uses the instances' order.
As published, PPEG folds the list of instances into a square, in which neighbours of the slide are not neighbours;
ppeg=grid convolves where the tiles really lie (on a GPU it waits for the host once per bag, to learn the grid's size).

Only the class token leaves layer 2, so only its row is computed there: the same numbers for less than half the work.
The attention of an instance is the class token's row in layer 1, per head; it may be negative, so the share is its
positive part, mean over heads, scaled to sum 1. Instance n's contribution is its values weighted by that attention,
through layer 1's output projection and the classifier: MHIM-MIL's path past layer 2, PPEG, norm and residual.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import Embedding, EmbeddingParams, initialise
from mhim.mil.parts.nystrom import Attended, Nystrom
from mhim.mil.parts.ppeg import Ppeg
from mhim.mil.ranges import Choice

USES_POSITION = True


class Params(EmbeddingParams):
    """Settings of TransMIL."""

    heads: int = Field(8, ge=1, description="attention heads")
    landmarks: int = Field(256, ge=1, description="landmarks of the Nystrom attention")
    ppeg: Literal["sequence", "grid"] = Field(
        "sequence",
        description="what PPEG convolves: the list folded into a square, as published, or the tiles' own grid",
    )
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="dropout after each attention's output")

    @model_validator(mode="after")
    def _heads_fit(self) -> Params:
        if self.width % self.heads:
            raise ValueError(f"heads: width {self.width} is not a multiple of {self.heads}")
        return self


TUNED = {"dropout": Choice((0.0, 0.25, 0.5)), "heads": Choice((4, 8))}


class TransMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.feature = Embedding(in_dim, params)
        self.on_grid = params.ppeg == "grid"
        self.token = nn.Parameter(0.02 * torch.randn(params.width))
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(params.width) for _ in range(3))
        self.layer1, self.layer2 = (
            Nystrom(params.width, params.heads, params.landmarks, params.attention_dropout) for _ in range(2)
        )
        self.position = Ppeg(params.width)
        self.classifier = nn.Linear(params.width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def embed_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x, rows)
        return embedded

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        log_count = instances.log_count
        x = torch.cat([self.token[None].to(instances.z.dtype), instances.z])  # (N + 1, h)
        if log_count is not None:
            log_count = torch.cat([log_count.new_zeros(1), log_count])
        first = self.layer1(self.norm1(x), log_count, detail=detail)
        x = x + first.rows
        placed = x[1:]
        if log_count is not None:  # removed instances leave a hole
            placed = placed.masked_fill(log_count[1:].isneginf()[:, None], 0.0)
        if self.on_grid and instances.grid is not None:
            placed = self.position.on_grid(placed, instances.grid, None if log_count is None else log_count[1:].exp())
        else:
            placed = self.position(placed)
        x = torch.cat([x[:1], placed])
        x = x[:1] + self.layer2(self.norm2(x), log_count, first_only=True).rows
        embedding = self.norm(x)[0]
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        return Encoded(logits, embedding[None], *self._per_instance(first))

    def _per_instance(self, first: Attended) -> tuple[Tensor, ...]:
        """Attention, share, evidence, contribution and published score out of layer 1."""
        assert first.attention is not None
        assert first.values is not None
        attention, values = first.attention[:, 1:], first.values[1:]  # (H, N), (N, H, d)
        out = self.layer1.to_out
        path = (self.classifier.weight @ out.weight).unflatten(1, values.shape[1:])  # (n_out, H, d)
        said = torch.einsum("nhd,chd->hnc", values, path.to(values.dtype))  # (H, N, n_out)
        evidence = said.sum(0)
        contribution = (attention[:, :, None] * said).sum(0)
        positive = attention.clamp_min(0.0).mean(0)
        share = positive / positive.sum().clamp_min(1e-12)
        published = torch.softmax(contribution + self.classifier.weight @ out.bias, dim=1).amax(1)
        return attention, share, evidence, contribution, published


def build(in_dim: int, n_out: int, params: Params) -> TransMil:
    """A new model with fresh weights."""
    return TransMil(in_dim, n_out, params)
