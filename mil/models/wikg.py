"""WiKG: instances as heads and tails of a graph that the features make (Li et al., CVPR 2024, arXiv 2403.07719).

z_n = LeakyReLU(W x_n) (N, h); z <- (z + mean z) / 2; heads e = W_e z, tails t = W_t z. Of each instance the k tails
with the largest e_i t_j / sqrt(h) are its neighbours, itself allowed; w = softmax of these k. r_ij = w_ij t_j + (1 -
w_ij) e_i, u_ij = t_j tanh(e_i + r_ij), n_i = sum_j softmax_j(u_ij) t_j. mix "both": v = LeakyReLU(W1 (e + n)) +
LeakyReLU(W2 (e * n)); "concat": v = LeakyReLU(W1 [e | n]). Readout: mean of v, or attention softmax_n(w2 LeakyReLU(W
v_n)); bag embedding = LN of it; logits = W embedding + b.

u is the paper's. The authors' program sums over neighbours on both sides of that product (an index slip: u becomes
(sum_l t_l)(sum_m tanh_m)), which ties no weight to the neighbour it is of. The N x N scores are made in blocks of rows
and only the neighbours' numbers are kept; in training a long bag's blocks are computed again for the gradient.
Instance n's contribution is its share of W v_n, past the norm.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Encoded, Instances, of_shares
from mhim.mil.parts.layers import dropout, weighted_softmax
from mhim.mil.ranges import Choice

SCORES = 4_000_000  # entries of one block of the N x N scores: 16 MB
ROWS = 2048  # most instances of a block


class Params(Settings):
    """Settings of WiKG."""

    width: int = Field(512, ge=8, description="width of an embedded instance")
    neighbours: int = Field(6, ge=1, description="tails that each instance is joined to")
    mix: Literal["both", "concat"] = Field(
        "both", description="instance and neighbourhood: sum and product, or side by side (bi-interaction, sage)"
    )
    readout: Literal["attention", "mean"] = Field("attention", description="how the bag is read")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout of the mixed instances")


TUNED = {"neighbours": Choice((3, 6, 12)), "dropout": Choice((0.0, 0.3))}


class Wikg(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params = params
        width = params.width
        self.feature = nn.Linear(in_dim, width)
        self.head, self.tail = nn.Linear(width, width), nn.Linear(width, width)
        if params.mix == "both":
            self.added, self.multiplied = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.joined = nn.Linear(2 * width, width)
        if params.readout == "attention":
            self.attend, self.score = nn.Linear(width, width // 2), nn.Linear(width // 2, 1)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_out)

    def embed(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.feature(x))

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z, log_count = instances.z, instances.log_count
        alike = weighted_softmax(z.new_zeros(len(z)), log_count)  # 1 / N each
        z = 0.5 * (z + (alike.to(z.dtype) @ z)[None])
        e, t = self.head(z), self.tail(z)
        near = self.neighbourhood(e, t, None if log_count is None else log_count.isneginf())
        v = self._mixed(e, near)
        if self.params.readout == "attention":
            p = weighted_softmax(self.score(F.leaky_relu(self.attend(v)))[:, 0], log_count)
        else:
            p = alike
        embedding = self.norm(p.to(v.dtype) @ v)
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = v @ self.classifier.weight.T.to(v.dtype)
        return of_shares(logits, embedding, p[None], p, evidence)

    def neighbourhood(self, e: Tensor, t: Tensor, gone: Tensor | None) -> Tensor:
        """n (N, h) of heads e and tails t (N, h) each. gone: bool (N,), instances that are nobody's neighbour."""
        size = max(1, min(ROWS, SCORES // len(t)))
        again = torch.is_grad_enabled() and len(t) > size
        found = []
        for part in e.split(size):
            where, dead = self.nearest(part, t, gone)
            if again:  # the neighbours' tails of all instances would be k copies of the bag, several times
                found.append(checkpoint(_read, part, t, where, dead, use_reentrant=False))
            else:
                found.append(_read(part, t, where, dead))
        return torch.cat(found)

    @torch.no_grad()
    def nearest(self, e: Tensor, t: Tensor, gone: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows (M, k) of t that score highest for each of M heads, in falling order; and which of them are gone."""
        scores = e @ t.T
        if gone is not None:
            scores = scores.masked_fill(gone, -torch.inf)
        where = scores.topk(min(self.params.neighbours, len(t)), dim=1).indices
        return where, None if gone is None else gone[where]

    def _mixed(self, e: Tensor, near: Tensor) -> Tensor:
        if self.params.mix == "both":
            v = F.leaky_relu(self.added(e + near)) + F.leaky_relu(self.multiplied(e * near))
        else:
            v = F.leaky_relu(self.joined(torch.cat([e, near], dim=1)))
        return dropout(v, self.params.dropout if self.training else 0.0)


def _read(e: Tensor, t: Tensor, where: Tensor, dead: Tensor | None) -> Tensor:
    """n_i of M heads e (M, h) and their neighbours t[where], where (M, k)."""
    near = t.index_select(0, where.flatten()).view(*where.shape, -1)  # (M, k, h)
    w = _weights(torch.einsum("mh,mkh->mk", e, near) / math.sqrt(e.shape[1]), dead)[..., None].to(e.dtype)
    r = w * near + (1 - w) * e[:, None]
    u = (near * torch.tanh(e[:, None] + r)).sum(-1)
    return torch.einsum("mk,mkh->mh", _weights(u, dead).to(near.dtype), near)


def _weights(scores: Tensor, dead: Tensor | None) -> Tensor:
    return weighted_softmax(scores if dead is None else scores.masked_fill(dead, -torch.inf), None)


def build(in_dim: int, n_out: int, params: Params) -> Wikg:
    """A new model with fresh weights."""
    return Wikg(in_dim, n_out, params)
