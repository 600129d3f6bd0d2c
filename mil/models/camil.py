"""CAMIL: attention to what surrounds a tile (Fourkioti et al., ICLR 2024, arXiv 2305.05314).

z_n = embedding of x_n (N, h); embed off, as its authors have it: z_n = x_n. T = z + Nys(LN z), Nystrom attention
without convolution and output map. q, k, v = linear maps of T without bias. w_i = sum_j (q_i k_j) A_ij / sqrt(h), A_ij
= exp(- distance of x_i and x_j) for the 8 tiles around tile i, else 0; l_i = softmax(w)_i v_i; M = sigmoid(l) l + (1 -
sigmoid(l)) T, entry by entry: what the neighbours agree on, and what the tile says alone. s_n = w tanh(V T_n + b)
(gated: * sigmoid(U T_n + u)), p = softmax(s), bag embedding = sum_n p_n M_n, logits = W embedding + b. It uses the
order and place of instances.

Distances of features of width 1,024 are of the size 10 to 100, and exp(-distance) is 0 for all: here they are in units
of their mean over the bag (distance=scaled); the paper's are plain. Since A is symmetric, w = q (A k), in memory of the
order of N. Instance n adds p_n W M_n to the logits, exactly, M_n being what attention made of all.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances, of_shares
from mhim.mil.parts.layers import Embedding, EmbeddingParams, initialise, weighted_softmax
from mhim.mil.parts.neighbours import Graph, touching
from mhim.mil.parts.nystrom import Nystrom
from mhim.mil.parts.queries import whole_heads
from mhim.mil.ranges import Choice

USES_POSITION = True


class Params(EmbeddingParams):
    """Settings of CAMIL."""

    embed: bool = Field(True, description="embedding layer; off, as published: the features as they are")
    heads: int = Field(4, ge=1, description="heads of the Nystrom attention")
    landmarks: int = Field(256, ge=1, description="landmarks of the Nystrom attention")
    attention_width: int = Field(128, ge=1, description="width of the pooling attention's hidden layer")
    gated: bool = Field(True, description="a gate in the pooling attention")
    distance: Literal["scaled", "plain"] = Field(
        "scaled", description="distance of neighbours' embeddings, in units of its mean over the bag, or plain"
    )

    @model_validator(mode="after")
    def _whole(self) -> Params:
        if self.embed:
            whole_heads(self.width, self.heads)
        return self


TUNED = {"dropout": Choice((0.0, 0.25, 0.5)), "distance": Choice(("scaled", "plain"))}


class CaMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params = params
        width = self.instance_width = params.width if params.embed else in_dim
        whole_heads(width, params.heads)
        self.feature = Embedding(in_dim, params) if params.embed else None
        self.norm = nn.LayerNorm(width)
        self.attention = Nystrom(width, params.heads, params.landmarks, 0.0, plain=True)
        self.query_key = nn.Linear(width, 2 * width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.attend = nn.Linear(width, params.attention_width)
        self.gate = nn.Linear(width, params.attention_width) if params.gated else None
        self.score = nn.Linear(params.attention_width, 1, bias=False)
        self.classifier = nn.Linear(width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        return x if self.feature is None else self.feature(x)

    def adjacency(self, z: Tensor, rows: Tensor) -> Tensor:
        """A_nm (8, N) of each instance and the neighbours rows (8, N), before those that are none are left out."""
        with torch.no_grad():
            found = torch.stack([(z - z.index_select(0, r)).float().norm(dim=1) for r in rows])
            if self.params.distance == "scaled":
                found = found / (found.sum() / (found > 0).sum().clamp_min(1)).clamp_min(1e-12)
            return torch.exp(-found).to(z.dtype)

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z, log_count = instances.z, instances.log_count
        t = z + self.attention(self.norm(z), log_count).rows
        grid = z.new_zeros(len(z), 2) if instances.grid is None else instances.grid
        rows, there = touching(grid, None if log_count is None else log_count.isneginf())
        graph = Graph(rows, self.adjacency(z, rows) * there, z.new_zeros(len(z)))
        q, k = self.query_key(t).chunk(2, dim=1)
        w = (q * graph.product(k)).sum(1) / math.sqrt(z.shape[1])
        near = weighted_softmax(w, log_count)[:, None].to(t.dtype) * self.value(t)
        mixed = torch.lerp(t, near, torch.sigmoid(near).to(t.dtype))
        hidden = torch.tanh(self.attend(t))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(t))
        p = weighted_softmax(self.score(hidden)[:, 0], log_count)
        embedding = p.to(mixed.dtype) @ mixed
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = mixed @ self.classifier.weight.T.to(mixed.dtype)
        return of_shares(logits, embedding, p[None], p, evidence)


def build(in_dim: int, n_out: int, params: Params) -> CaMil:
    """A new model with fresh weights."""
    return CaMil(in_dim, n_out, params)
