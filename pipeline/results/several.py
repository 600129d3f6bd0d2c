"""A run with several targets: each target's results as of a run of it alone, and the numbers of all together.

In: the trained folds. Out: `targets/<name>/predictions.csv` and `metrics.json` of each target, and the content of the
run's own `metrics.json`: the mean of the targets' headlines, and where every target has two classes (multilabel) macro
and micro AUC and AUPRC, from the same draws of patients. A target's own headline stands beside them with the interval
of its own file, drawn among the patients whose cell is known: one number, one interval.

- headline: mean over the targets whose headline is defined, each no lower than -1, as the task takes it. macro: mean
  over the labels.
- micro: the cells of all labels as one list, pairs inside each training (AUC), mean over trainings (AUPRC): the
  probabilities of one model's labels are on one scale, those of two models are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import ScoreConfig
from mhim.mil import estimators, metrics, resampling
from mhim.mil.tasks import WORST, Several, Task
from mhim.pipeline.results import estimand, measures, numbers, predictions, views
from mhim.pipeline.results.measures.measure import Answers, Row, Training, added, bag_of, mean, of_slides, place
from mhim.pipeline.results.metrics_file import METRICS, Metrics
from mhim.pipeline.store import layout, tables
from mhim.pipeline.training import bundle, fold
from mhim.pipeline.training.card import Card

Rows = Mapping[str, tuple[Sequence[Row], Task]]


def write(out: Path, folders: Sequence[Path], config: ScoreConfig) -> dict[str, tuple[list[Row], Task]]:
    """Fill `out` with the results of every target and of all together. Returns the rows and task of each target."""
    whole = bundle.card_of(folders[0]).task.value
    assert isinstance(whole, Several)
    found: dict[str, tuple[list[Row], Task]] = {}
    each: dict[str, Metrics] = {}
    for name in whole.names:
        rows, task = predictions.predictions(folders, config, name)
        if not rows:
            continue
        folder = views.View(out, name).folder
        folder.mkdir(parents=True)
        (folder / fold.PREDICTIONS).write_text(tables.of_mappings(rows))
        each[name] = numbers.summary(folders, rows, task, config, name)
        (folder / METRICS).write_text(each[name].text())
        found[name] = rows, task
    if not found:
        raise layout.StoreError("no held-out patient has a known target; label more patients")
    (out / fold.PREDICTIONS).write_text(tables.of_mappings(_wide(found)))
    (out / METRICS).write_text(summary(folders, found, each, whole, config).text())
    return found


def summary(
    folders: Sequence[Path], rows: Rows, each: Mapping[str, Metrics], task: Several, config: ScoreConfig
) -> Metrics:
    """The content of the run's own `metrics.json`. each: those of the targets."""
    cards = [bundle.card_of(f) for f in folders]
    metric, patients, strata, clusters = together(rows)
    told = resampling.intervals(metric, len(patients), config.bootstrap, config.confidence, strata, clusters=clusters)
    own = {f"{name}.{one.headline}": one.test[one.headline].plain() for name, one in each.items()}
    hashes = sorted({c.split.hash for c in cards})
    per_fold = [_per_fold(f, card, rows, each) for f, card in zip(folders, cards, strict=True)]
    over = metrics.over_folds([one["metrics"] for one in per_fold])
    lacking = [name for name in task.names if name not in rows]
    made: dict[str, Any] = {
        "numbers": layout.NUMBERS,
        **numbers.of_what(len(patients), clusters),
        "targets": {name: found.patients for name, found in each.items()},
        "model": cards[0].asked,
        "task": task.to_json(),
        "headline": task.headline,
        "split_hash": hashes[0] if len(hashes) == 1 else hashes,
        "folds": len({c.place[:2] for c in cards}),
        "seeds": len({c.seed for c in cards}),
        "trainings": len(cards),
        "protocol": cards[0].protocol,
        "features": cards[0].features.plain(),
        "warnings": [
            *(f"{name}: no held-out patient has it: it has no numbers" for name in lacking),
            *(f"{name}: {line}" for name, found in each.items() for line in found.warnings),
        ],
        "over_folds": {k: {"mean": m, "sd": sd, "n": n} for k, (m, sd, n) in over.items()},
        "test": {k: asdict(v) for k, v in told.items()} | own,
        "confidence": config.confidence,
        "bootstrap": config.bootstrap,
        "per_fold": per_fold,
        "choices": numbers.chosen(folders, cards).plain(),
    }
    return Metrics.of(numbers.no_nan(made), METRICS)


def _per_fold(folder: Path, card: Card, rows: Rows, each: Mapping[str, Metrics]) -> dict[str, Any]:
    """One training's headlines, as each target's own file has them, and their mean."""
    repeat, fold_, seed = card.place
    heads: dict[str, float] = {}
    for name, found in each.items():
        own = (f for f in found.per_fold if (f.repeat, f.fold, f.seed) == card.place)
        value = next((f.metrics.get(found.headline) for f in own), None)
        heads[f"{name}.{found.headline}"] = math.nan if value is None else value
    known = [max(v, WORST) for v in heads.values() if math.isfinite(v)]
    return {
        "repeat": repeat,
        "fold": fold_,
        "seed": seed,
        **numbers.sizes_of(r for own, _ in rows.values() for r in own if place(r) == card.place),
        "epoch": card.epoch,
        "cell": numbers.cell_of(folder),
        **({"fallback": card.fallback.plain()} if card.fallback else {}),
        **({"choice": card.choice.plain()} if card.choice else {}),
        "metrics": {"headline": sum(known) / len(known) if known else math.nan, **heads},
    }


def together(rows: Rows) -> tuple[Any, list[str], np.ndarray, np.ndarray | None]:
    """The numbers of all targets as a function of weights (D, patients); the patients, the stratum of each, and where
    they are slides, whose each is."""
    found = {name: estimand.answers(own, task) for name, (own, task) in rows.items()}
    stratum: dict[str, int] = {}
    for one in found.values():
        stratum |= {p: int(s) for p, s in zip(one.patients, one.strata, strict=True) if p not in stratum}
    patients = sorted(stratum)
    at = {p: k for k, p in enumerate(patients)}
    places = {name: np.array([at[p] for p in one.patients]) for name, one in found.items()}
    labels = all(
        measures.of(one.task).question == "classification" and len(one.task.classes) == 2 for one in found.values()
    )

    def metric(weights: np.ndarray) -> dict[str, np.ndarray]:
        values = {name: estimand.values(one, weights[:, places[name]]) for name, one in found.items()}
        heads = {name: values[name][one.task.headline] for name, one in found.items()}
        made = {"headline": mean([np.maximum(head, WORST) for head in heads.values()])}
        if labels:
            made |= {f"macro_{k}": mean([v[k] for v in values.values()]) for k in ("auc", "auprc")}
            made |= _micro(found, places, weights)
        return made | {f"{name}.{found[name].task.headline}": head for name, head in heads.items()}

    owner = {bag_of(r): r["patient"] for own, _ in rows.values() for r in own if of_slides(r)}
    clusters = np.unique([owner[p] for p in patients], return_inverse=True)[1] if owner else None
    return metric, patients, np.array([stratum[p] for p in patients]), clusters


def _micro(
    found: Mapping[str, Answers], places: Mapping[str, np.ndarray], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """micro_auc, micro_auprc (D,): the cells of all labels as one list."""
    by_seed: dict[int, dict[tuple[int, int], list[tuple[np.ndarray, Training]]]] = {}
    for name, one in found.items():
        for t in one.trainings:
            by_seed.setdefault(t.seed, {}).setdefault((t.repeat, t.fold), []).append((places[name][t.who], t))
    aucs, precisions = [], []
    for trainings in by_seed.values():
        pairs, precise = [], []
        for members in trainings.values():
            who, truth, score = (
                np.concatenate(parts)
                for parts in zip(*((w, t.truth == 1, t.score[:, 1]) for w, t in members), strict=True)
            )
            pairs.append(estimators.auc_pairs(truth, score, weights[:, who]))
            precise.append(estimators.average_precision(truth, score, weights[:, who]))
        aucs.append(added(pairs))
        precisions.append(mean(precise))
    return {"micro_auc": mean(aucs), "micro_auprc": mean(precisions)}


def _wide(found: Rows) -> list[Row]:
    """One row per patient and training with the answers of all targets, `<column>.<target>`."""
    shared = ("slide", "patient", "unit", "repeat", "fold", "seed")
    rows: dict[tuple[Any, ...], Row] = {}
    for name, (own, _) in found.items():
        for row in own:
            key = (row["repeat"], row["seed"], row["fold"], bag_of(row))
            wide = rows.setdefault(key, {k: row[k] for k in shared if k in row})
            wide |= {f"{k}.{name}": v for k, v in row.items() if k not in shared}
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    return [{k: row.get(k, "") for k in columns} for _, row in sorted(rows.items())]
