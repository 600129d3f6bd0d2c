"""One training of one fold: patients in, a model bundle with its predictions and history out. Files around `mil.train`.

`Job` says which training it is. The folder that `train_fold` fills holds the bundle (`bundle.py`), `predictions.csv`
(validation and test patients, raw logits) and `history.csv` (one row per epoch). The test patients are read once, after
the epoch has been chosen. Knows nothing of stages, runs and machines.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mhim.configs import lookup
from mhim.configs.schema import TrainConfig, before, fingerprint_fields
from mhim.mil import novelty
from mhim.mil import train as loop
from mhim.mil.feed import Case
from mhim.mil.preference import Pair
from mhim.mil.scaling import told_raw
from mhim.mil.splits import Fold
from mhim.mil.tasks import Several, Task
from mhim.pipeline.cohort.patients import Dataset, Patient, StoredBag
from mhim.pipeline.resume.fingerprints import own_settings
from mhim.pipeline.store import reading, tables
from mhim.pipeline.store.layout import CARD, FORMAT, StoreError
from mhim.pipeline.training import bundle, experiment_log, forms, kept, targets
from mhim.pipeline.training.card import Card, Facts
from mhim.pipeline.training.forms import DeviceError as DeviceError
from mhim.pipeline.training.forms import build_model as build_model
from mhim.pipeline.training.forms import device as device
from mhim.pipeline.training.kept import Verdict
from mhim.pipeline.training.progress import HISTORY

PREDICTIONS = "predictions.csv"
SIDES = (("validation", "val"), ("test", "test"))  # name in the card, and in the predictions


@dataclass(frozen=True)
class Job:
    """One training: settings (those of the grid cell), fold, seed. teacher: the job of its baseline, or None.

    part: "" of bags; of a fusion `table` (the cell is its name), `joint` (a network that reads bag and tables) or
    `fused`; `chosen`, the opened one of a search. parts: the trainings that are fused (the slide model, its inner
    folds, the tables, of a joint network its own and its inner folds), or chosen between. inner: the inner folds that
    a fusion is weighed by. evidence: students of inner folds, each with its teacher, that speak for or against it."""

    config: TrainConfig
    fold: Fold
    seed: int
    split_hash: str
    teacher: Job | None = None
    cell: str = ""
    part: Literal["", "table", "joint", "fused", "chosen"] = ""
    parts: tuple[Job, ...] = ()
    inner: tuple[Fold, ...] = ()
    evidence: tuple[Job, ...] = ()

    @property
    def name(self) -> str:
        """Folder name below the run, cell or teacher folder: fold_0, or fold_0_seed_2 from the second seed on."""
        index = self.seed - self.config.seed
        return self.fold.name + (f"_seed_{index}" if index else "")


def baseline_config(config: TrainConfig) -> TrainConfig | None:
    """Settings of the plain model that must be trained first as the model's teacher, or None if it needs none."""
    module = lookup.find("mhim.mil.models", config.model)
    found = module.baseline(lookup.params(module, config.model_params)) if hasattr(module, "baseline") else None
    if found is None:
        return None
    model, params = found
    return config.model_copy(update={"model": model, "model_params": params})


def whole_params(config: TrainConfig) -> TrainConfig:
    """`config` with every setting of the model written out, so that defaults enter the fingerprint."""
    module = lookup.find("mhim.mil.models", config.model)
    params = lookup.params(module, config.model_params)
    # read again, the absence of these would be the default
    told = {name: getattr(params, name) for name in before(type(params))}
    return config.model_copy(update={"model_params": fingerprint_fields(params) | told})


def make_task(dataset: Dataset, config: TrainConfig, patients: Sequence[Patient]) -> Task:
    """The task, with everything that is learnt from labels learnt from `patients` (the training part)."""
    return targets.task_of(dataset.outcomes, [p.target for p in patients if p.target is not None], config)


def cases(patients: Iterable[Patient], mpp: float) -> list[Case]:
    """Patients as the trainer sees them."""
    return [Case(p.id, p.slides, p.target, StoredBag(p.stores), mpp, of=p.of) for p in patients]


def train_fold(
    job: Job,
    dataset: Dataset,
    teacher: bundle.Bundle | None,
    out: Path,
    partial: Path,
    run: Path,
    weights_sha256: str | None = None,
    teacher_at: Path | None = None,
    evidence: Sequence[Pair] = (),
) -> tuple[str, ...]:
    """Train, going on from `partial` if an earlier run left a checkpoint there, and fill `out`. Returns notes.

    run: the run's folder, after which an experiment log is named. weights_sha256: of the file `train.pretrained`, as
    the training's fingerprint has it. teacher_at: the teacher's folder, whose history is the training's after a
    fallback. evidence: what plain models and students of inner folds say of whom they held out (`job.evidence`)."""
    config, fold, known = job.config, job.fold, dataset.by_id()
    facts = Facts.of(dataset.facts, "what the features say of themselves")  # before hours of work that end in a card
    train, val, test = ([known[p] for p in s if known[p].slides] for s in (fold.train, fold.val, fold.test))
    bare = [known[p] for p in fold.test if not known[p].slides]  # of a fusion: they have tables alone
    mpp = float(dataset.facts.get("mpp") or 0.0)
    # The published protocol cuts its bins over all patients, test included, and selects on the test fold.
    paper = config.protocol == "paper"
    task = make_task(dataset, config, [*train, *test] if paper else train)
    train_cases, val_cases = cases(train, mpp), cases(test if paper else val, mpp)

    def opened(form: str) -> AbstractContextManager[experiment_log.Log]:
        return experiment_log.opened(config.log, run, "/".join(filter(None, (job.cell, job.name, form))))

    found = forms.first_kept(
        config, job.seed, dataset.facts, task, teacher, (train_cases, val_cases), partial, opened, weights_sha256
    )
    model, state, begun = found.model, found.state, found.begun
    scale, weights = loop.scale_of(state), state["best"]["weights"]
    named: dict[str, Any] = {"model": config.model, "model_params": found.params}
    rows = [*predicted(model, "val", val_cases if not paper else [], task, scale)]
    module = lookup.find("mhim.mil.models", config.model)
    learnt = task.learnt([p.target for p in train if p.target is not None])
    rival, verdict = (teacher if kept.may_fall_back(config) else None), Verdict()
    if rival is not None:
        judged, at = found.judged, device(config.gpu)  # a form that was kept for fitting is not asked again
        why = None if judged else kept.alarm(model, rival, train_cases, task, scale, config, at)
        verdict = Verdict(why, kept.ALARM)
    if rival is not None and verdict.why is None:
        if kept.weighs(config):
            verdict = _weighed(rows, rival, val_cases, task, config, evidence)
        elif config.select == "best":
            validation = metrics_of(rows, task, _merged(operating_points(rows, task), learnt))
            verdict = Verdict(kept.outdone(validation, rival, task), kept.VALIDATION)
    why = verdict.why
    if why is not None and rival is not None:
        model, weights, scale = rival.model().to(device(config.gpu)), rival.weights, rival.scale
        named = {"model": rival.card.model, "model_params": rival.card.model_params}
        named["fallback"] = {"from": config.model, "by": verdict.by, "why": why, "epoch": state["best"]["epoch"] + 1}
        named |= {"epoch": rival.card.epoch, "epochs": rival.card.epochs}
        rows = [*predicted(model, "val", val_cases if not paper else [], task, scale)]
    if verdict.record is not None:
        named["choice"] = verdict.record.plain()
    points = _merged(operating_points(rows, task), learnt)
    rows += predicted(model, "test", cases(test, mpp), task, scale)
    rows += _middle(bare, rows, task)
    sizes = {"train": len(train), "val": len(val), "test": len(test)}
    card: dict[str, Any] = {
        "format": FORMAT,
        **{k: v for k, v in named.items() if k not in ("epoch", "epochs")},
        "in_dim": int(dataset.facts["dim"]),
        "task": task.to_json(),
        "features": facts,
        "made": dataset.made,
        "split": {"hash": job.split_hash, "repeat": fold.repeat, "fold": fold.fold, **sizes},
        "seed": job.seed,
        "protocol": config.protocol,
        "train": own_settings(config),
        "versions": bundle.versions(),
        "epoch": named.get("epoch", state["best"]["epoch"] + 1),  # of the model that is kept
        "epochs": named.get("epochs", state["epoch"] + 1),
        **{what: finite(metrics_of([r for r in rows if r["side"] == side], task, points)) for what, side in SIDES},
        **({"taught": True} if teacher else {}),
        **({} if begun is None else {"pretrained": begun}),
        **found.told,
        **({"standardized": state["judged"]} if "judged" in state else {}),
        **({"calibrated": own} if (own := getattr(model, "calibrated", dict[str, float])()) else {}),
        **points,
    }
    if isinstance(task, Several):
        card["targets"] = _of_targets(rows, task, points)
    profile = novelty.profile(c.load()[0] for c in train_cases)
    if profile is not None:
        farthest = novelty.limit(profile.distance(c.load()[0]) for c in cases([*val, *test], mpp))
        card |= {"unlike_from": farthest} if farthest is not None else {}
    bundle.write(out, Card.of(card, out / CARD), weights, scale, profile)
    (out / PREDICTIONS).write_text(tables.of_mappings(rows))
    (out / HISTORY).write_text(tables.of_mappings(state["history"]))
    if why is not None and teacher_at is not None:
        (out / HISTORY).write_bytes((teacher_at / HISTORY).read_bytes())
    notes = [f"the {one['form']} form is not kept: {one['why']}" for one in found.tried]
    notes += [f"the plain model is used instead: {why}"] if why else [verdict.note] if verdict.note else []
    if state.get("judged", {}).get("why"):
        notes.append(f"standardised: {state['judged']['why']}")
    if profile is not None and config.standardize is False and not getattr(module, "SCALES_ITSELF", False):
        notes += told_raw(profile.size)
    return tuple(notes)


def _weighed(
    rows: Sequence[dict[str, Any]],
    rival: bundle.Bundle,
    val: list[Case],
    task: Task,
    config: TrainConfig,
    evidence: Sequence[Pair],
) -> Verdict:
    """The verdict between the plain model and the student, whose `rows` of the validation cases `val` are given."""
    if evidence:
        return kept.weighed(evidence, task, kept.INNER, config)
    plain = predicted(rival.model().to(device(config.gpu)), "val", val, task, rival.scale)
    return kept.weighed([pair(task, plain, rows)] if plain else [], task, kept.VALIDATION, config)


def pair(task: Task, plain: Sequence[dict[str, Any]], student: Sequence[dict[str, Any]]) -> Pair:
    """What two models say of the same bags, from their prediction rows in any order."""
    own = {(r["patient"], r["slides"]): r for r in student}
    matched = [own[r["patient"], r["slides"]] for r in plain]
    owner = np.array([r["patient"] for r in plain])
    return Pair(task, task.truth(plain), logits_of(plain), logits_of(matched), owner)


def _middle(bare: Sequence[Patient], rows: Sequence[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Test rows of patients without slides, of whom the model knows nothing: the mean of what it says of validation."""
    val = [r for r in rows if r["side"] == "val"]
    mean = logits_of(val).mean(axis=0) if val else np.zeros(task.n_out)
    return [
        {
            "side": "test",
            "patient": p.id,
            "slides": "[]",
            **task.columns(p.target),
            **{f"logit_{k}": float(v) for k, v in enumerate(mean)},
        }
        for p in bare
    ]


def operating_points(rows: Sequence[dict[str, Any]], task: Task) -> dict[str, Any]:
    """What is fitted on validation and frozen, see `Task.points`; nothing without validation patients."""
    val = [r for r in rows if r["side"] == "val"]
    return task.points(task.truth(val), logits_of(val)) if val else {}


def logits_of(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """float64 (n, n_out) logits of prediction rows."""
    names = sorted((k for k in rows[0] if k.startswith("logit_")), key=lambda k: int(k.removeprefix("logit_")))
    return np.array([[float(r[k]) for k in names] for r in rows])


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The rows of a fold's `predictions.csv`, all values as text. Raises StoreError where they cannot be read."""
    file = folder / PREDICTIONS
    try:
        rows = tables.read(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise StoreError(reading.damage(file, str(error), inside=True)) from error
    if not rows and b"\0" in file.read_bytes():  # a hole of the disk, in which there is no line
        raise StoreError(reading.damage(file, "it holds zeros that were never written", inside=True))
    return rows


def read_side(folder: Path, side: str, target: str = "") -> list[dict[str, Any]]:
    """Those rows of the patients of one side: val or test. target: of several, as a run of it alone would have written
    them, of the patients whose cell is known."""
    return [row for row in read_target(folder, target) if row["side"] == side]


def read_target(folder: Path, target: str = "") -> list[dict[str, Any]]:
    """All rows, of one of several targets (see `read_side`) where one is named."""
    rows, task = read_predictions(folder), bundle.card_of(folder).task.value if target else None
    return task.view(target, rows) if isinstance(task, Several) else rows


def predicted(model: Any, side: str, of: Sequence[Case], task: Task, scale: Any) -> list[dict[str, Any]]:
    """Rows of `predictions.csv` of these cases: what the model says of each, on this side."""
    rows = []
    for p in loop.predict(model, of, task, scale):
        known = task.columns(p.case.target)
        logits = {f"logit_{k}": float(v) for k, v in enumerate(p.logits)}
        slides = json.dumps(list(p.case.slides))
        whose = {"patient": p.case.of, "unit": "slide"} if p.case.of else {"patient": p.case.patient}
        rows.append({"side": side, **whose, "slides": slides, **known, **logits})
    return rows


def metrics_of(rows: Sequence[dict[str, Any]], task: Task, points: dict[str, Any]) -> dict[str, float]:
    """Metrics of predictions, by what `points` holds."""
    return task.metrics(task.truth(rows), logits_of(rows), points) if rows else {}


def _of_targets(rows: Sequence[dict[str, Any]], task: Several, points: dict[str, Any]) -> dict[str, Any]:
    """What the card says of each of several targets."""
    found: dict[str, Any] = {name: dict(points["targets"][name]) for name in task.names}
    for what, side in SIDES:
        each = metrics_of_targets([r for r in rows if r["side"] == side], task, points)
        for name in task.names:
            found[name][what] = each.get(name, {})
    return found


def metrics_of_targets(rows: Sequence[dict[str, Any]], task: Task, points: dict[str, Any]) -> dict[str, Any]:
    """Metrics of each of several targets, as `metrics_of`; nothing of a single one."""
    if not isinstance(task, Several) or not rows:
        return {}
    return {k: finite(v) for k, v in task.metrics_of(task.truth(rows), logits_of(rows), points).items()}


def _merged(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Both, key by key also inside."""
    both = {k: _merged(one[k], two[k]) for k in one.keys() & two.keys() if isinstance(one[k], dict)}
    return one | two | both


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """NaN has no place in JSON: None says undefined."""
    return {k: v if math.isfinite(v) else None for k, v in values.items()}
