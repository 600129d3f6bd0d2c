"""MHIM-MIL: masked hard instance mining, for any attention model of this folder as the student.

Papers: Tang et al., ICCV 2023, arXiv 2307.15254 (v1); IJCV 2025, arXiv 2509.11526 (v2: class-aware scores, recycling).

One training step, per bag of N instances with a teacher T and a student S of the same architecture:
1. T reads the whole bag: per instance a score and the share it has in T's answer.
2. Hard mask: the top ceil(r_h N) by score are removed. Here: only while their summed share is within `share_max`.
3. Of the L left, floor(keep_ratio L) stay as they are, the others are merged into `merge_k` tokens.
4. S reads [kept | tokens]. Loss = task(S logits) + alpha * consistency(T, S).
5. After the optimiser's step T <- m T + (1 - m) S (or T stays), and the global queries move.
At test nothing is masked. With merge_at_test (the default) S still reads the tokens, of the whole bag, which it was
trained to read: 2 to 23 % more time on a bag of 10,000. As published, S alone reads the bag.

T is the plain student model trained before on the same fold: see `baseline` and `start_from`.

The default differs from the papers where the published rule loses against the plain model: on bags whose evidence is a
few instances the mask takes all of it, and tokens that exist in training only draw up to 3/4 of the attention. So the
share that the mask may take is capped, the tokens are shown at test, and the student starts from the teacher, whose
answer the consistency then preserves; tests/benchmarks/masking.py measures each part. configs/mhim_v2.yaml and
mhim_v1.yaml are the published ones whole. Choices,
each with the authors' way as the option named second:
- share_max .1 | 1: cap on the share of the answer that the mask may take.
- merge_at_test True | False.
- merge "mca": tokens by cross-attention of global queries, as published; "mean": means of the merged instances weighted
  by T's share, counted as the number they stand for, so that they stay in the instances' distribution.
- consistency "embedding": cross-entropy of the softmax over the h entries of the bag embedding, as published;
  "probability": divergence of the answers (KL).
- teacher "ema" in teacher_mode "train", as published; "frozen", "eval" (in train mode its dropout makes the top 3 % of
  two passes agree by 20-40 % only).
- student_start "teacher" | "fresh".
- score "margin" | "probability": how much an instance argues for the bag's answer (below), which never saturates; or
  the published class-aware score. Neither holds the classifier's bias. (The published one adds the first class's bias
  to all, which softmax ignores.)
- rank "float32" | "autocast": in half precision the scores of 10,000 instances collapse to one value.
- keep_ratio is the share that is *kept* (.8 masks 20 %), which is what `merge_ratio` means in the authors' program; the
  text speaks of masking 80-90 %: that is keep_ratio .1-.2.
- order "slide" | "shuffled": the kept instances stay in the bag's order, on which transmil's geometry depends.
- min_kept 1 | 0: a tiny bag keeps an instance besides the tokens.
- query_update "after" | "before_backward": moving the queries before the backward pass changes its gradients.

What the margin is of each outcome (`Task.hardness`), of an instance's contributions c to the logits:
- classes, and the time bins of nll: max c - mean c; of two classes that orders as the probability of the called class
  against the other, and of time bins an instance is hard that moves the answer to one bin.
- ordinal: c of "the bag's level or worse", Σ c_k over the thresholds k below the teacher's level (cumulative: along
  the slope of its cutpoint), because a bag has its grade by its worst instances; at the lowest level -c_0,
  which holds it there.
- regression and cox: |c|, because what lowers a value is evidence as much as what raises it: no sign is the answer's.
- several: the best rank an instance has for any of the targets, because scales of different outcomes do not compare,
  and a mean would leave a target whose evidence lies elsewhere its hardest instances in every bag.
The published score is a softmax over classes; ordinal, regression and several have none and take the margin.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from mhim.configs import lookup
from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Bag, Encoded, Instances, Output, TaskLike, flatten, grids, one_bag
from mhim.mil.parts import masking
from mhim.mil.parts.layers import load_exact
from mhim.mil.parts.recycle import Merged, Recycle, mean_tokens


class Params(Settings):
    """Settings of MHIM-MIL; the defaults are the repaired form (see the module's text)."""

    student: str = Field("abmil", description="student: a model of this folder (abmil, transmil, dsmil ...)")
    student_params: dict[str, Any] = Field(default_factory=dict, description="settings of the student itself")
    mask_ratio_h: float = Field(0.03, ge=0, lt=1, description="share of the instances removed by highest score")
    mask_ratio_hr: float = Field(
        1.0,
        gt=0,
        le=1,
        description="random share of a correspondingly larger top set that is removed",
    )
    mask_decay: Literal["none", "cosine"] = Field("none", description="cosine: mask_ratio_h falls to 0 over training")
    mask_ratio_l: float = Field(0.0, ge=0, lt=1, description="share of the instances removed by lowest attention (v1)")
    mask_ratio: float = Field(0.0, ge=0, lt=1, description="share of the instances removed at random (v1)")
    rounding: Literal["ceil", "floor"] = Field("ceil", description="rounding of the numbers removed")
    share_max: float = Field(
        0.1,
        gt=0,
        le=1,
        description="most of the teacher's attention that the hard mask may remove; 1 is no cap",
    )
    score: Literal["margin", "probability", "attention"] = Field(
        "margin",
        description="what the hard mask ranks by: logit margin, published class-aware score (v2), attention (v1)",
    )
    heads: Literal["mean", "vote", "max"] = Field("mean", description="fusion of attention heads for score=attention")
    rank: Literal["float32", "autocast"] = Field(
        "float32",
        description="arithmetic of the teacher: always float32, or that of train.amp",
    )
    keep_ratio: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of the unmasked instances kept as they are; the others are merged (merge_ratio of "
        "the authors' program)",
    )
    min_kept: int = Field(1, ge=0, description="fewest instances kept as they are")
    order: Literal["slide", "shuffled"] = Field("slide", description="order of the kept instances")
    merge: Literal["mean", "mca", "none"] = Field(
        "mca",
        description="tokens of the merged instances: weighted means, the recycle network's cross-attention, "
        "or none (they are dropped)",
    )
    merge_k: int = Field(5, ge=1, description="number of tokens")
    merge_momentum: float = Field(0.9999, ge=0, le=1, description="momentum of the global queries (mca)")
    merge_dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the recycle network (mca)")
    merge_at_test: bool = Field(True, description="tokens of the whole bag also at test (merge=mca only)")
    query_update: Literal["after", "before_backward"] = Field("after", description="when the global queries move (mca)")
    consistency: Literal["probability", "embedding", "none"] = Field(
        "embedding",
        description="what student and teacher must agree in",
    )
    alpha: float = Field(0.5, ge=0, description="weight of the consistency loss")
    temp_teacher: float = Field(0.1, gt=0, description="temperature of the teacher's softmax (consistency=embedding)")
    temp_student: float = Field(1.0, gt=0, description="temperature of the student's softmax (consistency=embedding)")
    teacher: Literal["frozen", "ema"] = Field("ema", description="whether the teacher follows the student")
    teacher_mode: Literal["eval", "train"] = Field("train", description="train: the teacher's dropout is on")
    momentum: float = Field(0.9997, ge=0, le=1, description="momentum of the EMA teacher")
    momentum_schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="cosine: the momentum rises to 1 over training",
    )
    student_start: Literal["teacher", "fresh"] = Field("teacher", description="weights from which the student starts")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Params:
        if self.student.removeprefix("mhim.") in ("mhim", "mil.models.mhim"):
            raise ValueError("student: mhim cannot be its own student")
        if self.merge == "none" and self.keep_ratio < 1 and self.min_kept < 1:
            raise ValueError("min_kept: without tokens at least one instance must be kept")
        return self


class Mhim(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params = params
        module = lookup.find("mhim.mil.models", params.student)
        student_params = lookup.params(module, params.student_params)
        if hasattr(module, "baseline") and module.baseline(student_params) is not None:
            raise ValueError(f"student: {params.student} needs another model before it and cannot be a student")
        self.placed: bool = getattr(module, "USES_POSITION", False)
        self.student: MIL = module.build(in_dim, n_out, student_params)
        self.teacher: MIL = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.train(self.training and params.teacher_mode == "train")
        self.recycle: Recycle | None = None
        if params.merge == "mca":
            width = self.student.instance_width or student_params.width
            self.recycle = Recycle(width, params.merge_k, params.merge_dropout)
        self.done = 0.0
        self._results: list[Tensor] = []

    # -- inference: the bare student ------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> Tensor:
        return self.student.embed(x)

    def alone(self, z: Tensor) -> tuple[Tensor, ...]:
        of_student, recycle = self.student.alone(z), self.recycle
        return (*of_student, *recycle.alone(z)) if recycle and self.params.merge_at_test else of_student

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        return self.student.encode(instances, detail)

    def forward(self, bag: Bag) -> Output:
        out = self.student(bag) if not self.params.merge_at_test else super().forward(bag)
        assert isinstance(out, Output)
        return out

    def instances(self, bag: Bag) -> list[Instances]:
        return [self.at_test(i) for i in self.student.instances(bag)]

    def at_test(self, instances: Instances) -> Instances:
        recycle = self.recycle
        if recycle is None or not self.params.merge_at_test:
            return instances
        if not instances.alone:
            return self._with_tokens(instances, recycle(instances.z, instances.grid))
        *of_student, normed, logits = instances.alone
        shown = self._with_tokens(instances, recycle.pooled(normed, logits, instances.grid))
        of_tokens = self.student.alone(shown.z[len(instances.z) :])
        return replace(shown, alone=tuple(torch.cat(both) for both in zip(of_student, of_tokens, strict=True)))

    # -- training -------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Mhim:
        super().train(mode)
        self.teacher.train(mode and self.params.teacher_mode == "train")
        return self

    def start_from(self, baseline_state: dict[str, Tensor]) -> None:
        """Fill the teacher (and, by `student_start`, the student) from the state of the fold's baseline model.

        Raises ValueError naming every missing, unexpected or misshapen key: a wrong teacher is never used.
        """
        load_exact(self.teacher, baseline_state, f"the baseline ({self.params.student})")
        if self.params.student_start == "teacher":
            load_exact(self.student, baseline_state, f"the baseline ({self.params.student})")

    def set_progress(self, done: float) -> None:
        self.done = done
        self.student.set_progress(done)

    @property
    def ratio_high(self) -> float:
        """mask_ratio_h at this point of the training."""
        base = self.params.mask_ratio_h
        return masking.cosine(base, 0.0, self.done) if self.params.mask_decay == "cosine" else base

    @property
    def momentum(self) -> float:
        """The teacher's momentum at this point of the training."""
        base = self.params.momentum
        return masking.cosine(base, 1.0, self.done) if self.params.momentum_schedule == "cosine" else base

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        x, sizes = flatten(bag)
        places: Sequence[Tensor | None] = grids(bag) if self.placed else [None] * len(sizes)
        seen = self.assess(x, sizes, places)
        splits = [self.choose(t, n, x.device, task) if n else None for t, n in zip(seen, sizes, strict=True)]
        detail = max(self.entropy_weight, self.student.entropy_weight) > 0
        found = [self.student.encode(i, detail) for i in self.shown(x, sizes, places, splits, seen)]
        logits = torch.stack([e.logits for e in found])
        named = {"task": task.loss(logits, target)} | (self.spread(found) or self.student.spread(found))
        if self.params.consistency == "none":
            return named
        taught = [t for t in seen if t is not None]
        if self.params.consistency == "probability":
            apart = task.divergence(torch.stack([t.logits for t in taught]), logits)
        else:
            apart = self.embedding_consistency(
                torch.cat([t.embedding for t in taught]), torch.cat([e.embedding for e in found])
            )
        return named | {"consistency": self.params.alpha * apart}

    def assess(self, x: Tensor, sizes: list[int], places: Sequence[Tensor | None]) -> list[Encoded | None]:
        """What the teacher says of each bag, never differentiated; None where nothing needs it."""
        p = self.params
        scored = self.ratio_high > 0 or p.mask_ratio_l > 0 or (p.merge == "mean" and p.keep_ratio < 1)
        if not scored and p.consistency == "none":
            return [None] * len(sizes)
        exact = p.rank == "float32"
        kind = x.device.type
        with torch.no_grad(), torch.autocast(kind, enabled=not exact and torch.is_autocast_enabled(kind)):
            parts = self.teacher.embed(x.float() if exact and x.dtype != torch.float64 else x).split(sizes)
            return [self.teacher.encode(one_bag(z, g), scored) for z, g in zip(parts, places, strict=True)]

    def choose(self, seen: Encoded | None, n: int, device: torch.device, task: TaskLike) -> masking.Split | None:
        """Which instances of a bag of n the student sees, and which are merged; None: all, as they are."""
        p = self.params
        removing = self.ratio_high > 0 or p.mask_ratio_l > 0 or p.mask_ratio > 0
        if n == 1 or (not removing and p.keep_ratio == 1 and p.order == "slide"):
            return None
        noise = self.draw(3, n, device)
        score = share = attention = noise[0]
        if seen is not None and seen.share is not None and seen.attention is not None:
            share, attention = seen.share, seen.attention.float().mean(0)
            score = self.score(seen, n, task)
        removed = masking.remove(
            score,
            share,
            self.ratio_high,
            p.mask_ratio_l,
            p.mask_ratio,
            p.mask_ratio_hr,
            p.share_max,
            p.rounding,
            noise[:2],
            attention,
        )
        return masking.split(removed, p.keep_ratio, noise[2], p.order == "slide", p.min_kept)

    def score(self, seen: Encoded, n: int, task: TaskLike) -> Tensor:
        """(N,) by which the hard mask ranks the instances."""
        assert seen.contribution is not None
        assert seen.published_score is not None
        assert seen.attention is not None
        if self.params.score == "margin" or (self.params.score == "probability" and not task.scored_as_published):
            return task.hardness(seen.contribution, seen.logits)
        if self.params.score == "probability":
            return seen.published_score
        if self.params.heads == "vote":
            return masking.votes(seen.attention, masking.pool(n, self.ratio_high, self.params.mask_ratio_hr))
        return seen.attention.amax(0) if self.params.heads == "max" else seen.attention.mean(0)

    def draw(self, rows: int, n: int, device: torch.device) -> Tensor:
        """Uniform noise (rows, n) behind all random choices of a bag."""
        return torch.rand(rows, n, device=device)

    def shown(
        self,
        x: Tensor,
        sizes: list[int],
        places: Sequence[Tensor | None],
        splits: list[masking.Split | None],
        seen: list[Encoded | None],
    ) -> list[Instances]:
        """The student's embedded instances of each bag: kept ones, then tokens. Only rows in use are embedded."""
        if all(s is None for s in splits):
            parts = [[z, z[:0]] for z in self.student.embed(x).split(sizes)]
        else:
            rows, lengths, start = [], [], 0
            for n, s in zip(sizes, splits, strict=True):
                if s is None:
                    kept = torch.arange(n, device=x.device)
                    merged = kept[:0]
                else:
                    kept, merged = s.kept, s.merged
                if self.params.merge == "none":
                    merged = merged[:0]
                rows += [kept + start, merged + start] if start else [kept, merged]
                lengths += [len(kept), len(merged)]
                start += n
            flat = self.student.embed_rows(x, torch.cat(rows)).split(lengths)
            parts = [list(flat[i : i + 2]) for i in range(0, len(flat), 2)]
        return [self._shown(z, rest, g, s, t) for (z, rest), g, s, t in zip(parts, places, splits, seen, strict=True)]

    def _shown(
        self, z: Tensor, rest: Tensor, grid: Tensor | None, s: masking.Split | None, seen: Encoded | None
    ) -> Instances:
        if s is None:
            return one_bag(z, grid)
        kept = Instances(z, _at(grid, s.kept), None if s.kept_counts is None else _log(s.kept_counts, z))
        if not len(rest):
            return kept
        if self.recycle is not None:
            tokens = self.recycle(rest, _at(grid, s.merged), s.merged_counts)
            self._moved(tokens.z)
        else:
            share = seen.share[s.merged] if seen is not None and seen.share is not None else rest.new_ones(len(rest))
            tokens = mean_tokens(rest, share, self.params.merge_k, _at(grid, s.merged), s.merged_counts)
        return self._with_tokens(kept, tokens)

    def _with_tokens(self, kept: Instances, tokens: Merged) -> Instances:
        log_count = None
        if kept.log_count is not None or tokens.log_count is not None:
            each = ((kept.z, kept.log_count), (tokens.z, tokens.log_count))
            log_count = torch.cat([_log(z.new_ones(len(z)) > 0, z) if c is None else c for z, c in each])
        grid = None if kept.grid is None or tokens.grid is None else torch.cat([kept.grid, tokens.grid])
        return Instances(torch.cat([kept.z, tokens.z.to(kept.z.dtype)]), grid, log_count)

    def _moved(self, result: Tensor) -> None:
        assert self.recycle is not None
        if not self.training:
            return
        if self.params.query_update == "before_backward":
            self.recycle.move(result.detach(), self.params.merge_momentum)
        else:
            self._results.append(result.detach())

    def embedding_consistency(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Mean over rows (R, E) of the cross-entropy between softmax(teacher / temp) and softmax(student / temp)."""
        target = torch.softmax(teacher.detach() / self.params.temp_teacher, dim=1)
        return -(target * F.log_softmax(student / self.params.temp_student, dim=1)).sum(1).mean()

    def after_step(self) -> None:
        if self.recycle is not None:
            for result in self._results:
                self.recycle.move(result, self.params.merge_momentum)
        self._results.clear()
        if self.params.teacher == "ema":
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - self.momentum
                )


def _at(grid: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if grid is None else grid[rows]


def _log(counts: Tensor, like: Tensor) -> Tensor:
    wide = like.dtype if like.dtype == torch.float64 else torch.float32
    return torch.where(counts, 0.0, -torch.inf).to(wide)


def baseline(params: Params) -> tuple[str, dict[str, Any]]:
    """The model that is trained first on the fold and becomes the teacher: the bare student, and its settings."""
    return params.student, dict(params.student_params)


def build(in_dim: int, n_out: int, params: Params) -> Mhim:
    """Student and teacher with the same fresh weights; call `start_from` with the baseline's state before training."""
    return Mhim(in_dim, n_out, params)
