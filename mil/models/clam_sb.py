"""CLAM, single branch (Lu, Williamson, Chen, Chen, Barbieri, Mahmood, Nature BME 2021, arXiv 2004.09666).

z_n = embedding of x_n (N, h);  s_n = w^T (tanh(V z_n + v) * sigmoid(U z_n + u)) + w_0, V, U: h -> 256;  a = softmax(s);
logits = W sum_n a_n z_n + b.  Beside the bag's loss, each class k has an instance classifier (h -> 2): of the bag's own
class the `clusters` instances of highest attention are positive, those of lowest negative; with `exclusive` (subtypes
that shut each other out) the highest are negative for every other class.  Loss = (1 - w) bag + w instance, w = 0.3.

The instance loss is the smooth SVM of the paper, log sum_j exp(s_j + [j != y]) - s_y, or cross-entropy. Where the paper
is silent: a bag of fewer than 2 `clusters` instances uses its highest and lowest halves, so that none is both; a bag
of one, and survival, which has no class, train on the bag's loss alone.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike
from mhim.mil.parts.layers import Activation, Embedding, EmbeddingParams, initialise, weighted_softmax
from mhim.mil.ranges import Choice


class Params(EmbeddingParams):
    """Settings of CLAM."""

    activation: Activation = Field("relu", description="activation of the instance embedding")
    attention_width: int = Field(256, ge=1, description="width of the gated attention's hidden layer")
    clusters: int = Field(8, ge=1, description="instances of highest and of lowest attention that are labelled")
    instance_weight: float = Field(0.3, ge=0, le=1, description="weight of the instance loss; the bag's has the rest")
    instance_loss: Literal["svm", "ce"] = Field("svm", description="smooth SVM as published, or cross-entropy")
    exclusive: bool = Field(True, description="high attention for one class speaks against the others")


TUNED = {"dropout": Choice((0.0, 0.25, 0.5)), "instance_weight": Choice((0.0, 0.1, 0.3)), "clusters": Choice((2, 4, 8))}


class Clam(MIL):
    """See the module's text. branches: attention branches, 1 (single) or n_out (multiple, one per row of W)."""

    def __init__(self, in_dim: int, n_out: int, params: Params, branches: int = 1) -> None:
        super().__init__()
        self.params = params
        self.feature = Embedding(in_dim, params)
        self.attend = nn.Linear(params.width, params.attention_width)
        self.gate = nn.Linear(params.width, params.attention_width)
        self.score = nn.Linear(params.attention_width, branches)
        self.classifier = nn.Linear(params.width, n_out)
        self.clusterer = nn.Linear(params.width, 2 * n_out)  # the instance classifiers, [negative, positive] per class
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def attention_logits(self, z: Tensor) -> Tensor:
        """(N, h) -> (branches, N) before the softmax."""
        logits: Tensor = self.score(torch.tanh(self.attend(z)) * torch.sigmoid(self.gate(z))).T
        return logits

    def alone(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.attention_logits(z).T,)

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        s = instances.alone[0].T if instances.alone else self.attention_logits(instances.z)
        return self._pool(instances, s, detail)

    def _pool(self, instances: Instances, s: Tensor, detail: bool) -> Encoded:
        z = instances.z
        a = weighted_softmax(s, instances.log_count)  # (branches, N)
        embedding = a.to(z.dtype) @ z  # (branches, h)
        logits = (embedding * self.classifier.weight).sum(dim=1) + self.classifier.bias  # one branch serves all rows
        if not detail:
            return Encoded(logits, embedding)
        evidence = z @ self.classifier.weight.T  # (N, n_out)
        contribution = a.T * evidence
        return Encoded(
            logits, embedding, a, a.mean(dim=0), evidence, contribution, torch.softmax(contribution, dim=1).amax(dim=1)
        )

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        found = [(i, self.attention_logits(i.z)) for i in self.instances(bag)]
        answers = [self._pool(i, s, self.entropy_weight > 0) for i, s in found]
        bag_loss, spread = task.loss(torch.stack([e.logits for e in answers]), target), self.spread(answers)
        if target.is_floating_point() or self.params.instance_weight == 0:
            return {"task": bag_loss} | spread
        each = [self._instance_loss(i.z, s, y) for (i, s), y in zip(found, target, strict=True)]
        w = self.params.instance_weight
        return {"task": (1 - w) * bag_loss, "instance": w * torch.stack(each).mean()} | spread

    def _instance_loss(self, z: Tensor, s: Tensor, y: Tensor) -> Tensor:
        """Mean over the classes that take part of the loss of their labelled instances. y: class index, a scalar."""
        k = min(self.params.clusters, len(z) // 2)
        if k == 0:
            return z.new_zeros(())
        n_out = self.classifier.out_features
        order = s.detach().argsort(dim=1, descending=True)  # (branches, N)
        chosen = torch.cat([order[:, :k], order[:, -k:]], dim=1).expand(n_out, -1)  # (n_out, 2k)
        rows = self.clusterer.weight.view(n_out, 2, -1)
        said = torch.einsum("kih,koh->kio", z[chosen], rows) + self.clusterer.bias.view(n_out, 1, 2)  # (n_out, 2k, 2)
        own = F.one_hot(y, n_out).bool()  # (n_out,); stays on the device
        top = torch.arange(2 * k, device=z.device) < k
        label = (own[:, None] & top[None]).long()
        margin = 1.0 - F.one_hot(label, 2) if self.params.instance_loss == "svm" else 0.0
        each = F.cross_entropy((said + margin).flatten(0, 1), label.flatten(), reduction="none").view(n_out, 2 * k)
        ours = each.mean(dim=1)
        if not self.params.exclusive:
            return torch.where(own, ours, 0.0).sum()
        theirs = each[:, :k].mean(dim=1)
        return torch.where(own, ours, theirs).mean()


def build(in_dim: int, n_out: int, params: Params) -> Clam:
    """A new model with fresh weights."""
    return Clam(in_dim, n_out, params)
