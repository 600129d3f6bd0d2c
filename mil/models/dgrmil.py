"""DGR-MIL: a bag asked by diverse global vectors (Zhu et al., ECCV 2024, arXiv 2407.03575).

f(t) = ReLU(W2 ReLU(W1 t + b1) + b2) embeds the instances, z = f(x) (N, h), and K learned global vectors that lie in
feature space, g = f(G) (K, h). E(t) = LN(t + Nys(LN t)), Nys the Nystrom attention of TransMIL, with weights of its own
for instances and for [token | g]. Cross attention (H heads, biased maps): queries E([token | g]), keys and values E(z);
output map; linear; LN. The token's row is the bag embedding; logits = W embedding + b. It uses the instances' order.

Loss = task + weight_diversity * (-log det(ĝ ĝ^T + 1e-10 I)), ĝ = g in unit rows, + weight_triplet * mean_k max(0,
d(g_k, positive) - d(g_k, negative) + margin), d = 1 - cosine, both after the first `warmup` of the training. The two
centres are not trained: in training, before the loss, that of the bag's class moves, c <- .4 c + .6 mean_n z_n. Class 0
is negative, every other positive; tasks without classes have no centres and no triplet term.

Instance n's contribution is its values weighted by the token's attention, through the maps and the classifier, past the
norm. The published margin of the text is .5, the program's, taken here, 1; the program picks its checkpoint on the test
set, which nothing here does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike
from mhim.mil.parts.layers import weighted_softmax
from mhim.mil.parts.nystrom import Nystrom
from mhim.mil.parts.queries import whole_heads
from mhim.mil.ranges import Choice

USES_POSITION = True
KEPT = 0.4  # of a centre when it moves


class Params(Settings):
    """Settings of DGR-MIL."""

    width: int = Field(512, ge=8, description="width of an embedded instance")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of instances dropped after each embedding layer")
    attention_dropout: float = Field(0.4, ge=0, lt=1, description="dropout after each self-attention's output")
    heads: int = Field(8, ge=1, description="attention heads")
    landmarks: int = Field(256, ge=1, description="landmarks of the Nystrom attention")
    globals: int = Field(5, ge=1, description="global vectors")
    weight_diversity: float = Field(0.1, ge=0, description="weight of the global vectors' diversity in the loss")
    weight_triplet: float = Field(0.1, ge=0, description="weight of the triplet term in the loss")
    margin: float = Field(1.0, ge=0, description="margin of the triplet term")
    warmup: float = Field(0.05, ge=0, le=1, description="first share of the training without these two terms")

    @model_validator(mode="after")
    def _whole(self) -> Params:
        whole_heads(self.width, self.heads)
        return self


TUNED = {"globals": Choice((3, 5, 10)), "dropout": Choice((0.0, 0.1, 0.25))}


class Encoder(nn.Module):
    """E(t) of the module's text."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(params.width), nn.LayerNorm(params.width)
        self.attention = Nystrom(params.width, params.heads, params.landmarks, params.attention_dropout)

    def forward(self, t: Tensor, log_count: Tensor | None = None) -> Tensor:
        rows: Tensor = self.after(t + self.attention(self.norm(t), log_count).rows)
        return rows


class DgrMil(MIL):
    """See the module's text."""

    positive: Tensor
    negative: Tensor

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params, self.done = params, 1.0
        width = params.width
        self.embed1, self.embed2 = nn.Linear(in_dim, width), nn.Linear(width, width)
        self.globals = nn.Parameter(torch.randn(params.globals, in_dim))
        self.token = nn.Parameter(torch.randn(width))
        self.of_instances, self.of_globals = Encoder(params), Encoder(params)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.last, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_out)
        self.register_buffer("positive", torch.randn(width))
        self.register_buffer("negative", torch.randn(width))
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def set_progress(self, done: float) -> None:
        self.done = done

    def embed(self, x: Tensor) -> Tensor:
        return self._embed(x, self.params.dropout if self.training else 0.0)

    def _embed(self, t: Tensor, p: float) -> Tensor:
        for linear in (self.embed1, self.embed2):
            t = torch.relu(linear(t))
            if p:
                t = t * F.dropout(t.new_ones(len(t), 1), p)
        return t

    def asked(self) -> Tensor:
        """The embedded global vectors g (K, h)."""
        return self._embed(self.globals, 0.0)

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        return self._read(instances, self.asked(), detail)

    def _read(self, instances: Instances, g: Tensor, detail: bool) -> Encoded:
        log_count = instances.log_count
        queries = self.of_globals(torch.cat([self.token[None].to(g.dtype), g]))  # (K + 1, h)
        seen = self.of_instances(instances.z, log_count)
        # only the token's row is read on, so the global vectors act through the token alone
        q, k, v = (
            m(t).unflatten(1, (self.params.heads, -1)).transpose(0, 1)
            for m, t in ((self.query, queries), (self.key, seen), (self.value, seen))
        )
        p = weighted_softmax((q[:, :1] @ k.transpose(1, 2))[:, 0] / math.sqrt(q.shape[2]), log_count)  # (H, N)
        read = (p[:, None].to(v.dtype) @ v).flatten()  # (h,)
        embedding = self.norm(self.last(self.out(read)))
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        path = self.classifier.weight @ self.last.weight @ self.out.weight
        of_heads = torch.einsum("hnd,chd->hnc", v, path.unflatten(1, (len(p), -1)).to(v.dtype))
        contribution = (p[..., None] * of_heads).sum(0)
        published = torch.softmax(contribution, dim=1).amax(dim=1)
        return Encoded(logits, embedding[None], p, p.mean(0), of_heads.sum(0), contribution, published)

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        g, found, detail = self.asked(), self.instances(bag), self.entropy_weight > 0
        answers = [self._read(i, g, detail) for i in found]
        named = {"task": task.loss(torch.stack([e.logits for e in answers]), target)} | self.spread(answers)
        classes = target.ndim == 1 and not target.is_floating_point()
        if classes and self.training:
            for i, y in zip(found, target, strict=True):
                self._move(i.z.detach().mean(0), y)
        if self.done < self.params.warmup:
            return named
        if self.params.weight_diversity:
            named["diversity"] = self.params.weight_diversity * diversity(g)
        if classes and self.params.weight_triplet:
            apart = (1 - F.cosine_similarity(g, c.to(g.dtype)[None]) for c in (self.positive, self.negative))
            near, far = apart
            named["triplet"] = self.params.weight_triplet * (near - far + self.params.margin).clamp_min(0).mean()
        return named

    def _move(self, mean: Tensor, y: Tensor) -> None:
        """The centre of class y (a scalar, left on its device) towards a bag's mean."""
        for centre, own in ((self.negative, y == 0), (self.positive, y != 0)):
            centre.copy_(torch.where(own, KEPT * centre + (1 - KEPT) * mean.to(centre.dtype), centre))


def diversity(g: Tensor) -> Tensor:
    """-log det of the cosines between rows of g (K, h), a scalar, in float64: of alike rows float32 has none."""
    unit = F.normalize(g.double(), dim=1)
    cosines = unit @ unit.T + 1e-10 * torch.eye(len(g), dtype=unit.dtype, device=g.device)
    volume: Tensor = torch.linalg.slogdet(cosines).logabsdet
    return -volume.to(g.dtype if g.dtype == torch.float64 else torch.float32)


def build(in_dim: int, n_out: int, params: Params) -> DgrMil:
    """A new model with fresh weights."""
    return DgrMil(in_dim, n_out, params)
