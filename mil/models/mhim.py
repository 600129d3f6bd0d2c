"""MHIM-MIL: masked hard instance mining, for any attention model of this folder as the student.

Papers: Tang et al., ICCV 2023, arXiv 2307.15254 (v1); IJCV 2025, arXiv 2509.11526 (v2: class-aware scores, recycling).

One training step, per bag of N instances with a teacher T and a student S of the same architecture:
1. T reads the whole bag: per instance a score and the share it has in T's answer.
2. Hard mask: the top ceil(r_h N) by score are removed. With `share_max` < 1 only while their summed share is within.
3. Of the L left, floor(keep_ratio L) stay as they are, the others are merged into `merge_k` tokens.
4. S reads [kept | tokens]. Loss = task(S logits) + alpha * consistency(T, S).
5. After the optimiser's step T <- m T + (1 - m) S (or T stays), and the global queries move.
At test nothing is masked. With merge_at_test (of the guarded form, below) S still reads the tokens, of the whole bag,
which it was trained to read: 2 to 23 % more time on a bag of 10,000. As published, S alone reads the bag.

T is the plain student model trained before on the same fold: see `baseline` and `start_from`.

The default tries the published form first and keeps it where the student fits: where the loss of whole training bags
has fallen as far as the plain model's, but for the share `published_within`. Elsewhere masks took the evidence itself
(on bags whose evidence is a few instances), or tokens that exist in training only draw up to 3/4 of the attention;
there the guarded form is trained, whose mask is capped, whose tokens are shown at test, and whose student starts from
the teacher, whose answer the consistency then preserves. tests/benchmarks/masking.py measures each part;
configs/mhim_v2.yaml and mhim_v1.yaml are the published forms whole. Choices of the guarded form, each with the authors'
way as the option named second:
- share_max .1 | 1: cap on the share of the answer that the mask may take.
- mask "rate" | "evidence": the mask adapts to the bag (`parts/adaptive.py`). Its hardest instances go while
  max(evidence_left, evidence_few / n_eff) of the teacher's evidence stays, n_eff the number of instances that it is
  worth: nothing where evidence is a few instances, much where it is plentiful. kinds: the same of every kind of tissue
  by itself, so that none goes whole; kinds are prototypes of the training part, kept with the weights.
- learn_left: before the first step the plain model reads the validation bags whole and masked at shares left .3, .5,
  .7, .9. The smallest is taken at which its loss rises by .05 at most, one standard error included; without one,
  nothing is masked. (Not of Cox, where a bag alone has no loss: there it stays as set.)
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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mhim.configs import lookup
from mhim.mil.models import MIL, Bag, Encoded, Instances, NoAttention, Output, TaskLike, flatten, grids, one_bag
from mhim.mil.parts import adaptive, masking
from mhim.mil.parts.layers import load_exact
from mhim.mil.parts.mhim_settings import Params as Params
from mhim.mil.parts.mhim_settings import forms as forms
from mhim.mil.parts.recycle import Merged, Recycle, mean_tokens


class Mhim(MIL):
    """See the module's text."""

    kinds: Tensor
    left: Tensor

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
        if params.kinds:
            self.register_buffer("kinds", torch.zeros(params.kinds, in_dim))
        if params.learn_left:
            self.register_buffer("left", torch.tensor(params.evidence_left, dtype=torch.float64))
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

    def prepare(self, batches: Iterable[tuple[Bag, Tensor]], task: TaskLike) -> None:
        """The kinds of tissue, of the training part's features."""
        if self.params.kinds:
            bags = (x for bag, _ in batches for x in flatten(bag)[0].split(flatten(bag)[1]) if len(x))
            self.kinds.copy_(adaptive.prototypes(bags, self.params.kinds))

    def calibrate(self, batches: Iterable[tuple[Bag, Tensor]], task: TaskLike) -> None:
        """`evidence_left` by the rule of the module's text; with no validation bag it stays as it is set."""
        if not self.params.learn_left or task.remembers:
            return
        rises = [self._rises(bag, target, task) for bag, target in batches]
        if rises:
            self.left.fill_(adaptive.learnt(torch.stack(rises)))

    def calibrated(self) -> dict[str, float]:
        return {"evidence_left": float(self.left)} if self.params.learn_left else {}

    def _rises(self, bag: Bag, target: Tensor, task: TaskLike) -> Tensor:
        """float64 (shares left,): by how much the teacher's loss on a batch of bags rises when it is masked."""
        x, sizes = flatten(bag)
        places: Sequence[Tensor | None] = grids(bag) if self.placed else [None] * len(sizes)
        seen = self.assess(x, sizes, places)
        found: list[list[Tensor]] = []
        for part, n, g, t in zip(x.split(sizes), sizes, places, seen, strict=True):
            assert t is not None
            z = self.teacher.embed(part.float())
            each = []
            for left in adaptive.LEFT:
                gone = self.removed(t, part, self.score(t, n, task), task, left).flags if n > 1 else None
                rows = slice(None) if gone is None else ~gone
                each.append(self.teacher.encode(one_bag(z[rows], None if g is None else g[rows])).logits)
            found.append([t.logits, *each])
        losses = [task.loss(torch.stack(logits), target).double() for logits in zip(*found, strict=True)]
        return torch.stack(losses[1:]) - losses[0]

    def set_progress(self, done: float) -> None:
        self.done = done
        self.student.set_progress(done)

    @property
    def left_now(self) -> float | Tensor:
        """`evidence_left`, as it is set or was learnt."""
        return self.left if self.params.learn_left else self.params.evidence_left

    @property
    def mining(self) -> bool:
        """Whether a hard mask is at work at this point of the training."""
        return self.params.mask == "evidence" or self.ratio_high > 0

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
        parts = x.split(sizes)
        splits = [self.choose(t, part, task) if len(part) else None for t, part in zip(seen, parts, strict=True)]
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
        scored = self.mining or p.mask_ratio_l > 0 or (p.merge == "mean" and p.keep_ratio < 1)
        if not scored and p.consistency == "none":
            return [None] * len(sizes)
        exact = p.rank == "float32"
        kind = x.device.type
        with torch.no_grad(), torch.autocast(kind, enabled=not exact and torch.is_autocast_enabled(kind)):
            parts = self.teacher.embed(x.float() if exact and x.dtype != torch.float64 else x).split(sizes)
            return [self.teacher.encode(one_bag(z, g), scored) for z, g in zip(parts, places, strict=True)]

    def choose(self, seen: Encoded | None, x: Tensor, task: TaskLike) -> masking.Split | None:
        """Which instances of a bag x (N, D) the student sees, and which are merged; None: all, as they are."""
        p, n, device = self.params, len(x), x.device
        removing = self.mining or p.mask_ratio_l > 0 or p.mask_ratio > 0
        if n == 1 or (not removing and p.keep_ratio == 1 and p.order == "slide"):
            return None
        noise = self.draw(3, n, device)
        score = share = attention = noise[0]
        if seen is not None and seen.share is not None and seen.attention is not None:
            share, attention = seen.share, seen.attention.float().mean(0)
            score = self.score(seen, n, task)
        if p.mask == "evidence" and seen is not None:
            taken = self.removed(seen, x, score, task, self.left_now)
            return masking.split(taken, p.keep_ratio, noise[2], p.order == "slide", p.min_kept)
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

    def removed(self, seen: Encoded, x: Tensor, score: Tensor, task: TaskLike, left: float | Tensor) -> masking.Removed:
        """What the mask by evidence takes of a bag x (N, D), N > 1, when `left` of the evidence is to stay."""
        if seen.contribution is None:
            raise NoAttention(
                f"mask=evidence: the student {self.params.student} does not tell what each instance adds to its "
                "answer: set train.model_params.mask=rate"
            )
        evidence = task.evidence(seen.contribution, seen.logits)
        kind = adaptive.nearest(x, self.kinds) if self.params.kinds else None
        return adaptive.remove(score, evidence, left, self.params.evidence_few, kind, self.params.kinds)

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
