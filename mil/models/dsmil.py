"""DSMIL: dual-stream multiple-instance learning (Li, Li, Eliceiri, CVPR 2021, arXiv 2011.08939).

z_n = embedding of x_n (N, h).  Stream 1: instance logits c_n = W_i z_n + b_i (N, C); max logits m_k = max_n c_nk, and
the instance that reaches it is critical for class k.  Stream 2: q_n = tanh(Q_2 relu(Q_1 z_n)), v_n = relu(V z_n);
A_nk = softmax_n(q_n . q_crit(k) / sqrt(128));  B_k = sum_n A_nk v_n (C, h) is the embedding;  bag logits
b_o = sum_k W_ok . B_k + b.  logits = (b + m) / 2, in training too, as MHIM-MIL uses it.

Instance n adds sum_k A_nk W_ok . v_n / 2 to logit o, and c_no / 2 more if it is critical for o. Its share is the mean
over classes of its attention, and of being critical, half each: an instance that decides the maximum is not small. Its
evidence is what both streams say of a bag of it alone: they may say the opposite of each other.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import Embedding, EmbeddingParams, initialise, weighted_softmax
from mhim.mil.ranges import Choice


class Params(EmbeddingParams):
    """Settings of DSMIL."""

    query_width: int = Field(128, ge=1, description="width of the queries")


TUNED = {"dropout": Choice((0.0, 0.25, 0.5))}


class DsMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.feature = Embedding(in_dim, params)
        self.instance = nn.Linear(params.width, n_out)
        self.query = nn.Sequential(
            nn.Linear(params.width, params.query_width),
            nn.ReLU(),
            nn.Linear(params.query_width, params.query_width),
            nn.Tanh(),
        )
        self.value = nn.Linear(params.width, params.width)
        self.bag = nn.Linear(n_out * params.width, n_out)  # the paper's Conv1d over classes with kernel h
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def embed_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x, rows)
        return embedded

    def alone(self, z: Tensor) -> tuple[Tensor, ...]:
        """Scores (N, C) of the instances, their queries and values."""
        return self.instance(z), self.query(z), torch.relu(self.value(z))

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z, log_count = instances.z, instances.log_count
        c, q, v = instances.alone or self.alone(z)
        if log_count is not None:  # equal copies change no maximum; only removal counts
            c = c.masked_fill(log_count.isneginf()[:, None], -torch.inf)
        highest, critical = c.max(dim=0)  # (C,) each
        a = weighted_softmax(q[critical] @ q.T / math.sqrt(q.shape[1]), log_count)  # (C, N)
        embedding = a.to(v.dtype) @ v  # (C, h)
        logits = 0.5 * (self.bag(embedding.flatten()) + highest)
        if not detail:
            return Encoded(logits, embedding)
        n_out = c.shape[1]
        is_critical = torch.arange(len(z), device=z.device)[:, None] == critical  # (N, C)
        own = c - self.instance.bias
        seen = (v @ self.bag.weight.view(n_out * n_out, -1).T).view(-1, n_out, n_out)  # (N, out, class)
        bag_part = torch.einsum("nok,kn->no", seen, a.to(seen.dtype))
        contribution = 0.5 * (bag_part + torch.where(is_critical, own, 0.0))
        share = 0.5 * (a.mean(0) + is_critical.to(a.dtype).mean(1))
        evidence = 0.5 * (seen.sum(2) + own)  # of the tile alone: all attention is its own, and it is critical
        return Encoded(logits, embedding, a, share, evidence, contribution, c.amax(1))


def build(in_dim: int, n_out: int, params: Params) -> DsMil:
    """A new model with fresh weights."""
    return DsMil(in_dim, n_out, params)
