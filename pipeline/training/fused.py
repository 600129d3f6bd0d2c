"""The trainings that a fusion consists of, beside the slide model's own: inner folds, tables, and the fused fold
itself.

In: the settings, the folds and the patients' tables of a run. Out: jobs; a table's folder (`model.json`,
`model.safetensors`, `table.json`, `predictions.csv`); a fused fold's folder, which is the slide model's bundle with
`fusion.json` and `fusion.safetensors` beside it, the fused `predictions.csv`, and `parts.csv` (what each modality says
of each test patient, and the answer without it). Of a table and of a fusion the rows of side `val` are those of all
training patients, by models of the inner folds, and by weights, that did not see them (a table's penalty alone, one of
ten, is chosen on all of these): temperature, thresholds and intervals rest on them, and on no test patient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import TablesConfig, TrainConfig
from mhim.mil import splits
from mhim.mil.fusion import gate, joined, late, outcome, tabular
from mhim.mil.fusion.columns import ColumnsError
from mhim.mil.fusion.gate import Gate
from mhim.mil.fusion.joined import JOINT, Joined
from mhim.mil.fusion.late import Late
from mhim.mil.fusion.linear import Form
from mhim.mil.fusion.outcome import NotFused
from mhim.mil.splits import Fold
from mhim.pipeline.cohort.patient_tables.table import PatientTable
from mhim.pipeline.cohort.patients import Dataset, Patient
from mhim.pipeline.resume.fingerprints import of_joint
from mhim.pipeline.store import tables
from mhim.pipeline.training import answers, bundle, joint
from mhim.pipeline.training import fold as folds_
from mhim.pipeline.training import fusion_bundle as bundles
from mhim.pipeline.training.fold import Job
from mhim.pipeline.training.fusion_bundle import SLIDE, Fusion
from mhim.pipeline.training.inner import INNER, inner_folds
from mhim.pipeline.training.progress import HISTORY

TEACHER, TABLES = "teacher", "tables"
PARTS = "parts.csv"
# what a fused card says of the slide model as that one's own card does
OF_THE_SLIDE = ("fallback", "choice", "form", "taught", "standardized", "calibrated", "pretrained", "unlike_from")
FITS: dict[str, Callable[..., Late | Gate | Joined]] = {"late": late.fit, "gate": gate.fit, "coattn": joined.fit}


def jobs(config: TrainConfig, folds: Sequence[Fold], data: Dataset, names: Sequence[str]) -> list[Job]:
    """Every training of a fused run, in an order in which each finds what it needs. names: of the tables.

    Raises NotFused where the settings contradict a fusion, SplitError where the training part is too small."""
    if not names:
        raise NotFused(f"train.fusion={config.fusion} needs a table beside the slides: give --table NAME=FILE")
    if len(data.outcomes) > 1:
        raise NotFused(outcome.SEVERAL)
    if config.grid or config.draws:
        raise NotFused(
            "train.fusion goes with no train.grid or train.draws: choose the slide model's settings first, "
            "by a run alone"
        )
    if config.protocol == "paper":
        raise NotFused("train.fusion needs inner folds of the training part: set train.protocol=honest")
    taken = sorted({SLIDE, JOINT} & {*names})
    if taken:
        raise NotFused(f"a table cannot be called {taken[0]}, which is another part of a fusion: give it another name")
    whole_network = config.fusion == "coattn"
    if config.fusion_params and not whole_network:
        raise NotFused(f"train.fusion={config.fusion} has no settings: leave train.fusion_params away")
    if whole_network:
        of_joint(config)  # its settings are told before hours of training
    split_hash = splits.digest(folds)
    inner = {fold: inner_folds(config, fold, data, config.fusion_folds, "train.fusion") for fold in folds}
    plain = folds_.whole_params(config)
    base = folds_.baseline_config(plain)
    base = None if base is None else folds_.whole_params(base)
    made: list[Job] = []
    for seed, fold in product(range(config.seed, config.seed + config.seeds), folds):

        def slide(of: Fold, digest: str, cell: str, teacher: str, seed: int = seed) -> Job:
            taught = None if base is None else Job(base, of, seed, digest, cell=teacher)
            return Job(plain, of, seed, digest, taught, cell)

        whole = slide(fold, split_hash, SLIDE, TEACHER)
        digest, under = splits.digest(inner[fold]), f"{INNER}/{fold.name}"
        parts = [slide(f, digest, f"{SLIDE}/{under}", f"{TEACHER}/{under}") for f in inner[fold]]
        aside = [
            Job(plain, fold, config.seed, split_hash, cell=f"{TABLES}/{n}", part="table", inner=inner[fold])
            for n in names
        ]
        both = [Job(plain, fold, seed, split_hash, cell=JOINT, part="joint")] if whole_network else []
        both += [Job(plain, f, seed, digest, cell=f"{JOINT}/{under}", part="joint") for f in inner[fold] if both]
        made += [whole, *parts, *(aside if seed == config.seed else []), *both]
        every = (whole, *parts, *aside, *both)
        made.append(Job(plain, fold, seed, split_hash, part="fused", parts=every, inner=inner[fold]))
    return made


def train_table(job: Job, data: Dataset, table: PatientTable, config: TablesConfig, out: Path) -> tuple[str, ...]:
    """Fit one table on the training part of a fold, and fill `out`. Returns notes. Raises ColumnsError."""
    learn, inner = _training_part(job, data)
    test = [data.by_id()[p] for p in job.fold.test]
    task = folds_.make_task(data, job.config, learn)
    form, targets = outcome.form(task), [p.target for p in learn if p.target is not None]
    rows = table.rows.of([p.id for p in learn])
    if not rows.present.any():
        raise ColumnsError(
            f"no training patient of {job.fold.name} is in the table {table.name}: check the patient ids"
        )
    model, outside = tabular.fit(
        rows,
        outcome.arrays(task, targets),
        form,
        inner,
        outcome.levels(task),
        joint.options(config, table.name),
        table.name in job.config.fusion_groups,
        targets,
    )
    given = model.scores(table.rows.of([p.id for p in test]))
    middle = np.nanmean(outside, axis=0)  # of who is not in the table: nothing is known, the score is the mean
    said = outcome.fused(task, targets)
    predicted = [
        *answers.as_rows("val", learn, np.where(np.isfinite(outside), outside, middle), said),
        *answers.as_rows("test", test, np.where(np.isfinite(given), given, middle), said),
    ]
    card = answers.card(
        job, data, said, predicted, {"model": f"table:{table.name}", "model_params": {}}, len(model.names)
    )
    bundles.write_table(out, card, model, table.kinds)
    (out / folds_.PREDICTIONS).write_text(tables.of_mappings(predicted))
    lacking = int((~rows.present).sum())
    return (f"without a row in {table.name}: {lacking} of {len(learn)} training patients",) if lacking else ()


def train_fused(
    job: Job, data: Dataset, given: Mapping[str, PatientTable], made: Sequence[Path], out: Path
) -> tuple[str, ...]:
    """Weigh the modalities of a fold by the out-of-fold answers of its inner folds, and fill `out`. Returns notes.

    made: the folders of `job.parts`, in that order: the slide model, its inner folds, the tables; of co-attention its
    network, and that of the inner folds."""
    learn, inner = _training_part(job, data)
    test = [data.by_id()[p] for p in job.fold.test]
    at = {p.id: i for i, p in enumerate(learn)}
    first, last = 1 + len(inner), 1 + len(inner) + len(given)
    slide, inner_folders, aside = made[0], made[1:first], made[first:last]
    both, both_inner = made[last : last + 1], made[last + 1 :]
    of_tables = {folder.parent.name: bundles.read_table(folder) for folder in aside}
    card = bundle.card_of(slide)
    task, targets = card.task.value, [p.target for p in learn if p.target is not None]
    form, said = outcome.form(task), outcome.fused(task, targets)
    outside: dict[str, np.ndarray] = {SLIDE: np.full((len(learn), said.n_out), np.nan)}
    for folder in inner_folders:
        own = bundle.card_of(folder).task.value
        rows = [r for r in folds_.read_predictions(folder) if r["side"] == "test" and r["slides"] != "[]"]
        outside[SLIDE][[at[r["patient"]] for r in rows]] = outcome.scores(own, folds_.logits_of(rows))
    for name in of_tables:
        outside[name] = _outside(aside, name, at, given[name], learn)
    for folder in both_inner:
        for key, scores in joint.scores(folder, "test").items():
            own_of = outside.setdefault(key, np.full((len(learn), said.n_out), np.nan))
            own_of[[at[p] for p in scores]] = list(scores.values())
    own_val = [r for r in folds_.read_predictions(slide) if r["side"] == "val"]
    scale = {SLIDE: outcome.scores(task, folds_.logits_of(own_val))} if own_val else {}
    for folder in both:
        scale |= {k: np.stack(list(of.values())) for k, of in joint.scores(folder, "val").items()}
    fit = FITS[job.config.fusion]
    weighed = fit(outside, outcome.arrays(task, targets), form, inner, outcome.levels(task))
    val = crossed(fit, outside, outcome.arrays(task, targets), form, inner, outcome.levels(task))
    found = weighed.rescaled(scale)  # the slide model has another scale than those of its inner folds
    models, kinds = {n: m for n, (m, _) in of_tables.items()}, {n: k for n, (_, k) in of_tables.items()}
    fusion = Fusion(job.config.fusion, task, said, models, found, kinds)
    network: list[dict[str, np.ndarray]] = [{} for _ in test]
    for key, of in (item for folder in both for item in joint.scores(folder, "test").items()):
        for said_by_it, p in zip(network, test, strict=True):
            said_by_it |= {key: of[p.id]} if p.id in of else {}
    logits = {r["patient"]: x for r, x in _test_rows(slide)}
    said_of = fusion.answers(
        [logits[p.id] if p.slides else None for p in test],
        {n: t.rows.of([p.id for p in test]) for n, t in given.items()},
        network,
    )
    fused = np.stack([a.logits for a in said_of])
    predicted = [*answers.as_rows("val", learn, val, said), *answers.as_rows("test", test, fused, said)]
    named = {"model": card.model, "model_params": card.model_params}
    named |= {k: v for k in OF_THE_SLIDE if (v := card.plain().get(k)) is not None}
    whole = answers.card(job, data, said, predicted, named | {"epoch": card.epoch, "epochs": card.epochs}, card.in_dim)
    whole |= {"fusion": {"kind": job.config.fusion, "slide_task": task.to_json(), "modalities": list(found.names)}}
    bundles.write(out, whole, slide, fusion)
    for folder in both:
        joint.copy(folder, out / JOINT)
    (out / folds_.PREDICTIONS).write_text(tables.of_mappings(predicted))
    (out / HISTORY).write_bytes((slide / HISTORY).read_bytes())
    (out / PARTS).write_text(tables.of_mappings(_parts(test, said_of)))
    return ()


def crossed(
    fit: Callable[..., Late | Gate | Joined],
    outside: Mapping[str, np.ndarray],
    target: np.ndarray,
    form: Form,
    inner: Sequence[np.ndarray],
    levels: int,
) -> np.ndarray:
    """Fused scores (n, q) of the training patients, each inner fold's by weights of the others: a threshold, a
    temperature or an interval found on weights that saw its patients would be too sure of itself."""
    made = np.full(next(iter(outside.values())).shape, np.nan)
    for left in inner:
        kept = np.setdiff1d(np.arange(len(target)), left)
        others = [p for f in inner if f is not left and len(p := np.flatnonzero(np.isin(kept, f)))]
        there = {m: s[kept] for m, s in outside.items() if np.isfinite(s[kept]).all(axis=1).any()}
        weighed = fit(there, target[kept], form, others, levels)
        for i in left:
            given = {m: outside[m][i] for m in there if np.isfinite(outside[m][i]).all()}
            if given:
                made[i] = weighed.score(given)
    return np.where(np.isfinite(made), made, np.nanmean(made, axis=0))  # who has nothing that others have: the mean


def _training_part(job: Job, data: Dataset) -> tuple[list[Patient], list[np.ndarray]]:
    """The patients that a fold's fusion is fitted on, and who of them each inner fold leaves out, as places."""
    own = {*job.fold.train, *job.fold.val}
    learn = [p for p in data.patients if p.id in own]
    at = {p.id: i for i, p in enumerate(learn)}
    return learn, [np.array([at[p] for p in f.test], dtype=np.int64) for f in job.inner]


def _outside(
    folders: Sequence[Path], name: str, at: Mapping[str, int], table: PatientTable, learn: Sequence[Patient]
) -> np.ndarray:
    """A table's out-of-fold scores of the training patients, NaN for who is not in it."""
    (folder,) = (f for f in folders if f.parent.name == name)
    rows = [r for r in folds_.read_predictions(folder) if r["side"] == "val"]
    found = np.full((len(at), len(folds_.logits_of(rows)[0])), np.nan)
    found[[at[r["patient"]] for r in rows]] = folds_.logits_of(rows)
    found[~table.rows.of([p.id for p in learn]).present] = np.nan
    return found


def _test_rows(folder: Path) -> list[tuple[dict[str, Any], np.ndarray]]:
    rows = [r for r in folds_.read_predictions(folder) if r["side"] == "test"]
    return list(zip(rows, folds_.logits_of(rows), strict=True))


def _parts(of: Sequence[Patient], answers: Sequence[bundles.Answer]) -> list[dict[str, Any]]:
    """One row per test patient: the modalities at hand, the weight of each, what it adds to the score (a number, as
    `linear.one_number` reads logits; of three classes or more that of the likeliest one), and the logits without it."""
    return [{"patient": p.id, **answer.row()} for p, answer in zip(of, answers, strict=True)]
