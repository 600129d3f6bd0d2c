"""nnMIL's aggregator: attention that sees a random part of the channels (Luo et al., 2025, arXiv 2511.14907).

No embedding layer. s_n = w (tanh(V x_n + v) * sigmoid(U x_n + u)) + b_w, with x_n cut to a subset of `keep` channels
(the columns of V and U too, nothing rescaled); p = softmax(s); bag embedding = sum_n p_n x_n on all channels; logits =
W embedding + b. In training the subset is drawn anew for each step, one for all its bags. At test the channels are in
one fixed random order, cut into windows of `keep` with a step of keep / 4, one flush with the end: logits and attention
are the means over the windows (average=log_mean_exp: of a Cox model's log risks). How far the windows are apart says
how unsure the model is: `uncertainty`. keep 0: as many as the attention is wide; from D on there is one window.

Instance n adds p_n W x_n to the logits, exactly, p_n the mean over the windows (average=mean). The recipe's batches of
equal bags are train.max_tiles, train.batch_bags, train.balance=sampling and train.packed: rows are drawn anew in every
epoch, and padding weighs nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike, of_shares
from mhim.mil.parts import segments
from mhim.mil.parts.layers import dropout, initialise, weighted_softmax
from mhim.mil.ranges import Choice

SEED = 42  # of the order of channels at test, kept with the weights


class Params(Settings):
    """Settings of nnMIL's aggregator."""

    attention_width: int = Field(256, ge=1, description="width of the attention's hidden layer")
    keep: int = Field(0, ge=0, description="channels that the attention sees at a time; 0: attention_width")
    gated: bool = Field(True, description="a gate in the attention")
    subset: bool = Field(True, description="off: the attention sees all channels")
    dropout: float = Field(0.25, ge=0, lt=1, description="dropout in the attention")
    average: Literal["mean", "log_mean_exp"] = Field("mean", description="how windows are put together at test")


TUNED = {"dropout": Choice((0.0, 0.25, 0.5)), "attention_width": Choice((64, 128, 256))}


class NnMil(MIL):
    """See the module's text."""

    order: Tensor

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params, self.instance_width = params, in_dim
        self.keep = min(params.keep or params.attention_width, in_dim) if params.subset else in_dim
        self.attend = nn.Linear(in_dim, params.attention_width)
        self.gate = nn.Linear(in_dim, params.attention_width) if params.gated else None
        self.score = nn.Linear(params.attention_width, 1)
        self.classifier = nn.Linear(in_dim, n_out)
        initialise(self)
        self.register_buffer("order", torch.randperm(in_dim, generator=torch.Generator().manual_seed(SEED)))
        self._drawn: Tensor | None = None

    def embed(self, x: Tensor) -> Tensor:
        return x

    def attention_logits(self, z: Tensor, channels: Tensor | None) -> Tensor:
        """(N, D) -> (N,) before the softmax, of these channels (None: all)."""
        p = self.params.dropout if self.training else 0.0
        x = z if channels is None else z.index_select(1, channels)

        def linear(m: nn.Linear) -> Tensor:
            return nn.functional.linear(x, m.weight if channels is None else m.weight[:, channels], m.bias)

        hidden = dropout(torch.tanh(linear(self.attend)), p)
        if self.gate is not None:
            hidden = hidden * dropout(torch.sigmoid(linear(self.gate)), p)
        logits: Tensor = self.score(hidden)[:, 0]
        return logits

    def seen(self) -> list[Tensor | None]:
        """The channels of each pass over the bag: one draw in training, every window at test."""
        width = len(self.order)
        if self.keep >= width:
            return [None]
        if self.training:
            drawn = self.draw() if self._drawn is None else self._drawn
            return [drawn[: self.keep].to(self.order.device, non_blocking=True)]  # a GPU is not waited for
        starts = list(range(0, width - self.keep + 1, max(1, self.keep // 4)))
        if starts[-1] + self.keep < width:
            starts.append(width - self.keep)
        return [self.order[s : s + self.keep] for s in starts]

    def draw(self) -> Tensor:
        """A random order of the channels."""
        return torch.randperm(len(self.order))

    def windows(self, instances: Instances) -> tuple[Tensor, Tensor]:
        """Attention (W, N) and logits (W, n_out) of each pass."""
        z = instances.z
        p = torch.stack([weighted_softmax(self.attention_logits(z, c), instances.log_count) for c in self.seen()])
        return p, self.classifier(p.to(z.dtype) @ z)

    def encode_pack(self, z: Tensor, bag: Tensor, bags: int) -> Tensor | None:
        seen = self.seen()
        if len(seen) > 1:  # the windows of the test
            return None
        p = segments.softmax(self.attention_logits(z, seen[0]), bag, bags)
        logits: Tensor = self.classifier(segments.total(p[:, None].to(z.dtype) * z, bag, bags))
        return logits

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        each, answers = self.windows(instances)
        p = each.mean(0)
        embedding = p.to(z.dtype) @ z
        if self.params.average == "mean":
            logits = answers.mean(0)
        else:
            count = torch.tensor(float(len(answers)), dtype=torch.float32).log().item()  # as published, to its last bit
            logits = torch.logsumexp(answers, dim=0) - count
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = z @ self.classifier.weight.T.to(z.dtype)
        return of_shares(logits, embedding, each, p, evidence)

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        self._drawn = self.draw() if self.training and self.keep < len(self.order) else None
        try:
            return super().losses(bag, target, task)
        finally:
            self._drawn = None

    def uncertainty(self, instances: Instances) -> dict[str, Tensor]:
        """Of a classifier's windows: `total`, the entropy of the mean probabilities; `expected`, the mean entropy;
        `mutual_information`, their difference; `variance` (n_out,) of the probabilities, NaN of one window."""
        p = torch.softmax(self.windows(instances)[1], dim=1)
        total, each = _entropy(p.mean(0)), _entropy(p)
        variance = p.var(0) if len(p) > 1 else torch.full_like(p[0], torch.nan)
        expected = each.mean()
        return {
            "total": total,
            "expected": expected,
            "mutual_information": total - expected,
            "variance": variance,
        }


def _entropy(p: Tensor) -> Tensor:
    return -(p * torch.log(p + 1e-8)).sum(-1)


def build(in_dim: int, n_out: int, params: Params) -> NnMil:
    """A new model with fresh weights."""
    return NnMil(in_dim, n_out, params)
