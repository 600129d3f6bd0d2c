"""DTFD-MIL: double-tier feature distillation (Zhang et al., CVPR 2022, arXiv 2203.12081).

The bag is split at random into `groups` pseudo-bags. Tier 1, one network for all of them: gated attention a over the
pseudo-bag, logits = W1 sum_n a_n z_n + b1, trained with the bag's label. Each pseudo-bag is distilled into features:
`afs` its attention-weighted mean; `maxs` the instance that speaks most for the last class, by the softmax over classes
of a_n W1 z_n; `maxmins` that one and the one that speaks least for it. Tier 2, a second gated attention over the
distilled features, gives the bag's answer. Loss = tier 1 (mean over pseudo-bags) + tier 2.

Beside the paper: at test the published program splits at random, so that one bag has many answers. Here instances are
dealt out in order of their attention, like cards: every pseudo-bag gets its part of the salient ones, and the answer
depends neither on chance nor on the order of the instances.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike
from mhim.mil.parts.layers import Activation, Embedding, EmbeddingParams, initialise, weighted_softmax
from mhim.mil.ranges import Choice


class Params(EmbeddingParams):
    """Settings of DTFD-MIL."""

    activation: Activation = Field("relu", description="activation of the instance embedding")
    attention_width: int = Field(128, ge=1, description="width of both gated attentions")
    groups: int = Field(4, ge=1, description="pseudo-bags per bag")
    distill: Literal["afs", "maxs", "maxmins"] = Field("afs", description="what stands for a pseudo-bag in tier 2")


TUNED = {"groups": Choice((2, 4, 8)), "distill": Choice(("afs", "maxs", "maxmins"))}


class Gated(nn.Module):
    """Gated attention logits (..., h) -> (...)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attend, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.score(torch.tanh(self.attend(z)) * torch.sigmoid(self.gate(z)))[..., 0]
        return logits


class Dtfd(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params = params
        self.feature = Embedding(in_dim, params)
        self.tier1, self.tier2 = (Gated(params.width, params.attention_width) for _ in range(2))
        self.classifier1, self.classifier = nn.Linear(params.width, n_out), nn.Linear(params.width, n_out)
        initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x)
        return embedded

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        return self._both(instances, detail)[0]

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        found = [self._both(i, self.entropy_weight > 0) for i in self.instances(bag)]
        tier1 = [task.loss(parts, y.expand(len(parts), *y.shape)) for (_, parts), y in zip(found, target, strict=True)]
        logits = torch.stack([e.logits for e, _ in found])
        named = {"task": task.loss(logits, target), "tier1": torch.stack(tier1).mean()}
        return named | self.spread([e for e, _ in found])

    def _both(self, instances: Instances, detail: bool) -> tuple[Encoded, Tensor]:
        """The bag's answer, and the logits (M, n_out) of its M pseudo-bags."""
        z, log_count = instances.z, instances.log_count
        s = self.tier1(z)  # (N,)
        if log_count is not None:
            s = s + log_count.to(s.dtype)
        where, real = self._deal(s)  # (M, L) each: rows of z, and which of them are not filling
        logits = s[where].masked_fill(~real, -torch.inf)
        dead = logits.isneginf().all(dim=1, keepdim=True)  # a pseudo-bag whose instances are all removed weighs nothing
        a = weighted_softmax(logits.masked_fill(dead, 0.0), None) * ~dead  # (M, L)
        pooled = torch.einsum("ml,mlh->mh", a.to(z.dtype), z[where])
        parts = self.classifier1(pooled)
        weights = self._distil(a, where, real, z)  # (R, L) rows over the pseudo-bags' instances, R >= M
        per = len(weights) // len(where)
        rows = where.repeat_interleave(per, dim=0)
        distilled = pooled if self.params.distill == "afs" else torch.einsum("rl,rlh->rh", weights.to(z.dtype), z[rows])
        present = torch.where(weights.sum(dim=1) > 0, 0.0, -torch.inf)
        b = weighted_softmax(self.tier2(distilled), present)  # (R,)
        embedding = b.to(z.dtype) @ distilled  # (h,)
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None]), parts
        # Tier 2 pools what tier 1 has pooled, so an instance's part is the product of both weights.
        flat = (b[:, None] * weights).flatten()
        share = flat.new_zeros(len(z)).index_add(0, rows.flatten(), flat)
        evidence = z @ self.classifier.weight.T  # (N, n_out)
        contribution = share[:, None] * evidence
        return Encoded(
            logits,
            embedding[None],
            share[None],
            share,
            evidence,
            contribution,
            torch.softmax(contribution, dim=1).amax(dim=1),
        ), parts

    def _deal(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Instances into M pseudo-bags of at most L: indices (M, L) and True (M, L) where they are not filling."""
        n = len(s)
        m = min(self.params.groups, n)
        if self.training:
            order = torch.randperm(n, device=s.device)
        else:
            order = s.detach().argsort(descending=True, stable=True)
        length = -(-n // m)
        place = torch.arange(m * length, device=s.device)
        return order[place.clamp_max(n - 1)].view(length, m).T, (place < n).view(length, m).T

    def _distil(self, a: Tensor, where: Tensor, real: Tensor, z: Tensor) -> Tensor:
        """Weights (R, L) whose products with the pseudo-bags' instances are the distilled features."""
        if self.params.distill == "afs":
            return a
        with torch.no_grad():
            p = torch.softmax(a[..., None] * (z @ self.classifier1.weight.T)[where], dim=-1)[..., -1]  # (M, L)
            alive = real & (a > 0)
            best = p.masked_fill(~alive, -1.0).argmax(dim=1)
            picks = [best]
            if self.params.distill == "maxmins":
                picks.append(p.masked_fill(~alive, 2.0).argmin(dim=1))
            chosen = torch.stack(picks, dim=1)[..., None]  # (M, picks, 1)
            one_hot = a.new_zeros(*chosen.shape[:2], a.shape[1]).scatter_(2, chosen, 1.0)
            return (one_hot * alive[:, None]).flatten(0, 1)


def build(in_dim: int, n_out: int, params: Params) -> Dtfd:
    """A new model with fresh weights."""
    return Dtfd(in_dim, n_out, params)
