"""AEM: attention whose entropy is kept high (Zhang et al., 2024, arXiv 2406.15303), with the two heads of its authors.

z_n = relu(W x_n) (N, h), no bias. form "gated": s_n = w (tanh(V z_n + v) * sigmoid(U z_n + u)) + b_w, p = softmax(s),
bag embedding = sum_n p_n z_n. form "query": one learned query, H heads, see `parts/queries.py`. logits = W embedding +
b. Loss = task + entropy * sum_n p_n log p_n (mean over heads), with `entropy` annealed by a half cosine over the
epochs, as the paper has it; 0 is plain attention. The term is `MIL.spread`: train.attention_entropy gives it to any
other attention model, MHIM's students too. The sum reaches from -log N to 0: on long bags it pulls harder.

Gated, instance n adds p_n W z_n to the logits, exactly; with heads, what is told is the path past the norm.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import dropout, initialise, weighted_softmax
from mhim.mil.parts.masking import cosine
from mhim.mil.parts.queries import Pool, Scores, whole_heads
from mhim.mil.ranges import Span


class Params(Settings):
    """Settings of AEM."""

    form: Literal["gated", "query"] = Field("gated", description="attention: gated, or a learned query's heads")
    width: int = Field(256, ge=8, description="width of an embedded instance")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the embedded instances")
    attention_width: int = Field(128, ge=1, description="width of the gated attention's hidden layer (form=gated)")
    heads: int = Field(8, ge=1, description="attention heads (form=query)")
    entropy: float = Field(0.1, ge=0, description="weight of the attention's negative entropy in the loss")
    anneal: bool = Field(True, description="this weight falls to 0 over the epochs by a half cosine")

    @model_validator(mode="after")
    def _whole(self) -> Params:
        if self.form == "query":
            whole_heads(self.width, self.heads)
        return self


TUNED = {"entropy": Span(1e-3, 0.3, log=True)}


class Aem(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params, self.entropy_weight = params, params.entropy
        self.feature = nn.Linear(in_dim, params.width, bias=False)
        if params.form == "gated":
            self.attend = nn.Linear(params.width, params.attention_width)
            self.gate = nn.Linear(params.width, params.attention_width)
            self.score = nn.Linear(params.attention_width, 1)
        self.classifier = nn.Linear(params.width, n_out)
        initialise(self)
        if params.form == "query":  # these keep the library's start, as published
            self.queries = nn.Parameter(1e-6 * torch.randn(1, params.width))
            self.scores = Scores(params.width, params.heads)
            self.pool = Pool(params.width, params.heads)

    def embed(self, x: Tensor) -> Tensor:
        return dropout(torch.relu(self.feature(x)), self.params.dropout if self.training else 0.0)

    def set_progress(self, done: float) -> None:
        self.entropy_weight = cosine(self.params.entropy, 0.0, done) if self.params.anneal else self.params.entropy

    def attention_logits(self, z: Tensor) -> Tensor:
        """(N, h) -> (heads, N) before the softmax; gated, one head."""
        if self.params.form == "query":
            scores: Tensor = self.scores(self.queries, z)[:, 0]
            return scores
        logits: Tensor = self.score(torch.tanh(self.attend(z)) * torch.sigmoid(self.gate(z))).T
        return logits

    def alone(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.attention_logits(z).T,)

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        s = instances.alone[0].T if instances.alone else self.attention_logits(z)
        p = weighted_softmax(s, instances.log_count)  # (H, N)
        gated = self.params.form == "gated"
        embedding = p[0].to(z.dtype) @ z if gated else self.pool(p[:, None], z)[0]
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        of_heads = (z @ self.classifier.weight.T)[:, None] if gated else self.pool.evidence(self.classifier.weight, z)
        contribution = (p.T[..., None] * of_heads).sum(1)
        published = torch.softmax(contribution, dim=1).amax(dim=1)
        return Encoded(logits, embedding[None], p, p.mean(0), of_heads.sum(1), contribution, published)


def build(in_dim: int, n_out: int, params: Params) -> Aem:
    """A new model with fresh weights."""
    return Aem(in_dim, n_out, params)
