"""From trained folds to predictions: of the patients they held out, of new ones, and per tile.

In: the folders of a run's folds. Out: the rows of `predictions.csv`, one per patient and training, and the arrays of a
patient's scores. What is counted over the rows is in `numbers.py`. Knows nothing of stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhim.configs.schema import ScoreConfig
from mhim.mil import metrics, mining
from mhim.mil import train as loop
from mhim.mil.feed import Feed
from mhim.mil.tasks import Nll, Task
from mhim.pipeline.cohort.patients import Patient, StoredBag
from mhim.pipeline.results import ensemble, estimand, operating_point
from mhim.pipeline.store.layout import CARD, StoreError
from mhim.pipeline.store.reading import array_names, read_array, stored
from mhim.pipeline.training import bundle, fold, plan
from mhim.pipeline.training.card import Card

Row = dict[str, Any]
UNLIKE = (
    "features unlike those of all slides that the model was trained and tested on (other staining, scanner or "
    "tissue?): do not rely on its answer; a model for such slides must be trained on some"
)


def folds_of(run: Path) -> list[Path]:
    """Folders of the trainings that a run's results are made of; of a grid, the cell that validation chose per fold."""
    cells = sorted({p.parent.parent for p in run.glob(f"grid/*/*/{CARD}")})
    if not cells:
        return bundle.find(run)
    cards = {str(cell): [bundle.card_of(f) for f in bundle.find(cell)] for cell in cells}
    chosen = plan.choose(cards, next(iter(cards.values()))[0].headline)
    return [f for cell in cells for f in bundle.find(cell) if chosen[bundle.card_of(f).place[:2]] == str(cell)]


def predictions(folders: Sequence[Path], config: ScoreConfig) -> tuple[list[Row], Task]:
    """One row per test patient and training: slides, patient, repeat, fold, seed, truth, probabilities or risk."""
    rows: list[Row] = []
    task: Task | None = None
    for folder in folders:
        card = bundle.card_of(folder)
        task = card.task.value
        test = [r for r in fold.read_predictions(folder) if r["side"] == "test"]
        at = operating_point.point(folder, card, task, config)
        for row, answer in zip(test, answers(fold.logits_of(test), task, card, config), strict=True):
            rows.append(
                {
                    "slide": ";".join(json.loads(row["slides"])),
                    "patient": row["patient"],
                    **_place(card),
                    **_truth(row, task),
                    **_verdict(answer, at, card, task),
                }
            )
    if task is None:
        raise StoreError("no trained fold to score; run `pipeline train` first")
    return rows, task


def answers(logits: np.ndarray, task: Task, card: Card, config: ScoreConfig) -> list[Row]:
    """Logits (n, n_out) as what a person reads: one probability per class; for survival the risk, and for the
    discrete form the probability of being event-free after each time bin."""
    scaled = torch.from_numpy(logits)
    if not task.survival:
        if config.calibrate:
            scaled = scaled / card.softening
        p = task.probabilities(scaled).numpy()
        return [{f"p_{name}": float(v) for name, v in zip(task.classes, row, strict=True)} for row in p]
    rows: list[Row] = [{"risk": float(r)} for r in task.risk(scaled).numpy()]
    if isinstance(task, Nll):
        for row, curve in zip(rows, task.survival_curve(scaled).numpy(), strict=True):
            row |= {f"free_after_bin_{k}": float(v) for k, v in enumerate(curve)}
    return rows


def slide_scores(
    patient: Patient, models: Sequence[bundle.Bundle], gpu: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Slide id -> per-tile scores, averaged over `models` (for a run: those that have not trained on the patient).

    attention: float32 (n,), sums to one over the patient's slides. evidence: float32 (n, n_out), where the model has
    it. hardness, masked: float32 (n,), of MHIM, see `mhim.mil.mining`. coords: int32 (n, 2), level-0 px.
    logits: float32 (models, n_out), of the patient's whole bag. unlike: float32 (models,), see `Bundle.unlike`.
    """
    logits, attention, evidence, unlike = [], [], [], []
    hidden: dict[str, list[np.ndarray]] = {}
    case = fold.cases([patient], float(models[0].card.features.mpp or 0.0))
    features = case[0].load()[0]
    for one in models:
        model = one.model().to(fold.device(gpu))
        with loop.isolated(None, fold.device(gpu), one.card.train["threads"]):
            (found,) = loop.predict(model, case, one.task, one.scale)
            feed = Feed(case, one.task, fold.device(gpu), scale=one.scale)
            for name, values in mining.of(model, feed.batch([0]).bag, one.task).items():
                hidden.setdefault(name, []).append(values)
        logits.append(found.logits)
        unlike.append(one.unlike(features))
        attention.append(found.scores)
        evidence += [found.evidence] if found.evidence is not None else []
    arrays = {"attention": np.stack(attention).mean(axis=0)}
    if evidence:
        arrays["evidence"] = np.stack(evidence).mean(axis=0)
    arrays |= {name: np.stack(values).mean(axis=0) for name, values in hidden.items()}
    made, first = {}, 0
    for slide, path in zip(patient.slides, patient.stores, strict=True):
        coords = StoredBag((path,))()[1]
        part = {k: v[first : first + len(coords)] for k, v in arrays.items()}
        made[slide] = part | {
            "coords": np.array(coords),
            "logits": np.stack(logits),
            "unlike": np.array(unlike, np.float32),
        }
        first += len(coords)
    return made


def strangeness(unlike: np.ndarray) -> float:
    """One number out of `unlike` of several models: their mean, NaN where none knows. Above 1 a bag is unlike all that
    they were trained and tested on."""
    known = unlike[np.isfinite(unlike)]
    return float(known.mean()) if len(known) else math.nan


def each_of_new_slides(stage: Any, config: ScoreConfig, patients: dict[str, str] | None = None) -> list[Row]:
    """One row per patient and fold that scored it, as a run's own `predictions.csv` has them.

    patients: slide -> patient, where each slide was scored alone (`score.several_slides`): a fold's answer for a
    patient is then the mean over the slides, or that of the most positive one (of several classes: the surest one).
    """
    groups: dict[str, list[tuple[Patient, np.ndarray]]] = {}
    unlike: dict[str, float] = {}  # of a patient's bags the strangest
    for bag in stage.data.patients:
        path = next((p for s in bag.slides if stored(p := stage.out / "scores" / f"{s}.zarr") is not None), None)
        if path is not None:  # else it failed, which the stage has told
            logits = read_array(path, "logits").astype(np.float64)  # (folds, n_out), the same in all slides of a bag
            name = (patients or {}).get(bag.id, bag.id)
            groups.setdefault(name, []).append((bag, logits))
            if "unlike" in array_names(path) and not math.isnan(far := strangeness(read_array(path, "unlike"))):
                unlike[name] = max(far, unlike.get(name, 0.0))
    each: dict[str, list[Row]] = {name: [] for name in groups}
    cards = {folder: bundle.card_of(folder) for folders in stage.models.values() for folder in folders}
    points = {f: operating_point.point(f, card, card.task.value, config) for f, card in cards.items()}
    for name, bags in groups.items():
        slides = ";".join(s for bag, _ in bags for s in bag.slides)
        # every fold scores a new patient; one that the run knows is scored by those that held it out
        for k, folder in enumerate(stage.models[bags[0][0].id]):
            card = cards[folder]
            task = card.task.value
            found = answers(np.stack([logits[k] for _, logits in bags]), task, card, config)
            verdict = _verdict(_joined(found, task, config.several_slides), points[folder], card, task)
            strange = {"unlike": unlike[name]} if name in unlike else {}
            familiar = {"known": text} if (text := stage.known_as(bags[0][0].id)) else {}
            each[name].append({"slide": slides, "patient": name, **_place(card), **verdict, **strange, **familiar})
    return [row for members in each.values() for row in members]


def held_out_risks(folders: Sequence[Path]) -> dict[estimand.Place, np.ndarray]:
    """Training -> risks of the patients it held out: what a new patient's risk is placed among, model by model."""
    made = {}
    for folder in folders:
        card = bundle.card_of(folder)
        test = [r for r in fold.read_predictions(folder) if r["side"] == "test"]
        if test:
            risks = card.task.value.risk(torch.from_numpy(fold.logits_of(test))).numpy()
            made[card.place] = risks
    return made


def of_new_slides(stage: Any, config: ScoreConfig, patients: dict[str, str] | None = None) -> list[Row]:
    """One row per patient out of `each_of_new_slides`: see `ensemble.ensemble`."""
    rows = each_of_new_slides(stage, config, patients)
    return together(rows, sorted({folder for folders in stage.models.values() for folder in folders}))


def together(rows: Sequence[Row], folders: Sequence[Path]) -> list[Row]:
    """One row per new patient out of those of all folds, without the columns that tell a single training."""
    known = held_out_risks(folders) if rows and "risk" in rows[0] else {}
    # weights that were brought in know no patients: then new ones are placed among themselves
    complete = known if all(estimand.place(r) in known for r in rows) else None
    return [
        {k: v for k, v in row.items() if k not in ("repeat", "fold", "seed")}
        for row in ensemble.ensemble(rows, complete)
    ]


def _joined(found: Sequence[Row], task: Task, how: str) -> Row:
    """One answer out of those of a patient's slides, each scored alone."""
    if how == "mean" and len(found) > 1:
        return {k: float(np.mean([row[k] for row in found])) for k in found[0]}
    several = [f"p_{c}" for c in task.classes] if len(task.classes) > 2 else []
    return max(found, key=lambda row: max(row[k] for k in several) if several else _positive(row, task))


def cell_table(run: Path) -> list[str]:
    """One line per grid cell: mean ± sd of the headline metric on validation, and in how many folds it was chosen."""
    cells = sorted({p.parent.parent for p in run.glob(f"grid/*/*/{CARD}")})
    chosen = [f.parent for f in folds_of(run)] if cells else []
    made = []
    for cell in cells:
        cards = [bundle.card_of(f) for f in bundle.find(cell)]
        headline = cards[0].headline
        values = [c.validation.get(headline) for c in cards]
        mean, sd, n = metrics.over_folds([{"v": math.nan if v is None else v} for v in values])["v"]
        made.append(
            f"{cell.name}: validation {headline} {mean:.3f} ± {sd:.3f} ({n} trainings), "
            f"chosen {chosen.count(cell)} times"
        )
    return made


def calibration(rows: Sequence[Row], task: Task) -> dict[str, Any]:
    """How far the probabilities of labelled rows can be believed."""
    labels = np.array([task.classes.index(r["label"]) for r in rows])
    return operating_point.reliability(labels, np.array([[r[f"p_{c}"] for c in task.classes] for r in rows]))


def _verdict(answer: Row, at: operating_point.Point | None, card: Card, task: Task) -> Row:
    """An answer with what it decides: a class by the frozen rule, or the risk that divides high from low."""
    if task.survival:
        return {**answer, "risk_threshold": math.nan if card.risk_threshold is None else float(card.risk_threshold)}
    found = answer | operating_point.columns(at, _positive(answer, task), task.classes)
    return found | {"decision": operating_point.called(found, task.classes)}


def _positive(answer: Row, task: Task) -> float:
    return float(answer["risk"]) if task.survival else float(answer[f"p_{task.classes[-1]}"])


def _truth(row: Row, task: Task) -> Row:
    if task.survival:
        return {"time": float(row["time"]), "event": int(float(row["event"]))}
    return {"label": task.classes[int(row["target"])]}


def _place(card: Card) -> Row:
    return dict(zip(("repeat", "fold", "seed"), card.place, strict=True))
