"""Log-sum-exp pooling: between the mean and the maximum (Pinheiro and Collobert, CVPR 2015, arXiv 1411.6228).

LSE_r(s) = (1/r) log((1/N) sum_n exp(r s_n)): the mean as r -> 0, the maximum as r -> infinity. place "instance": s is
the logit of each instance and class, W z_n + b (N, n_out), and logits = LSE over the instances. place "embedding": LSE
of every channel of z (N, h), then W and b. z_n = embedding of x_n; the published form has a ReLU there.

An instance's share is LSE's derivative, softmax_n(r s_n), mean over classes (or channels). What it adds to a class is
that derivative times its logit without bias, exact where r -> 0. Without the 1/N, as one public program has it, a bag's
value grows by log N / r with its size, which says nothing of the slide: it is kept here.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import Activation, Embedding, EmbeddingParams, initialise, weighted_softmax
from mhim.mil.ranges import Choice, Span


class Params(EmbeddingParams):
    """Settings of log-sum-exp pooling."""

    activation: Activation = Field("relu", description="activation of the instance embedding")
    r: float = Field(4.0, gt=0, description="sharpness: towards 0 the mean, large the maximum; tune it")
    place: Literal["instance", "embedding"] = Field("instance", description="what is pooled: logits, or embeddings")


TUNED = {"r": Span(0.25, 16.0, log=True), "place": Choice(("instance", "embedding"))}


class LseMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.r, self.place = params.r, params.place
        self.feature = Embedding(in_dim, params)
        self.classifier = nn.Linear(params.width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def embed_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x, rows)
        return embedded

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z, log_count = instances.z, instances.log_count
        if self.place == "instance":
            s = self.classifier(z)  # (N, n_out)
            logits = self._pooled(s, log_count).to(z.dtype)
            embedding = z.mean(0) if log_count is None else weighted_softmax(z.new_zeros(len(z)), log_count) @ z
        else:
            s = z
            embedding = self._pooled(s, log_count).to(z.dtype)  # (h,)
            logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        a = weighted_softmax(self.r * s.T, log_count)  # (n_out or h, N), LSE's derivative
        evidence = z @ self.classifier.weight.T  # (N, n_out)
        share = a.mean(0)
        contribution = (a.T if self.place == "instance" else share[:, None]) * evidence
        attention = a if self.place == "instance" else share[None]
        return Encoded(
            logits,
            embedding[None],
            attention,
            share,
            evidence,
            contribution,
            torch.softmax(contribution, dim=1).amax(dim=1),
        )

    def _pooled(self, s: Tensor, log_count: Tensor | None) -> Tensor:
        """LSE_r over the rows of s (N, K) -> (K,), each row counted exp(log_count) times."""
        wide = s if s.dtype == torch.float64 else s.float()
        weight = wide.new_zeros(len(s)) if log_count is None else log_count.to(wide.dtype)
        total = torch.logsumexp(weight, dim=0)
        return (torch.logsumexp(self.r * wide + weight[:, None], dim=0) - total) / self.r


def build(in_dim: int, n_out: int, params: Params) -> LseMil:
    """A new model with fresh weights."""
    return LseMil(in_dim, n_out, params)
