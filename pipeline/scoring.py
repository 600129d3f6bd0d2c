"""From trained folds to numbers: out-of-fold predictions, metrics with intervals, per-tile scores.

In: the folders of a run's folds. Out: the rows of `predictions.csv`, the content of `metrics.json`, the arrays of a
patient's scores. Every number carries the hash of the split, the unit (patient), and how many folds and seeds it is
of. Knows nothing of stages.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import ScoreConfig
from mil import metrics, mining, tasks
from mil import train as loop
from mil.feed import Feed
from mil.tasks import Task
from pipeline import bundle, decide, grid, risk, training
from pipeline.cases import Patient, StoredBag
from pipeline.store import StoreError, array_names, read_array, stored

Row = dict[str, Any]
UNLIKE = ("features unlike those of all slides that the model was trained and tested on (other staining, scanner or "
          "tissue?): do not rely on its answer; a model for such slides must be trained on some")
AVERAGED = ("risk", "risk_threshold", "threshold", "undecided_from", "undecided_to")


def folds_of(run: Path) -> list[Path]:
    """Folders of the trainings that a run's results are made of; of a grid, the cell that validation chose per fold."""
    cells = sorted({p.parent.parent for p in run.glob(f"grid/*/*/{bundle.CARD}")})
    if not cells:
        return bundle.find(run)
    cards = {str(cell): [_card(f) for f in bundle.find(cell)] for cell in cells}
    headline = "c_index" if next(iter(cards.values()))[0]["task"]["kind"] != "classification" else "auc"
    chosen = grid.choose(cards, headline)
    return [f for cell in cells for f in bundle.find(cell) if chosen[_place(_card(f))] == str(cell)]


def predictions(folders: Sequence[Path], config: ScoreConfig) -> tuple[list[Row], Task]:
    """One row per test patient and training: slides, patient, repeat, fold, seed, truth, probabilities or risk."""
    rows: list[Row] = []
    task: Task | None = None
    for folder in folders:
        card = _card(folder)
        task = tasks.from_json(card["task"])
        test = [r for r in training.read_predictions(folder) if r["side"] == "test"]
        at = decide.point(folder, card, task, config)
        for row, answer in zip(test, answers(training.logits_of(test), task, card, config), strict=True):
            rows.append({"slide": ";".join(json.loads(row["slides"])), "patient": row["patient"],
                         "repeat": card["split"]["repeat"], "fold": card["split"]["fold"], "seed": card["seed"],
                         **_truth(row, task), **answer, **decide.columns(at, _positive(answer, task), task.classes),
                         **_group(card, task)})
    if task is None:
        raise StoreError("no trained fold to score; run `pipeline train` first")
    return rows, task


def answers(logits: np.ndarray, task: Task, card: dict[str, Any], config: ScoreConfig) -> list[Row]:
    """Logits (n, n_out) as what a person reads: one probability per class; for survival the risk, and for the
    discrete form the probability of being event-free after each time bin."""
    scaled = torch.from_numpy(logits)
    if not task.survival:
        if config.calibrate:
            scaled = scaled / card.get("temperature", 1.0)
        p = task.probabilities(scaled).numpy()
        return [{f"p_{name}": float(v) for name, v in zip(task.classes, row, strict=True)} for row in p]
    rows: list[Row] = [{"risk": float(r)} for r in task.risk(scaled).numpy()]
    if task.kind == "nll":
        for row, curve in zip(rows, task.survival_curve(scaled).numpy(), strict=True):
            row |= {f"free_after_bin_{k}": float(v) for k, v in enumerate(curve)}
    return rows


def summary(folders: Sequence[Path], rows: Sequence[Row], task: Task, config: ScoreConfig) -> dict[str, Any]:
    """The content of `metrics.json`."""
    cards = [_card(f) for f in folders]
    per_fold = []
    for folder, card in zip(folders, cards, strict=True):
        own = [r for r in rows if (r["repeat"], r["fold"], r["seed"]) == (*_place(card), card["seed"])]
        values = measure(own, task, _horizons(card), _threshold(card, config))
        per_fold.append({"repeat": card["split"]["repeat"], "fold": card["split"]["fold"], "seed": card["seed"],
                         "patients": len(own), "epoch": card["epoch"],
                         "cell": folder.parent.name if folder.parent.parent.name == "grid" else "",
                         **({"fallback": card["fallback"]} if "fallback" in card else {}), "metrics": values})
    pooled = ensemble(rows)
    # each fold has its own horizons, from its training part; the pooled patients are looked at in their mean
    horizons = np.mean([_horizons(c) for c in cards], axis=0).tolist() if task.survival else []

    def of_rows(drawn: np.ndarray) -> metrics.Metrics:
        return measure([pooled[i] for i in drawn], task, horizons, None)

    interval = metrics.bootstrap(of_rows, len(pooled), config.bootstrap, config.confidence)
    over = metrics.over_folds([f["metrics"] for f in per_fold])
    hashes = sorted({c["split"]["hash"] for c in cards})
    found: dict[str, Any] = {
        "unit": "patient", "patients": len(pooled), "model": cards[0]["model"], "task": task.to_json(),
        "headline": task.headline, "split_hash": hashes[0] if len(hashes) == 1 else hashes,
        "folds": len({_place(c) for c in cards}), "seeds": len({c["seed"] for c in cards}),
        "protocol": cards[0]["protocol"], "features": cards[0]["features"],
        "warnings": _missing(folders, cards) + _warnings(cards, task),
        "over_folds": {k: {"mean": m, "sd": sd, "n": n} for k, (m, sd, n) in over.items()},
        "test": {k: asdict(v) for k, v in interval.items()}, "confidence": config.confidence,
        "bootstrap": config.bootstrap, "per_fold": per_fold,
    }
    if task.survival:
        found["log_rank_p"] = risk.log_rank(pooled)
    else:
        found["confusion"] = confusion(pooled, task)
        found["decisions"] = decide.counts(pooled, task.classes)
        found["reliability"] = {name: _reliability(folders, task, config.model_copy(update={"calibrate": scaled}))
                                for name, scaled in (("before", False), ("after", True))}
    plain: dict[str, Any] = _no_nan(found)
    return plain


def ensemble(rows: Sequence[Row]) -> list[Row]:
    """One row per patient: probabilities, risks and thresholds averaged over seeds and repetitions, the decision made
    anew from them. spread: standard deviation of the positive class's probability (or the risk) over the trainings."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["patient"], []).append(row)
    made = []
    for members in groups.values():
        row = dict(members[0])
        for key in row:
            if key in AVERAGED or key.startswith(("p_", "free_after_bin_")):
                row[key] = float(np.mean([m[key] for m in members]))
        classes = [k.removeprefix("p_") for k in row if k.startswith("p_")]
        if "decision" in row:
            row["decision"] = decide.called(row[f"p_{classes[1]}"], row, classes)
        of = f"p_{classes[-1]}" if classes else "risk"
        row["spread"] = float(np.std([m[of] for m in members], ddof=1)) if len(members) > 1 else None
        made.append(row)
    return made


def confusion(rows: Sequence[Row], task: Task) -> list[list[int]]:
    """counts[true class][most probable class] over patients."""
    counts = [[0] * len(task.classes) for _ in task.classes]
    for row in rows:
        p = [row[f"p_{c}"] for c in task.classes]
        counts[task.classes.index(row["label"])][p.index(max(p))] += 1
    return counts


def slide_scores(
    patient: Patient, models: Sequence[bundle.Bundle], gpu: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Slide id -> per-tile scores, averaged over `models` (for a run: those that have not trained on the patient).

    attention: float32 (n,), sums to one over the patient's slides. evidence: float32 (n, n_out), where the model has
    it. hardness, masked: float32 (n,), of MHIM, see `mil.mining`. coords: int32 (n, 2), level-0 px.
    logits: float32 (models, n_out), of the patient's whole bag. unlike: float32 (models,), see `Bundle.unlike`.
    """
    logits, attention, evidence, unlike = [], [], [], []
    hidden: dict[str, list[np.ndarray]] = {}
    case = training.cases([patient], float(models[0].card["features"].get("mpp") or 0.0))
    features = case[0].load()[0]
    for one in models:
        model = one.model().to(training.device(gpu))
        with loop.isolated(None, training.device(gpu), one.card["train"]["threads"]):
            (found,) = loop.predict(model, case, one.task, one.scale)
            feed = Feed(case, one.task, training.device(gpu), scale=one.scale)
            for name, values in mining.of(model, feed.batch([0]).bag).items():
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
        made[slide] = part | {"coords": np.array(coords), "logits": np.stack(logits),
                              "unlike": np.array(unlike, np.float32)}
        first += len(coords)
    return made


def strangeness(unlike: np.ndarray) -> float:
    """One number out of `unlike` of several models: their mean, NaN where none knows. Above 1 a bag is unlike all that
    they were trained and tested on."""
    known = unlike[np.isfinite(unlike)]
    return float(known.mean()) if len(known) else math.nan


def of_new_slides(stage: Any, config: ScoreConfig, patients: dict[str, str] | None = None) -> list[Row]:
    """One row per patient scored by all folds: the folds' probabilities (or risks), averaged.

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
    cards = {folder: _card(folder) for folders in stage.models.values() for folder in folders}
    points = {f: decide.point(f, card, tasks.from_json(card["task"]), config) for f, card in cards.items()}
    for name, bags in groups.items():
        slides = ";".join(s for bag, _ in bags for s in bag.slides)
        # every fold scores a new patient; one that the run knows is scored by those that held it out
        for k, folder in enumerate(stage.models[bags[0][0].id]):
            card = cards[folder]
            task = tasks.from_json(card["task"])
            found = answers(np.stack([logits[k] for _, logits in bags]), task, card, config)
            answer = _joined(found, task, config.several_slides)
            verdict = decide.columns(points[folder], _positive(answer, task), task.classes) | _group(card, task)
            strange = {"unlike": unlike[name]} if name in unlike else {}
            familiar = {"known": text} if (text := stage.known_as(bags[0][0].id)) else {}
            each[name].append({"slide": slides, "patient": name, **answer, **verdict, **strange, **familiar})
    return [row for members in each.values() for row in ensemble(members)]


def _joined(found: Sequence[Row], task: Task, how: str) -> Row:
    """One answer out of those of a patient's slides, each scored alone."""
    if how == "mean" and len(found) > 1:
        return {k: float(np.mean([row[k] for row in found])) for k in found[0]}
    several = [f"p_{c}" for c in task.classes] if len(task.classes) > 2 else []
    return max(found, key=lambda row: max(row[k] for k in several) if several else _positive(row, task))


def cell_table(run: Path) -> list[str]:
    """One line per grid cell: mean ± sd of the headline metric on validation, and in how many folds it was chosen."""
    cells = sorted({p.parent.parent for p in run.glob(f"grid/*/*/{bundle.CARD}")})
    chosen = [f.parent for f in folds_of(run)] if cells else []
    made = []
    for cell in cells:
        cards = [_card(f) for f in bundle.find(cell)]
        headline = "c_index" if cards[0]["task"]["kind"] != "classification" else "auc"
        values = [c["validation"].get(headline) for c in cards]
        mean, sd, n = metrics.over_folds([{"v": math.nan if v is None else v} for v in values])["v"]
        made.append(f"{cell.name}: validation {headline} {mean:.3f} ± {sd:.3f} ({n} trainings), "
                    f"chosen {chosen.count(cell)} times")
    return made


def lines(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, mean ± sd over folds, pooled value with interval) for a table."""
    made = []
    for name, over in found["over_folds"].items():
        pooled = found["test"].get(name)
        mean = "undefined" if over["mean"] is None else f"{over['mean']:.3f}" + (
            f" ± {over['sd']:.3f}" if over["sd"] is not None else "")
        whole = ""
        if pooled and pooled["value"] is not None:
            whole = f"{pooled['value']:.3f}"
            whole += f" [{pooled['low']:.3f}, {pooled['high']:.3f}]" if pooled["low"] is not None else ""
        made.append((name, mean, whole))
    return made


def measure(rows: Sequence[Row], task: Task, horizons: Sequence[float], threshold: float | None) -> metrics.Metrics:
    """All metrics of prediction rows that carry their truth; survival adds the AUC at each horizon."""
    if task.survival:
        time, event, told = (np.array([r[k] for r in rows], dtype=np.float64) for k in ("time", "event", "risk"))
        return metrics.survival(time, event, told, horizons)
    labels = np.array([task.classes.index(r["label"]) for r in rows])
    p = np.array([[r[f"p_{c}"] for c in task.classes] for r in rows])
    return metrics.classification(labels, p, threshold)


def calibration(rows: Sequence[Row], task: Task) -> dict[str, Any]:
    """How far the probabilities of labelled rows can be believed."""
    labels = np.array([task.classes.index(r["label"]) for r in rows])
    return decide.reliability(labels, np.array([[r[f"p_{c}"] for c in task.classes] for r in rows]))


def _group(card: dict[str, Any], task: Task) -> Row:
    """What divides high from low risk; nothing where there are classes."""
    return {"risk_threshold": float(card.get("risk_threshold", math.nan))} if task.survival else {}


def _threshold(card: dict[str, Any], config: ScoreConfig) -> float | None:
    """The frozen operating point; it was found on calibrated probabilities."""
    return card.get("threshold") if config.calibrate else None


def _horizons(card: dict[str, Any]) -> list[float]:
    return list(card.get("horizons", []))


def _missing(folders: Sequence[Path], cards: Sequence[dict[str, Any]]) -> list[str]:
    """Folds of the splits that have no model: their patients are in no number."""
    file = next((p / "splits.csv" for p in folders[0].parents[:3] if (p / "splits.csv").exists()), None)
    if file is None:
        return []  # weights that were brought in
    with open(file, newline="") as f:
        wanted = {(int(r["repeat"]), int(r["fold"])) for r in csv.DictReader(f)}
    seeds = {c["seed"] for c in cards}
    lacking = sorted((*place, s) for place in wanted for s in seeds - {c["seed"] for c in cards if _place(c) == place})
    if not lacking:
        return []
    told = ", ".join(f"fold {fold}" + (f" of repetition {repeat}" if repeat else "") + f" with seed {seed}"
                     for repeat, fold, seed in lacking[:5]) + (" ..." if len(lacking) > 5 else "")
    return [f"{len(lacking)} of {len(wanted) * len(seeds)} trainings are missing ({told}): they failed or were never "
            "made, and the patients that only they held out are in no number here"]


def _warnings(cards: Sequence[dict[str, Any]], task: Task) -> list[str]:
    """What a reader must know before believing the numbers."""
    said = []
    if cards[0]["protocol"] == "paper":
        said.append("optimistic: the epoch was chosen on the test fold (train.protocol=paper)")
    if len({c["seed"] for c in cards}) == 1:
        what = "C-index" if task.survival else "AUC"
        said.append(f"one seed: differences of about one point of {what} between models mean nothing")
    fallen = [c for c in cards if "fallback" in c]
    if fallen:
        why = fallen[0]["fallback"]["why"]
        said.append(f"{len(fallen)} of {len(cards)} trainings fell back to the plain model: {why}")
    return said


def _positive(answer: Row, task: Task) -> float:
    return float(answer["risk"]) if task.survival else float(answer[f"p_{task.classes[-1]}"])


def _reliability(folders: Sequence[Path], task: Task, config: ScoreConfig) -> dict[str, Any]:
    """Calibration of the held-out patients, before or after the temperature of their fold."""
    rows = ensemble(predictions(folders, config)[0])
    return calibration(rows, task)


def _truth(row: Row, task: Task) -> Row:
    if task.survival:
        return {"time": float(row["time"]), "event": int(float(row["event"]))}
    return {"label": task.classes[int(row["target"])]}


def _card(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = bundle.card_of(folder)
    return card


def _place(card: dict[str, Any]) -> tuple[int, int]:
    return card["split"]["repeat"], card["split"]["fold"]


def _no_nan(value: Any) -> Any:
    """NaN has no place in JSON: None says undefined."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_no_nan(v) for v in value]
    return value
