"""FEATHER's layout: gated ABMIL for pretrained weights of one's own (Shao et al., ICML 2025, arXiv 2506.09022).

z_n = ReLU(W x_n + b) (N, h), once or (layers=2) twice; s_n = w (tanh(V z_n + v) * sigmoid(U z_n + u)) + b_w, or without
the gate; p = softmax(s); bag embedding = sum_n p_n z_n; logits = W embedding + b. Weights start Kaiming-uniform, biases
0. `train.pretrained` starts it from a file of the user's own: `mil/pretrained.py` checks every name and shape, and
which encoder the weights were made for. Instance n adds p_n W z_n to the logits, exactly.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Encoded, Instances, of_shares
from mhim.mil.parts.layers import dropout, weighted_softmax
from mhim.mil.ranges import Choice


class Params(Settings):
    """Settings of FEATHER's layout."""

    width: int = Field(512, ge=8, description="width of an embedded instance")
    layers: int = Field(1, ge=1, le=2, description="embedding layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the embedded instances")
    attention_width: int = Field(384, ge=1, description="width of the attention's hidden layer")
    attention_dropout: float = Field(0.25, ge=0, lt=1, description="dropout in the attention")
    gated: bool = Field(True, description="a gate in the attention")


TUNED = {"attention_dropout": Choice((0.0, 0.25)), "dropout": Choice((0.0, 0.1, 0.25))}


class Feather(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params = params
        dims = [in_dim, *[params.width] * params.layers]
        self.embedding = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))
        self.attend = nn.Linear(params.width, params.attention_width)
        self.gate = nn.Linear(params.width, params.attention_width) if params.gated else None
        self.score = nn.Linear(params.attention_width, 1)
        self.classifier = nn.Linear(params.width, n_out)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
                nn.init.zeros_(linear.bias)

    def embed(self, x: Tensor) -> Tensor:
        for linear in self.embedding:
            x = dropout(torch.relu(linear(x)), self.params.dropout if self.training else 0.0)
        return x

    def attention_logits(self, z: Tensor) -> Tensor:
        """(N, h) -> (N,) before the softmax."""
        p = self.params.attention_dropout if self.training else 0.0
        hidden = dropout(torch.tanh(self.attend(z)), p)
        if self.gate is not None:
            hidden = hidden * dropout(torch.sigmoid(self.gate(z)), p)
        logits: Tensor = self.score(hidden)[:, 0]
        return logits

    def alone(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.attention_logits(z),)

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        (s,) = instances.alone or self.alone(z)
        p = weighted_softmax(s, instances.log_count)
        embedding = p.to(z.dtype) @ z
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = z @ self.classifier.weight.T.to(z.dtype)
        return of_shares(logits, embedding, p[None], p, evidence)


def build(in_dim: int, n_out: int, params: Params) -> Feather:
    """A new model with fresh weights."""
    return Feather(in_dim, n_out, params)
