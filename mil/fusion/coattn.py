"""Co-attention between tokens of a patient's tables and the tiles of the bag, learnt end to end.

MCAT: Chen et al., ICCV 2021 (tokens query the tiles); SurvPath: Jaume et al., CVPR 2024, arXiv 2304.06819 (a token per
pathway). The tokens' networks are self-normalising (Klambauer et al., NeurIPS 2017, arXiv 1706.02515).

    t_k = f_k(z_k)                              one token per group of a table, one for its other columns
    h_n = dropout(relu(W x_n + b))              one row per tile
    A = softmax(T Q (H K)' / sqrt(d / heads))   each token's attention over the tiles, per head
    u_k = norm(t_k + O [A H V]_k)               a token with what it found in the bag
    u = layers of a transformer over the tokens at hand
    p = Σ_k a_k u_k,  b = Σ_n c_n h_n           gated attention (Ilse et al., ICML 2018), a and c sum to 1
    logits = W [p; b] + w

Shapes: z_k (columns of the token,), standardised by the training part (`columns.py`); t, u (T, d); x (N, D); h (N, d);
A (heads, T, N), the only thing that grows with both, so memory is linear in tiles; p, b (d,). From the projected
tiles and the tokens on all is float32, with `train.amp` too.

Any modality may be absent: tokens of an absent table do not exist for the layers and the pooling; without a bag nothing
is added to the tokens; a p or b of nothing is a learnt vector. For that, whole modalities are dropped at random in
training, per patient and never all (ModDrop, Neverova et al. 2015); at test nothing is random. Of the papers' networks
this one has a linear head, one attention layer for all heads, and no loss of its own: the outcome's loss is the task's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.fusion.columns import Columns
from mhim.mil.fusion.rows import Rows
from mhim.mil.models import MIL, Bag, Output, TaskLike
from mhim.mil.parts.layers import Embedding, EmbeddingParams

REST = "other columns"  # the token of the columns that are in no group


class Params(Settings):
    """Settings of the co-attention network (`train.fusion_params`)."""

    width: int = Field(64, ge=8, description="width d of a token and of a projected tile")
    hidden: int = Field(64, ge=1, description="width of the hidden layer of a token's network")
    token_network: Literal["snn", "mlp"] = Field(
        "snn", description="network of a token: self-normalising (SELU, alpha dropout), or ReLU and dropout"
    )
    rest: bool = Field(True, description="a table with groups has one more token, of the columns in none of them")
    heads: int = Field(1, ge=1, description="heads of the attention of tokens over tiles; they share `width`")
    layers: int = Field(1, ge=0, description="transformer layers over the tokens after that")
    dropout: float = Field(0.25, ge=0, lt=1, description="dropout in the tokens' networks, of tiles and in the layers")
    modality_dropout: float = Field(
        0.3, ge=0, lt=1, description="probability with which the bag, and each table, is left out of a training step"
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Params:
        if self.width % self.heads:
            raise ValueError(f"heads: width {self.width} is not a multiple of {self.heads}")
        return self


@dataclass(frozen=True)
class Token:
    """table, name: what it is of. at: places of its columns in the numbers of a patient (see `numbers`)."""

    table: str
    name: str
    at: tuple[int, ...]


def tokens(columns: Mapping[str, Columns], rest: bool = True) -> tuple[Token, ...]:
    """The tokens of tables in their order: the groups that each has, then its other columns (all of them where it has
    no group). rest: also of a table with groups."""
    found: list[Token] = []
    first = 0
    for table, own in columns.items():
        used = {j for of in own.groups.values() for j in of}
        found += [Token(table, name, tuple(first + j for j in of)) for name, of in own.groups.items()]
        others = tuple(first + j for j in range(len(own.features)) if j not in used)
        if others and (rest or not own.groups):
            found.append(Token(table, REST, others))
        first += len(own.features)
    return tuple(found)


def numbers(columns: Mapping[str, Columns], rows: Mapping[str, Rows], patients: Sequence[str]) -> np.ndarray:
    """float32 (patients, V + M): what the network reads of each patient's tables. Their V standardised features, table
    by table, then for each of the M tables 1 where the patient has a known cell in it. A table that `rows` lacks is
    absent."""
    each, there = [], []
    for name, own in columns.items():
        if name in rows:
            here = rows[name].of(patients)
            each.append(own.matrix(here))
            there.append(here.present)
        else:
            each.append(np.zeros((len(patients), len(own.features))))
            there.append(np.zeros(len(patients), dtype=bool))
    empty = np.zeros((len(patients), 0))
    return np.concatenate([empty, *each, *(t[:, None] for t in there)], axis=1).astype(np.float32)


class Pool(nn.Module):
    """Gated attention: (N, d) with N >= 1 -> (d,) and the weights (N,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.what, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.score = nn.Linear(width, 1)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.softmax(self.score(torch.tanh(self.what(h)) * torch.sigmoid(self.gate(h)))[:, 0], dim=0)
        return a @ h, a


class CoAttention(MIL):
    """See the module's text. A patient's modalities are the bag and then the tables: `there` is bool (1 + M,)."""

    def __init__(
        self, in_dim: int, n_out: int, tables: Sequence[str], of: Sequence[Token], columns: int, params: Params
    ) -> None:
        """tables: names of the M tables in the order of `numbers`. of: the tokens. columns: V."""
        super().__init__()
        d, self.in_dim = params.width, in_dim
        self.params, self.tables, self.tokens, self.columns = params, tuple(tables), tuple(of), columns
        self.networks = nn.ModuleList(_network(len(t.at), params) for t in of)
        self.owner = [1 + self.tables.index(t.table) for t in of]  # of each token, its place in `there`
        self.tile = Embedding(in_dim, EmbeddingParams(width=d, activation="relu", dropout=params.dropout))
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norm = nn.LayerNorm(d)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d, params.heads, 2 * d, params.dropout, batch_first=True)
            for _ in range(params.layers)
        )
        self.pool_tokens, self.pool_tiles = Pool(d), Pool(d)
        self.no_tokens, self.no_tiles = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.head = nn.Linear(2 * d, n_out)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.tile(x)
        return embedded

    def forward(self, bag: Bag) -> Output:
        """With everything that each patient has. scores: the share of each tile in b."""
        here = self.at_hand(bag)
        logits, embeddings = [], []
        scores = bag.features.new_zeros(bag.mask.shape, dtype=torch.float32)
        for b, (t, rows) in enumerate(zip(self._tokens(self._values(bag)), bag.rows(), strict=True)):
            found, embedding, share = self._answer(self._tiles(bag, b, rows, here[b][0]), t, here[b])
            logits.append(found)
            embeddings.append(embedding)
            if len(share):
                scores[b, rows] = share
        return Output(torch.stack(logits), scores, torch.stack(embeddings))

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        """The task's loss with whole modalities left out at random."""
        here = self._kept(self.at_hand(bag)) if self.training else self.at_hand(bag)
        logits = [
            self._answer(self._tiles(bag, b, rows, here[b][0]), t, here[b])[0]
            for b, (t, rows) in enumerate(zip(self._tokens(self._values(bag)), bag.rows(), strict=True))
        ]
        return {"task": task.loss(torch.stack(logits), target)}

    def answers(self, bag: Bag, patterns: Sequence[Sequence[bool]]) -> Tensor:
        """(P, n_out) logits of one bag as if only some modalities were at hand, those of each pattern, (1 + M,)."""
        t, rows, here = self._tokens(self._values(bag))[0], bag.rows()[0], self.at_hand(bag)[0]
        h = self._tiles(bag, 0, rows, here[0])
        asked = [[a and b for a, b in zip(here, pattern, strict=True)] for pattern in patterns]
        return torch.stack([self._answer(h if one[0] else h[:0], t, one)[0] for one in asked])

    def attention(self, bag: Bag) -> Tensor:
        """(T, N) float32: each token's attention over the tiles of one bag, mean over the heads; rows sum to 1."""
        h = self._tiles(bag, 0, bag.rows()[0], True)
        return self._attention(h, self._tokens(self._values(bag))[0]).mean(dim=0)

    def at_hand(self, bag: Bag) -> list[list[bool]]:
        """What each patient has: tiles, and each table."""
        sizes = bag.sizes if bag.sizes is not None else [int(m.sum()) for m in bag.mask]
        flags = self._values(bag)[:, self.columns :].cpu() > 0
        return [[n > 0, *one] for n, one in zip(sizes, flags.tolist(), strict=True)]

    @staticmethod
    def _values(bag: Bag) -> Tensor:
        if bag.numbers is None:
            raise ValueError("the bag comes without the numbers of its patient's tables")
        return bag.numbers

    def _kept(self, here: list[list[bool]]) -> list[list[bool]]:
        drawn = (torch.rand(len(here), 1 + len(self.tables)) >= self.params.modality_dropout).tolist()
        kept = [[a and b for a, b in zip(*one, strict=True)] for one in zip(here, drawn, strict=True)]
        return [k if any(k) else h for k, h in zip(kept, here, strict=True)]

    def _tokens(self, values: Tensor) -> Tensor:
        """(B, T, d)"""
        if not self.tokens:
            return values.new_zeros(len(values), 0, self.params.width)
        each = [net(values[:, list(t.at)]) for net, t in zip(self.networks, self.tokens, strict=True)]
        return torch.stack(each, dim=1)

    def _tiles(self, bag: Bag, b: int, rows: Tensor | slice, kept: bool) -> Tensor:
        """(N, d), without a row where the bag is absent."""
        x = bag.features[b, rows]
        return self.embed(x) if kept and len(x) else x.new_zeros(0, self.params.width)

    def _attention(self, h: Tensor, t: Tensor) -> Tensor:
        """(heads, T, N)"""
        q, k = self._heads(self.query(t)), self._heads(self.key(h))
        return torch.softmax((q @ k.transpose(1, 2)) / (q.shape[2] ** 0.5), dim=2)

    def _heads(self, v: Tensor) -> Tensor:
        """(n, d) -> (heads, n, d / heads)"""
        return v.reshape(len(v), self.params.heads, -1).transpose(0, 1)

    def _answer(self, h: Tensor, t: Tensor, here: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n_out,), embedding (2 d,) and the share of each tile (N,) of one patient. h: (N, d), N = 0 without a
        bag. t: (T, d), those of absent tables too."""
        with torch.autocast(h.device.type, enabled=False):
            own, h = [k for k, at in enumerate(self.owner) if here[at]], h.float()
            p = self.no_tokens
            if own:
                u = t[own].float()
                if len(h):
                    found = self._attention(h, u) @ self._heads(self.value(h))
                    u = u + self.out(found.transpose(0, 1).reshape(len(u), -1))
                u = self.norm(u)[None]
                for layer in self.layers:
                    u = layer(u)
                p, _ = self.pool_tokens(u[0])
            b, share = self.pool_tiles(h) if len(h) else (self.no_tiles, h.new_zeros(0))
            embedding = torch.cat([p, b])
            logits: Tensor = self.head(embedding)
        return logits, embedding, share


def _network(columns: int, params: Params) -> nn.Sequential:
    """(B, columns) -> (B, d): two layers."""
    snn = params.token_network == "snn"
    made: list[nn.Module] = []
    for a, b in ((columns, params.hidden), (params.hidden, params.width)):
        linear = nn.Linear(a, b)
        if snn:  # variance 1 / inputs, which SELU keeps
            nn.init.normal_(linear.weight, std=a**-0.5)
            nn.init.zeros_(linear.bias)
        made += [linear, nn.SELU() if snn else nn.ReLU()]
        made.append(nn.AlphaDropout(params.dropout) if snn else nn.Dropout(params.dropout))
    return nn.Sequential(*made)


def build(in_dim: int, n_out: int, columns: Mapping[str, Columns], params: Params) -> CoAttention:
    """A new network with fresh weights for tables of these columns."""
    width = sum(len(c.features) for c in columns.values())
    return CoAttention(in_dim, n_out, tuple(columns), tokens(columns, params.rest), width, params)
