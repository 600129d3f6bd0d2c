"""MIL models, one paper each: the contract between a model file, the trainer and MHIM.

A file offers `Params` (a `configs.schema.Settings`), `build(in_dim, n_out, params) -> MIL`, and, if the order or place
of instances changes its answer, `USES_POSITION = True`. A model that needs another one trained before it on the same
fold also offers `baseline(params) -> (model name, its params as a dict)`, or None where these params need none, and its
module `start_from(state_dict)`; `FALLS_BACK = False` where that other one is not what it is measured against. One that
standardises the features by itself says `SCALES_ITSELF = True`: then nobody is told that theirs are large.

`Bag` is the one batch every model receives whole, so that none can lose the mask by not asking for it. `MIL` unpacks
it: the real instances of all bags are embedded in one product, then each bag is encoded by itself. Padding is
therefore never computed on, and cannot change anything. Models know no file, no loop and no task's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mhim.configs.errors import UserError
from mhim.mil.parts import segments


class NoAttention(UserError, ValueError):
    """What was asked for is of attention, and the model has none that learns."""


class TaskLike(Protocol):
    """All that a model may ask of a task (see mil/tasks.py)."""

    @property
    def n_out(self) -> int: ...

    @property
    def remembers(self) -> bool:
        """Whether the loss of a bag needs those seen before (Cox)."""
        ...

    @property
    def scored_as_published(self) -> bool:
        """Whether MHIM's published score, a softmax over the logits, means something."""
        ...

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss, a scalar, of logits (B, n_out). target is int64 only where it indexes the logits."""
        ...

    def hardness(self, contribution: Tensor, logits: Tensor) -> Tensor:
        """(N,) how much each instance argues for the bag's answer, from its contributions (N, n_out) to the bag's
        logits (n_out,)."""
        ...

    def evidence(self, contribution: Tensor, logits: Tensor) -> Tensor:
        """(N,) >= 0, summing to one: the part of each instance in what argues for the bag's answer, from the same."""
        ...

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """How far the student's answer is from the teacher's, a scalar; both are logits (B, n_out)."""
        ...


@dataclass(frozen=True)
class Bag:
    """A padded batch of bags.

    features: float (B, N, D). mask: bool (B, N), True on real instances. coords: float32 (B, N, 2), level-0 px of the
    tile's top-left corner, x then y (zeros on padding). tile_l0: float32 (B,), tile edge in level-0 px, so that
    coords / tile_l0 is a grid position. mpp: µm per tile px.
    sizes: number of real instances per bag when these come first, as `bags.collate` puts them; known on the host,
    so that a GPU is not asked. None: the mask alone says which are real.
    numbers: float32 (B, V), what is known of each patient beside the bag, for a network that reads that too, or None.
    """

    features: Tensor
    mask: Tensor
    coords: Tensor
    tile_l0: Tensor
    mpp: float
    sizes: tuple[int, ...] | None = None
    numbers: Tensor | None = None

    def rows(self) -> list[Tensor | slice]:
        """For each bag, what selects its real instances among its N rows."""
        if self.sizes is not None:
            return [slice(0, n) for n in self.sizes]
        return [m.nonzero()[:, 0] for m in self.mask]


@dataclass(frozen=True)
class Output:
    """logits: (B, n_out). scores: (B, N) share of each instance in the answer, not negative, summing to 1 over a bag
    of attention models; 0 on padding. embedding: (B, E) bag embedding.
    evidence: (B, N, n_out) class evidence per instance before attention (logits without bias), or None."""

    logits: Tensor
    scores: Tensor
    embedding: Tensor
    evidence: Tensor | None = None


@dataclass(frozen=True)
class Instances:
    """The embedded instances of one bag, as a bag encoder receives them.

    z: (N, h). grid: float32 (N, 2), place in tile edges, x then y, or None for a model that does not use it.
    log_count: float32 (N,) or None (all 0): an instance with log_count c weighs as exp(c) equal instances; -inf removes
    it without changing a shape. alone: their rows of `MIL.alone`, where these were computed before; empty: not.
    """

    z: Tensor
    grid: Tensor | None = None
    log_count: Tensor | None = None
    alone: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """What a bag encoder says of one bag. The fields after `embedding` are filled when `detail` is asked for.

    logits: (n_out,). embedding: (R, E), R rows (dsmil: one per class, others 1).
    attention: (H, N), one row per head, as the paper defines it. share: (N,) >= 0 with sum 1, the part each instance
    has in the answer. evidence: (N, n_out) class evidence before attention, without bias.
    contribution: (N, n_out) what each instance adds to the bag logits, without bias.
    published_score: (N,) class-aware score as MHIM-MIL publishes it for this encoder.
    """

    logits: Tensor
    embedding: Tensor
    attention: Tensor | None = None
    share: Tensor | None = None
    evidence: Tensor | None = None
    contribution: Tensor | None = None
    published_score: Tensor | None = None


def of_shares(logits: Tensor, embedding: Tensor, attention: Tensor, share: Tensor, evidence: Tensor) -> Encoded:
    """The detailed answer of a model to whose logits instance n adds share_n * evidence_n, given its bag embedding (E,)
    and the others as in `Encoded`."""
    contribution = share[:, None] * evidence
    published = torch.softmax(contribution, dim=1).amax(dim=1)
    return Encoded(logits, embedding[None], attention, share, evidence, contribution, published)


class MIL(nn.Module):
    """Base of all models: fill in `embed` and `encode`; a student of MHIM needs nothing more.

    instance_width: entries of z where that is not the setting `width` (a model without an embedding layer).
    entropy_weight: weight of `spread` in the losses; 0 is without. packed: bags of a step are encoded together, where
    the model can (`encode_pack`)."""

    instance_width: int | None = None
    entropy_weight: float = 0.0
    packed: bool = False

    def embed(self, x: Tensor) -> Tensor:
        """Instance embedding of features (M, D) of one or several bags -> (M, h)."""
        raise NotImplementedError

    def embed_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """`embed` of chosen rows of x, int64 (R,), in this order -> (R, h)."""
        return self.embed(x.index_select(0, rows))

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        """One bag of at least one embedded instance -> its answer. detail: fill the per-instance fields too."""
        raise NotImplementedError

    def alone(self, z: Tensor) -> tuple[Tensor, ...]:
        """What `encode` computes of each instance z (N, h) by itself, (N, ...) each; nothing, unless a model says so.
        With it in `Instances.alone`, many bags of the same instances cost little more than their pooling."""
        return ()

    def at_test(self, instances: Instances) -> Instances:
        """One bag of embedded instances as `encode` is shown it at test: as it is, unless a model adds to it."""
        return instances

    def forward(self, bag: Bag) -> Output:
        """The bag classifier, nothing masked or recycled. An empty bag scores as one instance embedded as zeros."""
        return collect([self.encode(i, detail=True) for i in self.instances(bag)], bag)

    def instances(self, bag: Bag) -> list[Instances]:
        """The embedded real instances of each bag; an empty bag holds one instance of zeros."""
        x, sizes = flatten(bag)
        return [one_bag(z, g) for z, g in zip(self.embed(x).split(sizes), grids(bag), strict=True)]

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        """Named losses, scalars, whose sum is minimised."""
        if self.packed and not self.entropy_weight and len(bag.mask) > 1:
            logits = self._pack(bag)
            if logits is not None:
                return {"task": task.loss(logits, target)}
        found = [self.encode(i, self.entropy_weight > 0) for i in self.instances(bag)]
        return {"task": task.loss(torch.stack([e.logits for e in found]), target)} | self.spread(found)

    def encode_pack(self, z: Tensor, bag: Tensor, bags: int) -> Tensor | None:
        """Logits (bags, n_out) of several bags at once, the same as of each alone, or None: this model has no such way.

        z: (M, h) embedded instances, one bag after the other. bag: int64 (M,), which each is of, each at least once."""
        return None

    def _pack(self, bag: Bag) -> Tensor | None:
        if type(self).instances is not MIL.instances:  # a model that adds instances of its own
            return None
        packs, encodes = (next(c for c in type(self).__mro__ if m in vars(c)) for m in ("encode_pack", "encode"))
        if not issubclass(packs, encodes):  # one that encodes otherwise than the model whose `encode_pack` it inherits
            return None
        x, sizes = flatten(bag)
        if 0 in sizes:
            return None
        return self.encode_pack(self.embed(x), segments.of_sizes(sizes, x.device), len(sizes))

    def spread(self, found: Sequence[Encoded]) -> dict[str, Tensor]:
        """The loss term of attention entropy maximisation (AEM; Zhang et al., 2024, arXiv 2406.15303) by name, or none.

        entropy_weight * sum_n p_n log p_n of the attention over the instances, mean over heads and bags: the answer is
        to lean on more of them. It reaches from -log N to 0, so its pull is stronger on long bags. found: with detail.
        Raises NoAttention for a model whose attention is no distribution that learns (mean, max, transmil)."""
        if not self.entropy_weight:
            return {}
        each = [e.attention for e in found if e.attention is not None and e.attention.requires_grad]
        if len(each) < len(found):
            raise NoAttention(
                f"{type(self).__name__} has no attention that could be spread: "
                "leave train.attention_entropy at 0, or take an attention model"
            )
        terms = [(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1).mean() for p in each]
        return {"entropy": self.entropy_weight * torch.stack(terms).mean()}

    def prepare(self, batches: Iterable[tuple[Bag, Tensor]], task: TaskLike) -> None:
        """Called once before the first step of a training, in eval mode and without gradients, with the training part's
        bags and targets, for what is not learned step by step; what it leaves is in the `state_dict`."""

    def calibrate(self, batches: Iterable[tuple[Bag, Tensor]], task: TaskLike) -> None:
        """Called right after `prepare`, in the same way, with the bags and targets of inner validation, one bag at a
        time, for what is chosen on them before training; there may be none."""

    def calibrated(self) -> dict[str, float]:
        """What `calibrate` chose, by the name of the setting, for the model's card."""
        return {}

    def after_step(self) -> None:
        """Called after each step of the optimiser."""

    def set_progress(self, done: float) -> None:
        """Called before each `losses` with the part of the training that is done, in [0, 1)."""


MILModel = MIL


def flatten(bag: Bag) -> tuple[Tensor, list[int]]:
    """The real instances of all bags one after the other (ΣN, D), and the number per bag. One bag is not copied."""
    parts = [bag.features[b, rows] for b, rows in enumerate(bag.rows())]
    return parts[0] if len(parts) == 1 else torch.cat(parts), [len(p) for p in parts]


def grids(bag: Bag) -> list[Tensor]:
    """Grid positions of each bag's real instances, float32 (N, 2) each, in tile edges."""
    return [bag.coords[b, rows] / bag.tile_l0[b].clamp_min(1e-6) for b, rows in enumerate(bag.rows())]


def one_bag(z: Tensor, grid: Tensor | None) -> Instances:
    """Embedded rows (N, h) and grid (N, 2) or None as a bag; without rows, one instance of zeros at the origin."""
    if len(z):
        return Instances(z, grid)
    return Instances(z.new_zeros(1, z.shape[1]), None if grid is None else grid.new_zeros(1, 2))


def collect(found: Sequence[Encoded], bag: Bag) -> Output:
    """The answers of single bags, padded to one Output."""
    logits = torch.stack([e.logits for e in found])
    scores = logits.new_zeros(bag.mask.shape)
    evidence = None if found[0].evidence is None else logits.new_zeros(*bag.mask.shape, logits.shape[1])
    for b, (rows, e) in enumerate(zip(bag.rows(), found, strict=True)):
        n = rows.stop if isinstance(rows, slice) else len(rows)
        if n == 0:
            continue
        # behind the instances stand the tokens of a model that shows them at test: they have no place in the bag
        if e.share is not None:
            scores[b, rows] = e.share[:n].to(scores.dtype)
        if evidence is not None and e.evidence is not None:
            evidence[b, rows] = e.evidence[:n].to(evidence.dtype)
    return Output(logits, scores, torch.stack([e.embedding.flatten() for e in found]), evidence)
