"""ASMIL: attention held to a slow copy of itself (Ye et al., 2026, arXiv 2603.06658).

z_n = relu(W x_n) (N, h), no bias. K learned queries, each with an attention of H heads of its own (`parts/queries.py`),
make K tokens; in training `drop` of them, drawn at random, are left out; bag embedding = attention of a learned vector
over the tokens; logits = W embedding + b. The anchor, a second embedding with scores, has no gradient and follows the
student: anchor <- m anchor + (1 - m) student after each step. Its attention is sigmoid(s / temp), over their sum. Loss
= task + mean over heads, branches and instances of -(anchor's attention) log(student's attention): the attention is not
to jump from epoch to epoch. (A mean over instances: the term of a bag of N counts as 1 / N.)

In the authors' program the anchor never moves, since its condition looks for broken numbers; here it moves, and begins
as the student. Instance n's contribution is its attention in each token, times the token's in the bag, past the norms.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike, flatten
from mhim.mil.parts.layers import dropout, initialise, weighted_softmax
from mhim.mil.parts.queries import Pool, Scores, whole_heads
from mhim.mil.ranges import Choice


class Params(Settings):
    """Settings of ASMIL."""

    width: int = Field(256, ge=8, description="width of an embedded instance")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the embedded instances")
    heads: int = Field(8, ge=1, description="attention heads of each query")
    tokens: int = Field(8, ge=1, description="learned queries, each of which makes a token")
    drop: int = Field(2, ge=0, description="tokens left out in each step of the training")
    temperature: float = Field(0.5, gt=0, description="divides the anchor's scores")
    momentum: float = Field(0.999, ge=0, le=1, description="momentum of the anchor")
    anchor_weight: float = Field(1.0, ge=0, description="weight of the anchor's term in the loss")

    @model_validator(mode="after")
    def _whole(self) -> Params:
        whole_heads(self.width, self.heads)
        if self.drop >= self.tokens:
            raise ValueError(f"drop ({self.drop}) must be less than tokens ({self.tokens})")
        return self


TUNED = {"tokens": Choice((4, 8)), "temperature": Choice((0.5, 1.0))}


class Attention(nn.Module):
    """Embedding and scores: what the anchor has a copy of."""

    def __init__(self, in_dim: int, params: Params) -> None:
        super().__init__()
        self.feature = nn.Linear(in_dim, params.width, bias=False)
        initialise(self)
        self.queries = nn.Parameter(1e-6 * torch.randn(params.tokens, params.width))
        self.scores = nn.ModuleList(Scores(params.width, params.heads) for _ in range(params.tokens))

    def embed(self, x: Tensor) -> Tensor:
        return torch.relu(self.feature(x))

    def forward(self, z: Tensor) -> Tensor:
        """Scores (H, K, N) of embedded instances (N, h)."""
        return torch.cat([s(q[None], z) for s, q in zip(self.scores, self.queries, strict=True)], dim=1)


class AsMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params = params
        width, heads = params.width, params.heads
        self.student = Attention(in_dim, params)
        self.pools = nn.ModuleList(Pool(width, heads) for _ in range(params.tokens))
        self.query = nn.Parameter(1e-6 * torch.randn(1, width))
        self.bag_scores, self.bag_pool = Scores(width, heads), Pool(width, heads)
        self.classifier = nn.Linear(width, n_out)
        self.anchor = copy.deepcopy(self.student).requires_grad_(False)

    def embed(self, x: Tensor) -> Tensor:
        return dropout(self.student.embed(x), self.params.dropout if self.training else 0.0)

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        return self._answer(instances, self.student(instances.z), detail)

    def _answer(self, instances: Instances, s: Tensor, detail: bool) -> Encoded:
        z = instances.z
        p = weighted_softmax(s, instances.log_count)  # (H, K, N)
        kept = self.kept(z.device)
        tokens = torch.cat([self.pools[i](p[:, i : i + 1], z) for i in kept])  # (K', h)
        b = weighted_softmax(self.bag_scores(self.query, tokens), None)  # (H, 1, K')
        embedding = self.bag_pool(b, tokens)[0]
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        share = torch.einsum("k,kn->n", b[:, 0].mean(0), torch.stack([p[:, i] for i in kept], dim=1).mean(0))
        path = self.bag_pool.evidence(self.classifier.weight, torch.eye(z.shape[1], dtype=z.dtype, device=z.device))
        through = torch.einsum("dhc,hk->kcd", path, b[:, 0].to(path.dtype))  # a token's map to the classes
        pools: list[Pool] = list(self.pools)  # type: ignore[arg-type]
        of_heads = [pools[i].evidence(m, z) for i, m in zip(kept, through, strict=True)]  # (N, H, C) each
        contribution = sum(
            (torch.einsum("hn,nhc->nc", p[:, i].to(e.dtype), e) for i, e in zip(kept, of_heads, strict=True)),
            z.new_zeros(len(z), len(logits)),
        )
        evidence = torch.stack(of_heads).sum((0, 2))
        published = torch.softmax(contribution, dim=1).amax(dim=1)
        return Encoded(logits, embedding[None], p.flatten(0, 1), share, evidence, contribution, published)

    def kept(self, device: torch.device) -> list[int]:
        """Tokens that the bag's attention sees, in order."""
        k = self.params.tokens
        if not self.training or not self.params.drop:
            return list(range(k))
        return sorted(self.draw(k)[self.params.drop :].tolist())

    def draw(self, k: int) -> Tensor:
        """A random order of k tokens, the first of which are dropped; on the host, so that no GPU is waited for."""
        return torch.randperm(k)

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        detail = self.entropy_weight > 0
        found = [(i, self.student(i.z)) for i in self.instances(bag)]
        answers = [self._answer(i, s, detail) for i, s in found]
        named = {"task": task.loss(torch.stack([e.logits for e in answers]), target)} | self.spread(answers)
        if not self.params.anchor_weight:
            return named
        x, sizes = flatten(bag)
        with torch.no_grad():
            seen = [z if len(z) else z.new_zeros(1, z.shape[1]) for z in self.anchor.embed(x).split(sizes)]
            held = [self.steady(self.anchor(z)) for z in seen]
        apart = [-(a * _log_softmax(s)).mean() for a, (_, s) in zip(held, found, strict=True)]
        return named | {"anchor": self.params.anchor_weight * torch.stack(apart).mean()}

    def steady(self, s: Tensor) -> Tensor:
        """The anchor's attention (H, K, N) out of its scores."""
        wide = s if s.dtype == torch.float64 else s.float()
        open_ = torch.sigmoid(wide / self.params.temperature)
        return open_ / (open_.sum(-1, keepdim=True) + 1e-8)

    def after_step(self) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.anchor.parameters()), list(self.student.parameters()), 1.0 - self.params.momentum
            )


def _log_softmax(s: Tensor) -> Tensor:
    return F.log_softmax(s if s.dtype == torch.float64 else s.float(), dim=-1)


def build(in_dim: int, n_out: int, params: Params) -> AsMil:
    """A new model with fresh weights."""
    return AsMil(in_dim, n_out, params)
