"""Gated ABMIL (Ilse, Tomczak, Welling, ICML 2018, arXiv 1802.04712, equation 9).

As `abmil`, with  s_n = w^T (tanh(V z_n) * sigmoid(U z_n)),  V, U: h -> 128, all without bias.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.mil.models import abmil
from mhim.mil.parts.layers import ACTIVATIONS, Activation, initialise
from mhim.mil.ranges import Choice


class Params(abmil.Params):
    """Settings of gated ABMIL."""

    attention_activation: Activation = Field("tanh", description="activation inside the attention, beside the gate")


TUNED = {"dropout": Choice((0.0, 0.25, 0.5)), "attention_width": Choice((64, 128, 256))}


class GatedAbMil(abmil.AbMil):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__(in_dim, n_out, params)
        self.gate = nn.Linear(params.width, params.attention_width, bias=False)
        initialise(self.gate)

    def attention_logits(self, z: Tensor) -> Tensor:
        """(N, h) -> (N,) before the softmax."""
        logits: Tensor = self.score(ACTIVATIONS[self.activation](self.attend(z)) * torch.sigmoid(self.gate(z)))[:, 0]
        return logits


def build(in_dim: int, n_out: int, params: Params) -> GatedAbMil:
    """A new model with fresh weights."""
    return GatedAbMil(in_dim, n_out, params)
