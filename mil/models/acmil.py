"""ACMIL: attention-challenging MIL (Zhang, Li, Sun et al., ECCV 2024, arXiv 2311.07125).

z_n = relu(W x_n) (N, h), no bias. K branches, each with its own attention p_i over the instances, answer for
themselves; the bag's attention is the mean of the branches'. form "gated": the branches share V and U: s = A (tanh(V
z_n + v) * sigmoid(U z_n + u)) + a (K, N), p_i = softmax of row i; branch logits = W_i sum_n p_in z_n + b_i, logits = W
sum_n p_n z_n + b. form "heads": each branch is a learned query with an attention of H heads of its own
(`parts/queries.py`); the bag has values, output map and norm of its own, pooled per head by the mean of the branches'
attention.

Loss = task(bag) + mean_i task(branch i) + mean over pairs i < j (and heads) of cos(p_i, p_j): the branches learn to
look at different places. In training, of the k highest scores of each branch (and head) floor(rate k), drawn at random,
are hidden before the softmax, so that no branch leans on a few instances (STKIM); never at test. One branch has neither
of the added terms.

Gated, instance n adds p_n W z_n to the logits, exactly; with heads, what is told is the path past the norm.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.configs.schema import Settings, added
from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike
from mhim.mil.parts.layers import dropout, initialise, weighted_softmax
from mhim.mil.parts.queries import Pool, Scores, whole_heads
from mhim.mil.ranges import Choice


class Params(Settings):
    """Settings of ACMIL."""

    form: Literal["gated", "heads"] = added("gated", "attention of a branch: gated, or a query's heads")
    width: int = Field(256, ge=8, description="width of an embedded instance")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the embedded instances")
    attention_width: int = Field(128, ge=1, description="width of the gated attention's hidden layer (form=gated)")
    heads: int = added(8, "attention heads of each branch (form=heads)", ge=1)
    branches: int = Field(5, ge=1, description="attention branches")
    top_k: int = Field(10, ge=0, description="highest scores of a branch among which some are hidden in training")
    mask_rate: float = Field(0.6, ge=0, lt=1, description="share of these that is hidden")

    @model_validator(mode="after")
    def _whole(self) -> Params:
        if self.form == "heads":
            whole_heads(self.width, self.heads)
        return self


TUNED = {"branches": Choice((2, 5)), "mask_rate": Choice((0.0, 0.3, 0.6))}


class AcMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params = params
        width, several = params.width, params.branches if params.branches > 1 else 0
        self.feature = nn.Linear(in_dim, width, bias=False)
        if params.form == "gated":
            self.attend = nn.Linear(width, params.attention_width)
            self.gate = nn.Linear(width, params.attention_width)
            self.score = nn.Linear(params.attention_width, params.branches)
        self.branch_classifiers = nn.ModuleList(nn.Linear(width, n_out) for _ in range(several))
        self.classifier = nn.Linear(width, n_out)
        initialise(self)
        if params.form == "heads":  # these keep the library's start, as published: all queries are alike
            self.queries = nn.Parameter(1e-6 * torch.randn(params.branches, width))
            self.scores = nn.ModuleList(Scores(width, params.heads) for _ in range(params.branches))
            self.pools = nn.ModuleList(Pool(width, params.heads) for _ in range(several))
            self.pool = Pool(width, params.heads)

    def embed(self, x: Tensor) -> Tensor:
        return dropout(torch.relu(self.feature(x)), self.params.dropout if self.training else 0.0)

    def attention_logits(self, z: Tensor) -> Tensor:
        """(N, h) -> (K, N), or (H, K, N), before the softmax, nothing hidden."""
        if self.params.form == "heads":
            return torch.cat([s(q[None], z) for s, q in zip(self.scores, self.queries, strict=True)], dim=1)
        logits: Tensor = self.score(torch.tanh(self.attend(z)) * torch.sigmoid(self.gate(z))).T
        return logits

    def alone(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.attention_logits(z).movedim(-1, 0),)

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        s = instances.alone[0].movedim(0, -1) if instances.alone else self.attention_logits(instances.z)
        return self._pool(instances, s, detail)[0]

    def _pool(self, instances: Instances, s: Tensor, detail: bool) -> tuple[Encoded, Tensor]:
        """What the bag's branch says, and the attention of each branch (K, N), or (H, K, N)."""
        z = instances.z
        each = weighted_softmax(s, instances.log_count)
        p = each.mean(dim=-2)  # (N,) or (H, N)
        embedding = p.to(z.dtype) @ z if p.ndim == 1 else self.pool(p[:, None], z)[0]
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None]), each
        if p.ndim == 1:
            evidence = z @ self.classifier.weight.T  # (N, n_out)
            contribution = p[:, None] * evidence
        else:
            of_heads = self.pool.evidence(self.classifier.weight, z)  # (N, H, n_out)
            evidence, contribution = of_heads.sum(1), (p.T[..., None] * of_heads).sum(1)
            p = p.mean(0)
        published = torch.softmax(contribution, dim=1).amax(dim=1)
        rows = each.reshape(-1, len(z))
        return Encoded(logits, embedding[None], rows, p, evidence, contribution, published), each

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        found, detail = self.instances(bag), self.entropy_weight > 0
        pooled = [self._pool(i, self.hidden(self.attention_logits(i.z), i.log_count), detail) for i in found]
        named = {"task": task.loss(torch.stack([e.logits for e, _ in pooled]), target)}
        named |= self.spread([e for e, _ in pooled])
        k = self.params.branches
        if k == 1:
            return named
        each = [self._of_branches(p, i.z) for i, (_, p) in zip(found, pooled, strict=True)]  # (K, h) per bag
        answers = [torch.stack([c(e[i]) for e in each]) for i, c in enumerate(self.branch_classifiers)]
        named["branches"] = torch.stack([task.loss(a, target) for a in answers]).mean()
        named["diversity"] = torch.stack([self._alike(p) for _, p in pooled]).mean()
        return named

    def _of_branches(self, p: Tensor, z: Tensor) -> Tensor:
        """Bag embedding of each branch (K, h)."""
        if p.ndim == 2:
            return p.to(z.dtype) @ z
        return torch.cat([pool(p[:, i : i + 1], z) for i, pool in enumerate(self.pools)])

    def _alike(self, p: Tensor) -> Tensor:
        """Mean cosine between the attentions (..., K, N) of every two branches."""
        i, j = torch.triu_indices(p.shape[-2], p.shape[-2], 1, device=p.device)
        return F.cosine_similarity(p[..., i, :], p[..., j, :], dim=-1).mean()

    def hidden(self, s: Tensor, log_count: Tensor | None) -> Tensor:
        """Scores (K, N) or (H, K, N) with some of the highest of each branch (and head) at -1e9."""
        k = min(self.params.top_k, s.shape[-1])
        hide = math.floor(self.params.mask_rate * k)
        if not self.training or hide == 0:
            return s
        there = s if log_count is None else s.masked_fill(log_count.isneginf(), -torch.inf)
        highest = there.topk(k, dim=-1).indices  # (..., K, k), the r-th column is the r-th highest score
        if s.ndim == 2:
            noise = self.draw(len(s), k, s.device)
        else:
            noise = self.draw(s.shape[0] * s.shape[1], k, s.device).view(s.shape[1], s.shape[0], k).transpose(0, 1)
        ranks = noise.argsort(dim=-1)[..., :hide]
        return s.scatter(-1, highest.gather(-1, ranks), -1e9)

    def draw(self, rows: int, k: int, device: torch.device) -> Tensor:
        """Uniform noise (rows, k): the ranks of the smallest are hidden."""
        return torch.rand(rows, k, device=device)


def build(in_dim: int, n_out: int, params: Params) -> AcMil:
    """A new model with fresh weights."""
    return AcMil(in_dim, n_out, params)
