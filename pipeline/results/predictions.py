"""From trained folds to predictions: of the patients they held out, of new ones, and per tile.

In: the folders of a run's folds. Out: the rows of `predictions.csv`, one per patient and training, and the arrays of a
patient's scores. What is counted over the rows is in `numbers.py`. Knows nothing of stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhim.configs.schema import ScoreConfig
from mhim.mil import metrics, mining
from mhim.mil import train as loop
from mhim.mil.feed import Feed
from mhim.mil.tasks import Several, Task
from mhim.pipeline.cohort.patients import Patient, StoredBag
from mhim.pipeline.results import ensemble, measures
from mhim.pipeline.results.measures.measure import Measure, Place, place
from mhim.pipeline.store import layout
from mhim.pipeline.store.layout import StoreError
from mhim.pipeline.store.reading import array_names, read_array
from mhim.pipeline.training import bundle, fold, fusion_bundle, plan
from mhim.pipeline.training.card import Card

Row = dict[str, Any]
UNLIKE = (
    "features unlike those of all slides that the model was trained and tested on (other staining, scanner or "
    "tissue?): do not rely on its answer; a model for such slides must be trained on some"
)


def folds_of(run: Path) -> list[Path]:
    """Folders of the trainings that a run's results are made of; of a grid, the cell that validation chose per fold."""
    cells = layout.cells(run)
    if not cells:
        return bundle.find(run)
    cards = {str(cell): [bundle.card_of(f) for f in bundle.find(cell)] for cell in cells}
    chosen = plan.choose(cards, next(iter(cards.values()))[0].headline)
    return [f for cell in cells for f in bundle.find(cell) if chosen[bundle.card_of(f).place[:2]] == str(cell)]


def predictions(folders: Sequence[Path], config: ScoreConfig, target: str = "") -> tuple[list[Row], Task]:
    """One row per test patient and training: slides, patient, repeat, fold, seed, truth, probabilities or risk. target:
    which of several; of the patients whose cell is known."""
    rows: list[Row] = []
    task: Task | None = None
    for folder in folders:
        card = bundle.card_of(folder).seen_as(target)
        task = card.task.value
        measure = measures.of(task)
        test = fold.read_side(folder, "test", target)
        if target and not test:
            continue
        frozen = measure.frozen(card, partial(fold.read_side, folder, "val", target), config)
        for row, answer in zip(test, measure.answers(fold.logits_of(test), card, config), strict=True):
            rows.append(
                {
                    "slide": ";".join(json.loads(row["slides"])),
                    "patient": row["patient"],
                    **({"unit": row["unit"]} if "unit" in row else {}),
                    **_place(card),
                    **measure.known(row),
                    **measure.verdict(answer, frozen, card),
                }
            )
    if task is None and target:
        return [], bundle.card_of(folders[0]).seen_as(target).task.value
    if task is None:
        raise StoreError("no trained fold to score; run `pipeline train` first")
    return rows, task


def slide_scores(
    patient: Patient, models: Sequence[bundle.Bundle], gpu: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Slide id -> per-tile scores, averaged over `models` (for a run: those that have not trained on the patient).

    attention: float32 (n,), sums to one over the patient's slides. evidence: float32 (n, n_out), where the model has
    it, as `Task.of_tiles` gives it. hardness, masked: float32 (n,), of MHIM, see `mhim.mil.mining`. coords: int32
    (n, 2), level-0 px. logits: float32 (models, n_out), of the patient's whole bag. unlike: float32 (models,), see
    `Bundle.unlike`.
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
        if found.evidence is not None:
            evidence.append(one.task.of_tiles(found.evidence, found.scores, found.logits))
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


def each_of_new_slides(
    stage: Any, config: ScoreConfig, patients: dict[str, str] | None = None, target: str = ""
) -> list[Row]:
    """One row per patient and fold that scored it, as a run's own `predictions.csv` has them. target: of several.

    patients: slide -> patient, where each slide was scored alone (`score.several_slides`): a fold's answer for a
    patient is then the mean over the slides, or that of the most positive one (of several classes: the surest one).
    """
    groups: dict[str, list[tuple[Patient, np.ndarray]]] = {}
    unlike: dict[str, float] = {}  # of a patient's bags the strangest
    for bag in stage.data.patients:
        path = next((path for s in bag.slides if (path := stage.made(bag.id, s)) is not None), None)
        if not bag.slides:  # of a fusion: a patient of whom tables alone are at hand
            groups.setdefault(bag.id, []).append((bag, np.empty(0)))
        elif path is not None:  # else it failed, which the stage has told
            logits = read_array(path, "logits").astype(np.float64)  # (folds, n_out), the same in all slides of a bag
            name = (patients or {}).get(bag.id, bag.id)
            groups.setdefault(name, []).append((bag, logits))
            if "unlike" in array_names(path) and not math.isnan(far := strangeness(read_array(path, "unlike"))):
                unlike[name] = max(far, unlike.get(name, 0.0))
    each: dict[str, list[Row]] = {name: [] for name in groups}
    whole = {folder: bundle.card_of(folder) for folders in stage.models.values() for folder in folders}
    cards = {folder: card.seen_as(target) for folder, card in whole.items()}
    own = {f: _logits_of(card.task.value, target) for f, card in whole.items()}
    kinds = {f: measures.of(card.task.value) for f, card in cards.items()}
    frozen = {f: kinds[f].frozen(card, partial(fold.read_side, f, "val", target), config) for f, card in cards.items()}
    fusions = {f: fusion_bundle.read(f) for f in cards}
    for name, bags in groups.items():
        slides = ";".join(s for bag, _ in bags for s in bag.slides)
        # a fusion's network reads the bag once more, all folds the same arrays
        again = [cache(StoredBag(bag.stores)) for bag, logits in bags if len(logits)]
        of = bags[0][0].of  # where each slide is a bag
        whose = {"patient": of, "unit": "slide"} if of else {"patient": name}
        # every fold scores a new patient; one that the run knows is scored by those that held it out
        for k, folder in enumerate(stage.models[bags[0][0].id]):
            card, measure = cards[folder], kinds[folder]
            given, rest = [logits[k][own[folder]] for _, logits in bags if len(logits)], {}
            if (fusion := fusions[folder]) is not None:
                given, rest["modalities"] = fusion.of_bags(name, given or None, stage.tables, again)
            found = measure.answers(np.stack(given), card, config)
            verdict = measure.verdict(_joined(found, measure, config.several_slides), frozen[folder], card)
            strange = {"unlike": unlike[name]} if name in unlike else {}
            familiar = {"known": text} if (text := stage.known_as(bags[0][0].id)) else {}
            each[name].append({"slide": slides, **whose, **_place(card), **verdict, **rest, **strange, **familiar})
    return [row for members in each.values() for row in members]


def held_out_risks(folders: Sequence[Path], target: str = "") -> dict[Place, np.ndarray]:
    """Training -> risks of the patients it held out: what a new patient's risk is placed among, model by model."""
    made = {}
    for folder in folders:
        card = bundle.card_of(folder).seen_as(target)
        test = fold.read_side(folder, "test", target)
        if test:
            risks = card.task.value.risk(torch.from_numpy(fold.logits_of(test))).numpy()
            made[card.place] = risks
    return made


def of_new_slides(stage: Any, config: ScoreConfig, patients: dict[str, str] | None = None) -> list[Row]:
    """One row per patient out of `each_of_new_slides`: see `ensemble.ensemble`."""
    rows = each_of_new_slides(stage, config, patients)
    return together(rows, sorted({folder for folders in stage.models.values() for folder in folders}))


def _logits_of(task: Task, target: str) -> slice:
    """Which logits of a model are the target's."""
    return task.slices[target] if isinstance(task, Several) and target else slice(None)


def together(rows: Sequence[Row], folders: Sequence[Path], target: str = "") -> list[Row]:
    """One row per new patient out of those of all folds, without the columns that tell a single training."""
    task = bundle.card_of(folders[0]).seen_as(target).task.value
    known = held_out_risks(folders, target) if rows and measures.of(task).scale else {}
    # weights that were brought in know no patients: then new ones are placed among themselves
    complete = known if all(place(r) in known for r in rows) else None
    return [
        {k: v for k, v in row.items() if k not in ("repeat", "fold", "seed")}
        for row in ensemble.ensemble(rows, task, complete)
    ]


def _joined(found: Sequence[Row], measure: Measure, how: str) -> Row:
    """One answer out of those of a patient's slides, each scored alone."""
    if how == "mean" and len(found) > 1:
        return {k: float(np.mean([row[k] for row in found])) for k in found[0]}
    return max(found, key=measure.sure)


def cell_table(run: Path) -> list[str]:
    """One line per grid cell: mean ± sd of the headline metric on validation, and in how many folds it was chosen."""
    cells = layout.cells(run)
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


def _place(card: Card) -> Row:
    return dict(zip(("repeat", "fold", "seed"), card.place, strict=True))
