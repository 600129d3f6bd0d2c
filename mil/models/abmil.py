"""ABMIL: attention-based multiple-instance learning (Ilse, Tomczak, Welling, ICML 2018, arXiv 1802.04712).

z_n = embedding of x_n (N, h);  s_n = w^T act(V z_n), V: h -> 128, both without bias;  a = softmax(s) over the bag;
bag embedding = sum_n a_n z_n (h);  logits = W embedding + b (n_out). The paper's activation is tanh; MHIM-MIL's, taken
as default here, is ReLU. Instance n adds a_n W z_n to the logits, exactly.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances, of_shares
from mhim.mil.parts import segments
from mhim.mil.parts.layers import (
    ACTIVATIONS,
    Activation,
    Embedding,
    EmbeddingParams,
    initialise,
    weighted_softmax,
)
from mhim.mil.ranges import Choice


class Params(EmbeddingParams):
    """Settings of ABMIL."""

    attention_width: int = Field(128, ge=1, description="width of the attention's hidden layer")
    attention_activation: Activation = Field("relu", description="activation inside the attention")


TUNED = {"dropout": Choice((0.0, 0.25, 0.5)), "attention_width": Choice((64, 128, 256))}


class AbMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.activation = params.attention_activation
        self.feature = Embedding(in_dim, params)
        self.attend = nn.Linear(params.width, params.attention_width, bias=False)
        self.score = nn.Linear(params.attention_width, 1, bias=False)
        self.classifier = nn.Linear(params.width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def embed_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x, rows)
        return embedded

    def attention_logits(self, z: Tensor) -> Tensor:
        """(N, h) -> (N,) before the softmax."""
        logits: Tensor = self.score(ACTIVATIONS[self.activation](self.attend(z)))[:, 0]
        return logits

    def alone(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.attention_logits(z),)

    def encode_pack(self, z: Tensor, bag: Tensor, bags: int) -> Tensor:
        a = segments.softmax(self.attention_logits(z), bag, bags)
        logits: Tensor = self.classifier(segments.total(a[:, None].to(z.dtype) * z, bag, bags))
        return logits

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        (s,) = instances.alone or self.alone(z)
        a = weighted_softmax(s, instances.log_count)
        embedding = a.to(z.dtype) @ z  # (h,)
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = z @ self.classifier.weight.T  # (N, n_out)
        return of_shares(logits, embedding, a[None], a, evidence)


def build(in_dim: int, n_out: int, params: Params) -> AbMil:
    """A new model with fresh weights."""
    return AbMil(in_dim, n_out, params)
