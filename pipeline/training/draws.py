"""A search whose test folds stay sealed: settings drawn at random, chosen on validation, then opened once.

In: the search trainings of a fold, which are made of its training and validation patients alone (their folds have no
test side, and the data that they are handed hold no other patient). Out: the fold of the run: the chosen training's
bundle, with the test patients' answers and metrics added, and in its card which draw it is and of how many.
The draws are compared on the first seed; the other seeds train what was chosen.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mhim.configs.schema import TrainConfig
from mhim.mil import novelty, tuning
from mhim.mil.splits import Fold, Sealed
from mhim.pipeline.cohort.patients import Dataset
from mhim.pipeline.store import tables
from mhim.pipeline.store.layout import CARD, StoreError
from mhim.pipeline.training import bundle
from mhim.pipeline.training import fold as folds_
from mhim.pipeline.training.card import Card
from mhim.pipeline.training.fold import Job
from mhim.pipeline.training.progress import HISTORY

DRAWS: Final = "draws"
PART: Final = "chosen"


@dataclass(frozen=True)
class Choice:
    """Which draw validation prefers. failed: draws that gave no model."""

    number: int
    of: int
    failed: tuple[int, ...]


def cells(config: TrainConfig) -> dict[str, TrainConfig]:
    """Folder -> settings of every draw, from draw 0, which is the settings as given."""
    base = config.model_copy(update={"draws": 0})
    return {f"{DRAWS}/{k}": folds_.whole_params(tuning.apply(base, k)) for k in range(config.draws)}


def without_others(data: Dataset, fold: Fold) -> Dataset:
    """The data with no patient but the fold's: what is not there cannot be read."""
    own = {*fold.train, *fold.val, *fold.test}
    return replace(data, patients=tuple(p for p in data.patients if p.id in own))


def jobs(config: TrainConfig, folds: Sequence[Fold], split_hash: str) -> list[Job]:
    """The search trainings of the first seed, then the opened folds of every seed."""
    found = cells(config)
    opened = folds_.whole_params(config)
    made: list[Job] = []
    of_fold: dict[Fold, tuple[Job, ...]] = {}
    for fold in folds:
        of_fold[fold] = tuple(
            Job(settings, Sealed.of(fold), config.seed, split_hash, _teacher(settings, fold, split_hash, cell), cell)
            for cell, settings in found.items()
        )
        made += of_fold[fold]
    for seed in range(config.seed, config.seed + config.seeds):
        made += [Job(opened, f, seed, split_hash, part=PART, parts=of_fold[f]) for f in folds]
    return made


def _teacher(settings: TrainConfig, fold: Fold, split_hash: str, cell: str) -> Job | None:
    plain = folds_.baseline_config(settings)
    if plain is None:
        return None
    return Job(folds_.whole_params(plain), Sealed.of(fold), settings.seed, split_hash, cell=f"{cell}/teacher")


def of_seed(job: Job, seed: int) -> Job:
    """A search training with another seed, its teacher and its evidence too."""
    teacher = None if job.teacher is None else replace(job.teacher, seed=seed)
    return replace(job, seed=seed, teacher=teacher, evidence=tuple(of_seed(e, seed) for e in job.evidence))


def choose(cards: Sequence[Card | None]) -> Choice:
    """The draw with the best headline on validation; the first wins a tie, so that the settings as given do. cards: of
    the draws in order, None for one that failed. Raises StoreError where all did."""
    values = []
    for card in cards:
        value = None if card is None else card.validation.get(card.headline)
        values.append(-math.inf if value is None else float(value))
    there = [k for k, card in enumerate(cards) if card is not None]
    if not there:
        raise StoreError("no draw of this fold gave a model")
    best = max(there, key=lambda k: (values[k], -k))
    return Choice(best, len(cards), tuple(k for k, card in enumerate(cards) if card is None))


def open_fold(job: Job, choice: Choice, data: Dataset, made: Path, out: Path) -> tuple[str, ...]:
    """Fill `out` with the chosen training (made in `made`), and the test patients of the fold. Returns notes."""
    found = bundle.read(made)
    task, card, known = found.task, found.card, data.by_id()
    sides = {s: [known[p] for p in getattr(job.fold, s) if known[p].slides] for s in ("train", "val", "test")}
    bags = folds_.cases(sides["test"], float(data.facts.get("mpp") or 0.0))
    model = found.model().to(folds_.device(job.config.gpu))
    rows = [*folds_.read_side(made, "val"), *folds_.predicted(model, "test", bags, task, found.scale)]
    test = rows[len(rows) - len(bags) :]
    said = card.plain()
    whole: dict[str, Any] = said | {
        "split": said["split"] | {s: len(p) for s, p in sides.items()},
        "test": folds_.finite(folds_.metrics_of(test, task, said)),
        "drawn": {
            "number": choice.number,
            "draws": choice.of,
            "failed": list(choice.failed),
            "settings": tuning.draw(job.config, choice.number).plain() if choice.number else {},
        },
    }
    if card.targets is not None:
        each = folds_.metrics_of_targets(test, task, said)
        whole["targets"] = {n: t | {"test": each.get(n, {})} for n, t in said["targets"].items()}
    if found.profile is not None:
        seen = folds_.cases([*sides["val"], *sides["test"]], 0.0)
        farthest = novelty.limit(found.profile.distance(c.load()[0]) for c in seen)
        whole |= {"unlike_from": farthest} if farthest is not None else {}
    bundle.write(out, Card.of(whole, out / CARD), found.weights, found.scale, found.profile)
    (out / folds_.PREDICTIONS).write_text(tables.of_mappings(rows))
    shutil.copyfile(made / HISTORY, out / HISTORY)
    failed = f"; no model of draws {', '.join(map(str, choice.failed))}" if choice.failed else ""
    return (f"draw {choice.number} of {choice.of} (0 to {choice.of - 1}) by validation{failed}",)
