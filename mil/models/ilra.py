"""ILRA: attention through a few latents, as bags have low rank (Xiang et al., ICLR 2023, OpenReview 01KmhBsEPFO).

Block A(Q, X): q = W_q Q, k = W_k X, v = W_v X (biased), then a standard multi-head attention with input maps of its
own; u = LN0(q + attention), u = LN1(u + ReLU(W_o u)), and where it is gated u <- u * SiLU(G Q), from the block's raw
query. Layer: P = A(latents (r, w), X), X <- A(X, P), both gated: every instance sees the bag through r latents, which
costs N r and not N^2. End: bag embedding = A(s (1, w), X), ungated; logits = W embedding + b. There is no embedding
layer: z is the features, and the first layer takes them to width w.

Deviations from the paper's text, as its program has them: residual, ReLU block and gate; latents of each layer's own; a
learned pooling query. Contrastive low-rank pre-training is not part of it. An instance's attention is that of the
pooling block; what it adds, its value there through the output map and the classifier, past the norms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import initialise, weighted_softmax
from mhim.mil.parts.queries import whole_heads
from mhim.mil.ranges import Choice


class Params(Settings):
    """Settings of ILRA."""

    width: int = Field(256, ge=8, description="width of latents and layers")
    heads: int = Field(8, ge=1, description="attention heads")
    layers: int = Field(2, ge=1, description="pairs of attentions, to the latents and back")
    rank: int = Field(16, ge=1, description="latents of a layer; the paper has 64, its program 1: tune it")
    norm: bool = Field(True, description="LayerNorms in the blocks")

    @model_validator(mode="after")
    def _whole(self) -> Params:
        whole_heads(self.width, self.heads)
        return self


TUNED = {"rank": Choice((1, 4, 16, 64)), "layers": Choice((1, 2))}


class Block(nn.Module):
    """A(Q, X) of the module's text."""

    def __init__(self, query_dim: int, key_dim: int, params: Params, gated: bool) -> None:
        super().__init__()
        width, self.heads = params.width, params.heads
        self.query = nn.Linear(query_dim, width)
        self.key, self.value = nn.Linear(key_dim, width), nn.Linear(key_dim, width)
        self.inner = nn.Linear(width, 3 * width)  # the attention's own maps: queries, keys, values
        self.out = nn.Linear(width, width)
        self.last = nn.Linear(width, width)
        self.norm0, self.norm1 = (nn.LayerNorm(width) if params.norm else nn.Identity() for _ in range(2))
        self.gate = nn.Linear(query_dim, width) if gated else None

    def forward(self, queries: Tensor, x: Tensor, log_count: Tensor | None = None) -> Tensor:
        """queries: (n, query_dim). x: (m, key_dim). log_count: (m,), how often each row of x counts. (n, w)."""
        q, k, v = self._inputs(queries, x)
        mask = None if log_count is None else log_count.to(q.dtype).expand(1, 1, q.shape[1], -1)
        read = F.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]  # (H, n, d)
        return self._rest(queries, read)

    def pool(self, query: Tensor, x: Tensor, log_count: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward` for one query: its row (w,), weights p (H, m) and values (H, m, d)."""
        q, k, v = self._inputs(query, x)
        p = weighted_softmax((q @ k.transpose(1, 2))[:, 0] / q.shape[-1] ** 0.5, log_count)
        return self._rest(query, p[:, None].to(v.dtype) @ v)[0], p, v

    def _inputs(self, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.inner.weight.chunk(3), self.inner.bias.chunk(3)
        raw = (self.query(queries), self.key(x), self.value(x))
        q, k, v = (
            F.linear(r, w, b).unflatten(1, (self.heads, -1)).transpose(0, 1)
            for r, w, b in zip(raw, weight, bias, strict=True)
        )
        return q, k, v

    def _rest(self, queries: Tensor, read: Tensor) -> Tensor:
        u = self.norm0(self.query(queries) + self.out(read.transpose(0, 1).flatten(1)))
        u = self.norm1(u + F.relu(self.last(u)))
        row: Tensor = u if self.gate is None else u * F.silu(self.gate(queries))
        return row


class Ilra(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.instance_width = in_dim
        width, dims = params.width, [in_dim, *[params.width] * (params.layers - 1)]
        self.latents = nn.ParameterList(nn.Parameter(torch.empty(params.rank, width)) for _ in dims)
        self.to_latents = nn.ModuleList(Block(width, dim, params, True) for dim in dims)
        self.back = nn.ModuleList(Block(dim, width, params, True) for dim in dims)
        self.query = nn.Parameter(torch.empty(1, width))
        self.pool = Block(width, width, params, False)
        self.classifier = nn.Linear(width, n_out)
        initialise(self)
        for drawn in (*self.latents, self.query):
            nn.init.xavier_uniform_(drawn)

    def embed(self, x: Tensor) -> Tensor:
        return x

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        x, log_count = instances.z, instances.log_count
        for latent, forth, back in zip(self.latents, self.to_latents, self.back, strict=True):
            x = back(x, forth(latent, x, log_count))
        embedding, p, v = self.pool.pool(self.query, x, log_count)
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        path = (self.classifier.weight @ self.pool.out.weight).unflatten(1, (len(p), -1))  # (C, H, d)
        of_heads = torch.einsum("hnd,chd->hnc", v, path.to(v.dtype))
        contribution = (p[..., None] * of_heads).sum(0)
        published = torch.softmax(contribution, dim=1).amax(dim=1)
        return Encoded(logits, embedding[None], p, p.mean(0), of_heads.sum(0), contribution, published)


def build(in_dim: int, n_out: int, params: Params) -> Ilra:
    """A new model with fresh weights."""
    return Ilra(in_dim, n_out, params)
