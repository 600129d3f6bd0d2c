"""Mean pooling: the plainest bag classifier, a floor for every other model.

z_n = embedding of x_n (N, h);  bag embedding = mean of z_n (h);  logits = W embedding + b (n_out). Instance n adds
W z_n / N to the logits, exactly.
"""

from __future__ import annotations

from torch import Tensor, nn

from mhim.mil.models import MIL, Encoded, Instances, of_shares
from mhim.mil.parts import segments
from mhim.mil.parts.layers import Embedding, EmbeddingParams, initialise, weighted_softmax
from mhim.mil.ranges import Choice


class Params(EmbeddingParams):
    """Settings of mean pooling."""


TUNED = {"dropout": Choice((0.0, 0.25, 0.5))}


class MeanMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.feature = Embedding(in_dim, params)
        self.classifier = nn.Linear(params.width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def encode_pack(self, z: Tensor, bag: Tensor, bags: int) -> Tensor:
        share = segments.softmax(z.new_zeros(len(z)), bag, bags)
        logits: Tensor = self.classifier(segments.total(share[:, None].to(z.dtype) * z, bag, bags))
        return logits

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        a = weighted_softmax(z.new_zeros(len(z)), instances.log_count)  # 1 / N each
        embedding = a.to(z.dtype) @ z  # (h,)
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = z @ self.classifier.weight.T  # (N, n_out)
        return of_shares(logits, embedding, a[None], a, evidence)


def build(in_dim: int, n_out: int, params: Params) -> MeanMil:
    """A new model with fresh weights."""
    return MeanMil(in_dim, n_out, params)
