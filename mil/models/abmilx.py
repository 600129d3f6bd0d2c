"""ABMILX: several attention heads, refined by how alike the instances are (Tang et al., 2025, arXiv 2506.02408).

z_n = embedding of x_n (N, h), cut into m heads z^j (N, d), d = h / m. Local scores a^j = w GELU(W z^j), the same W (d,
d) and w for all heads. Refinement: u^j = LN(z^j), [q, k] = u^j Q (shared, no bias), U^j = softmax(q k^T / sqrt(d)) over
the instances, scores = a^j + alpha U^j a^j: instances that are alike share their scores. p^j = softmax of these; bag
embedding = the heads' sum_n p^j_n z^j_n side by side, through a linear map; logits = W embedding + b. Variants: joint:
W (h, h), w (m, h), LN and Q see the full width, and are then cut into heads. norm: LayerNorms without bias before the
embedding and after the linear map. bias off: none in embedding, scores, map and classifier. (norm without bias is the
authors' end-to-end form.) ffn: v + W2 GELU(W1 LN v), hidden 4 h, after the linear map.

alpha is learned. The published start draws it from N(0, 1), so that the refinement begins with a random sign; here it
starts at `alpha` (1), which is the paper's form without learning. U^j a^j is an attention whose values are the scores:
it runs through the fused kernel, without a matrix of N x N. Without norm and ffn, instance n adds the heads' p^j_n
z^j_n through both linear maps to the logits, exactly; with them, what is told is the path past them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.configs.schema import added
from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import Activation, Embedding, EmbeddingParams, initialise, weighted_softmax
from mhim.mil.parts.queries import whole_heads
from mhim.mil.ranges import Choice


class Params(EmbeddingParams):
    """Settings of ABMILX."""

    activation: Activation = Field("relu", description="activation of the instance embedding")
    heads: int = Field(8, ge=1, description="attention heads, into which the width is cut")
    refine: bool = Field(True, description="scores are shared among alike instances; off is heads alone")
    alpha: float = Field(1.0, description="weight of the refinement at the start; it is learned")
    joint: bool = added(False, "scores of every head from the full width")
    norm: bool = added(False, "LayerNorm before the embedding and of the bag embedding")
    bias: bool = added(True, "biases in embedding, scores, output map and classifier")
    ffn: bool = added(False, "a feed-forward block on the bag embedding")

    @model_validator(mode="after")
    def _whole_heads(self) -> Params:
        whole_heads(self.width, self.heads)
        return self


TUNED = {"dropout": Choice((0.0, 0.25, 0.5)), "heads": Choice((2, 4, 8, 16))}


class AbMilX(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.heads, self.refine, self.joint = params.heads, params.refine, params.joint
        width, bias = params.width, params.bias
        d = width if params.joint else width // params.heads
        self.feature = Embedding(in_dim, params, bias)
        self.attend = nn.Linear(d, d, bias=bias)
        self.score = nn.Linear(d, params.heads if params.joint else 1, bias=bias)
        if params.refine:
            self.norm = nn.LayerNorm(d)
            self.query_key = nn.Linear(d, 2 * d, bias=False)
        self.project = nn.Linear(width, width, bias=bias)
        self.classifier = nn.Linear(width, n_out, bias=bias)
        self.before = nn.LayerNorm(in_dim, bias=False) if params.norm else None
        self.after = nn.LayerNorm(width, bias=False) if params.norm else None
        self.ffn: nn.Module | None = None
        if params.ffn:
            self.ffn = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
        initialise(self)
        if params.refine:
            self.alpha = nn.Parameter(torch.tensor(float(params.alpha)))

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.feature(x if self.before is None else self.before(x))
        return embedded

    def embed_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        if self.before is not None:
            return self.embed(x.index_select(0, rows))
        embedded: Tensor = self.feature(x, rows)
        return embedded

    def attention_logits(self, z: Tensor, log_count: Tensor | None) -> Tensor:
        """(N, h) -> (heads, N) before the softmax."""
        by_head = z.view(len(z), self.heads, -1).transpose(0, 1)  # (m, N, d)
        seen = z if self.joint else by_head
        local: Tensor = self.score(F.gelu(self.attend(seen)))
        local = local.T if self.joint else local[..., 0]  # (m, N)
        if not self.refine:
            return local
        q, k = self.query_key(self.norm(seen)).chunk(2, dim=-1)
        if self.joint:
            q, k = (x.view(len(z), self.heads, -1).transpose(0, 1) for x in (q, k))
        # the kernel wants values as wide as the keys; only the first of them is used
        v = F.pad((self.alpha * local)[..., None], (0, q.shape[-1] - 1)).to(q.dtype)
        mask = None if log_count is None else log_count.to(q.dtype).expand(1, 1, 1, -1)
        shared = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0, ..., 0]
        return local + shared

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        p = weighted_softmax(self.attention_logits(z, instances.log_count), instances.log_count)  # (m, N)
        by_head = z.view(len(z), self.heads, -1)
        bag = torch.einsum("mn,nmd->md", p.to(z.dtype), by_head).flatten()  # (h,)
        embedding = self.project(bag)
        if self.after is not None:
            embedding = self.after(embedding)
        if self.ffn is not None:
            embedding = embedding + self.ffn(embedding)
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        rows = (self.classifier.weight @ self.project.weight).view(-1, self.heads, by_head.shape[-1])
        per_head = torch.einsum("nmd,cmd->nmc", by_head, rows)  # (N, m, n_out)
        evidence = per_head.sum(dim=1)
        contribution = (p.T[..., None] * per_head).sum(dim=1)
        return Encoded(
            logits,
            embedding[None],
            p,
            p.mean(dim=0),
            evidence,
            contribution,
            torch.softmax(contribution, dim=1).amax(dim=1),
        )


def build(in_dim: int, n_out: int, params: Params) -> AbMilX:
    """A new model with fresh weights."""
    return AbMilX(in_dim, n_out, params)
