"""ACMIL: attention-challenging MIL (Zhang, Li, Sun et al., ECCV 2024, arXiv 2311.07125), gated form.

z_n = relu(W x_n) (N, h), no bias;  K branches share V and U: s = A (tanh(V z_n + v) * sigmoid(U z_n + u)) + a (K, N);
p_i = softmax of row i;  branch logits = W_i sum_n p_in z_n + b_i;  the bag's attention is the mean of the branches',
logits = W sum_n p_n z_n + b.
Loss = task(bag) + mean_i task(branch i) + mean over pairs i < j of cos(p_i, p_j): the branches learn to look at
different places. In training, of each branch's k highest scores floor(rate k), drawn at random, are hidden before the
softmax, so that no branch leans on a few instances (STKIM); never at test. One branch has neither of the added terms.

Instance n adds p_n W z_n to the logits, exactly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike
from mhim.mil.parts.layers import dropout, initialise, weighted_softmax


class Params(Settings):
    """Settings of ACMIL."""

    width: int = Field(256, ge=8, description="width of an embedded instance")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the embedded instances")
    attention_width: int = Field(128, ge=1, description="width of the gated attention's hidden layer")
    branches: int = Field(5, ge=1, description="attention branches")
    top_k: int = Field(10, ge=0, description="highest scores of a branch among which some are hidden in training")
    mask_rate: float = Field(0.6, ge=0, lt=1, description="share of these that is hidden")


class AcMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params = params
        self.feature = nn.Linear(in_dim, params.width, bias=False)
        self.attend = nn.Linear(params.width, params.attention_width)
        self.gate = nn.Linear(params.width, params.attention_width)
        self.score = nn.Linear(params.attention_width, params.branches)
        several = params.branches if params.branches > 1 else 0
        self.branch_classifiers = nn.ModuleList(nn.Linear(params.width, n_out) for _ in range(several))
        self.classifier = nn.Linear(params.width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        return dropout(torch.relu(self.feature(x)), self.params.dropout if self.training else 0.0)

    def attention_logits(self, z: Tensor) -> Tensor:
        """(N, h) -> (K, N) before the softmax, nothing hidden."""
        logits: Tensor = self.score(torch.tanh(self.attend(z)) * torch.sigmoid(self.gate(z))).T
        return logits

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        return self._pool(instances, self.attention_logits(instances.z), detail)[0]

    def _pool(self, instances: Instances, s: Tensor, detail: bool) -> tuple[Encoded, Tensor]:
        """What the bag's branch says, and the attention of each branch (K, N)."""
        z = instances.z
        each = weighted_softmax(s, instances.log_count)
        p = each.mean(dim=0)
        embedding = p.to(z.dtype) @ z
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None]), each
        evidence = z @ self.classifier.weight.T  # (N, n_out)
        contribution = p[:, None] * evidence
        published = torch.softmax(contribution, dim=1).amax(dim=1)
        return Encoded(logits, embedding[None], each, p, evidence, contribution, published), each

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        found = self.instances(bag)
        pooled = [self._pool(i, self.hidden(self.attention_logits(i.z), i.log_count), False) for i in found]
        named = {"task": task.loss(torch.stack([e.logits for e, _ in pooled]), target)}
        k = self.params.branches
        if k == 1:
            return named
        each = [p.to(i.z.dtype) @ i.z for i, (_, p) in zip(found, pooled, strict=True)]  # (K, h) per bag
        answers = [torch.stack([c(e[i]) for e in each]) for i, c in enumerate(self.branch_classifiers)]
        named["branches"] = torch.stack([task.loss(a, target) for a in answers]).mean()
        named["diversity"] = torch.stack([self._alike(p) for _, p in pooled]).mean()
        return named

    def _alike(self, p: Tensor) -> Tensor:
        """Mean cosine between the attentions (K, N) of every two branches."""
        i, j = torch.triu_indices(len(p), len(p), 1, device=p.device)
        return F.cosine_similarity(p[i], p[j], dim=1).mean()

    def hidden(self, s: Tensor, log_count: Tensor | None) -> Tensor:
        """Scores (K, N) with some of each branch's highest at -1e9."""
        k = min(self.params.top_k, s.shape[1])
        hide = math.floor(self.params.mask_rate * k)
        if not self.training or hide == 0:
            return s
        there = s if log_count is None else s.masked_fill(log_count.isneginf(), -torch.inf)
        highest = there.topk(k, dim=1).indices  # (K, k), the r-th column is the r-th highest score
        ranks = self.draw(len(s), k, s.device).argsort(dim=1)[:, :hide]
        return s.scatter(1, highest.gather(1, ranks), -1e9)

    def draw(self, rows: int, k: int, device: torch.device) -> Tensor:
        """Uniform noise (rows, k): the ranks of the smallest are hidden."""
        return torch.rand(rows, k, device=device)


def build(in_dim: int, n_out: int, params: Params) -> AcMil:
    """A new model with fresh weights."""
    return AcMil(in_dim, n_out, params)
