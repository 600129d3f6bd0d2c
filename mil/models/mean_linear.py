"""The linear control: one linear map of the mean of a slide's features.

bag embedding = mean of x_n (D,), nothing embedded; logits = W embedding + b: a logistic regression (or linear, or Cox
regression, by the task) on the mean tile, with train.weight_decay as its ridge. What no attention model beats on a set
has no instances to find there. Standardised features (train.standardize) cost nothing. Instance n adds W x_n / N to the
logits, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import weighted_softmax


class Params(Settings):
    """The linear control has no settings."""


class MeanLinear(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.instance_width = in_dim
        self.classifier = nn.Linear(in_dim, n_out)
        nn.init.zeros_(self.classifier.weight)  # convex: the start decides nothing but the first step
        nn.init.zeros_(self.classifier.bias)

    def embed(self, x: Tensor) -> Tensor:
        return x

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        p = weighted_softmax(z.new_zeros(len(z)), instances.log_count)  # 1 / N each
        embedding = p.to(z.dtype) @ z
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = z @ self.classifier.weight.T.to(z.dtype)
        contribution = p[:, None] * evidence
        published = torch.softmax(contribution, dim=1).amax(dim=1)
        return Encoded(logits, embedding[None], p[None], p, evidence, contribution, published)


def build(in_dim: int, n_out: int, params: Params) -> MeanLinear:
    """A new model with weights of zero."""
    return MeanLinear(in_dim, n_out, params)
