"""SiMLP: a small network on the mean of a slide's features (arXiv 2502.20823).

bag embedding = dropout(activation(W1 mean(x) + b1)) (h,); logits = W2 embedding + b2. The paper's width and activation
are not told; these are the usual ones. The whole bag is one vector, so nothing of it is learned per instance: what is
told of instance n is its deviation from the mean through the network's slope there, and with 1 / N, exact to first
order.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances, of_shares
from mhim.mil.parts.layers import ACTIVATIONS, Activation, EmbeddingParams, dropout, initialise, weighted_softmax
from mhim.mil.ranges import Choice


class Params(EmbeddingParams):
    """Settings of SiMLP."""

    width: int = Field(512, ge=8, description="width of the hidden layer")
    activation: Activation = Field("relu", description="activation of the hidden layer")
    dropout: float = Field(0.25, ge=0, lt=1, description="dropout of the hidden layer")


TUNED = {"dropout": Choice((0.0, 0.25, 0.5))}


class SiMlp(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params, self.instance_width = params, in_dim
        self.hidden = nn.Linear(in_dim, params.width)
        self.classifier = nn.Linear(params.width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        return x

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        p = weighted_softmax(z.new_zeros(len(z)), instances.log_count)  # 1 / N each
        mean = p.to(z.dtype) @ z
        before = self.hidden(mean)
        after = ACTIVATIONS[self.params.activation](before)
        embedding = dropout(after, self.params.dropout if self.training else 0.0)
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = z @ (self.classifier.weight @ (self._slope(before)[:, None] * self.hidden.weight)).T.to(z.dtype)
        return of_shares(logits, embedding, p[None], p, evidence)

    def _slope(self, before: Tensor) -> Tensor:
        """Derivative (h,) of the activation at `before`."""
        if self.params.activation == "relu":
            return (before > 0).to(before.dtype)
        if self.params.activation == "tanh":
            return 1.0 - torch.tanh(before).square()
        slope: Tensor = torch.ops.aten.gelu_backward(torch.ones_like(before), before)
        return slope


def build(in_dim: int, n_out: int, params: Params) -> SiMlp:
    """A new model with fresh weights."""
    return SiMlp(in_dim, n_out, params)
