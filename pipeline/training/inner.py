"""Inner folds of a fold's training part (its training and validation patients), and the evidence that they give for or
against a student: each patient of that part is answered for by a plain model and a student that never saw it.

In: a job, and the cohort. Out: the jobs of the inner trainings, and what they say, pair by pair of models. A fusion
weighs its modalities by the same folds (`fused.py`). No test patient of the fold is in any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mhim.configs.schema import TrainConfig
from mhim.mil import splits
from mhim.mil.preference import Pair
from mhim.mil.splits import Fold, SplitError
from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.cohort.patients import Dataset
from mhim.pipeline.training import bundle, kept
from mhim.pipeline.training import fold as folds_
from mhim.pipeline.training.fold import Job

INNER = "inner"  # folder of the inner trainings


def inner_folds(config: TrainConfig, fold: Fold, data: Dataset, folds: int, why: str) -> tuple[Fold, ...]:
    """The inner folds of a fold's training part: each patient is left out once. Whole sites where sites are known, and
    fewer than `folds` where the patients are few. why: the setting that asks for them. Raises SplitError."""
    wanted = {*fold.train, *fold.val}
    own = replace(data, patients=tuple(p for p in data.patients if p.id in wanted))
    sites = {p.site for p in own.patients}
    by = "site" if None not in sites and len(sites) >= folds else "patient"
    error: SplitError | None = None
    for how, k in [(how, k) for how in dict.fromkeys((by, "patient")) for k in range(folds, 1, -1)]:
        asked = config.model_copy(update={"split_by": how, "folds": k, "repeats": 1, "protocol": "honest"})
        try:
            return tuple(cases.make_folds(own, asked))
        except SplitError as found:
            error = found
    raise SplitError(f"{fold.name}: its training part has no inner folds, which {why} weighs by: {error}")


def with_evidence(job: Job, data: Dataset) -> Job:
    """The job, with the inner trainings by which its student is kept or not, where its validation is too small to tell;
    those of its parts too. Raises SplitError."""
    job = replace(job, parts=tuple(with_evidence(part, data) for part in job.parts)) if job.parts else job
    if job.part or job.teacher is None or not kept.needs_inner(job.config, len(data.owners(job.fold.val))):
        return job
    # a student of its own, whatever is chosen later: a training that fell back says nothing of it
    student = job.config.model_copy(update={"choice": "point", "fallback": None})
    inner = inner_folds(job.config, job.fold, data, job.config.choice_folds, "train.choice=inner")
    digest, under = splits.digest(inner), f"{INNER}/{job.fold.name}"

    def cell(of: str) -> str:
        return f"{of}/{under}" if of else under

    made = []
    for fold in inner:
        teacher = replace(job.teacher, fold=fold, split_hash=digest, cell=cell(job.teacher.cell))
        made.append(replace(job, config=student, fold=fold, split_hash=digest, teacher=teacher, cell=cell(job.cell)))
    return replace(job, evidence=tuple(made))


def pairs(made: Sequence[tuple[Path, Path]]) -> list[Pair]:
    """What plain model and student of each inner fold say of whom they held out. made: folders of both."""
    found = []
    for plain, student in made:
        task = bundle.card_of(student).task.value  # of the inner fold: survival's bins are cut in its training part
        found.append(folds_.pair(task, *(folds_.read_side(folder, "test") for folder in (plain, student))))
    return found
