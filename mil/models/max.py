"""Max pooling of instance logits: the classic multiple-instance assumption, one instance makes the bag.

z_n = embedding of x_n (N, h);  c_n = W z_n + b (N, n_out);  logits_k = max_n c_nk. The share of an instance is the
number of outputs whose maximum it is, over n_out; only these instances receive a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import Embedding, EmbeddingParams, initialise
from mhim.mil.ranges import Choice


class Params(EmbeddingParams):
    """Settings of max pooling."""


TUNED = {"dropout": Choice((0.0, 0.25, 0.5))}


class MaxMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.feature = Embedding(in_dim, params)
        self.classifier = nn.Linear(params.width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        c = self.classifier(z)  # (N, n_out)
        if instances.log_count is not None:  # equal copies change no maximum; only removal counts
            c = c.masked_fill(instances.log_count.isneginf()[:, None], -torch.inf)
        logits, critical = c.max(dim=0)  # (n_out,) each
        embedding = z[critical]  # (n_out, h)
        if not detail:
            return Encoded(logits, embedding)
        evidence = z @ self.classifier.weight.T  # (N, n_out)
        mine = torch.arange(len(z), device=z.device)[:, None] == critical  # (N, n_out)
        contribution = torch.where(mine, evidence, 0.0)
        share = mine.to(torch.float32).mean(dim=1)
        return Encoded(logits, embedding, mine.T.to(z.dtype), share, evidence, contribution, c.amax(dim=1))


def build(in_dim: int, n_out: int, params: Params) -> MaxMil:
    """A new model with fresh weights."""
    return MaxMil(in_dim, n_out, params)
