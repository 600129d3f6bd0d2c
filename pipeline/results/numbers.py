"""The content of a run's `metrics.json`, and the lines that people read of it. What each number is: NUMBERS.md.

In: the trained folds and the rows of `predictions.csv`. Out: plain values. Every number carries the hash of the split,
the unit (patient), how many folds and seeds it is of, and how many trainings define it. Knows nothing of stages.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import ScoreConfig
from mhim.mil import metrics
from mhim.mil.resampling import Interval
from mhim.mil.tasks import Task
from mhim.pipeline.results import ensemble, estimand, measures, predictions
from mhim.pipeline.results.measures.measure import Answers, Place, bag_of, of_slides, place
from mhim.pipeline.results.metrics_file import METRICS, Estimate, Metrics
from mhim.pipeline.store import layout, tables
from mhim.pipeline.training import bundle, choices
from mhim.pipeline.training.card import Card

Row = dict[str, Any]


def summary(folders: Sequence[Path], rows: Sequence[Row], task: Task, config: ScoreConfig, target: str = "") -> Metrics:
    """The content of `metrics.json`. folders: the trainings; rows: their `predictions.predictions`; target: of several.
    A training that held out no patient whose target is known is in no number, which is told."""
    every, places = list(folders), {place(r) for r in rows}
    folders = [f for f in every if bundle.card_of(f).place in places] if target else every
    cards = [bundle.card_of(f).seen_as(target) for f in folders]
    horizons = mean_horizons(cards)
    found = estimand.answers(rows, task)
    each = estimand.per_training(found, horizons)
    per_fold = [_per_fold(folder, card, each, found) for folder, card in zip(folders, cards, strict=True)]
    over = metrics.over_folds([f["metrics"] for f in per_fold])
    told = estimand.intervals(found, horizons, config.bootstrap, config.confidence)
    hashes = sorted({c.split.hash for c in cards})
    together = ensemble.ensemble(rows, task)
    measure = measures.of(task)
    made: dict[str, Any] = {
        "numbers": layout.NUMBERS,
        **of_what(len(found.patients), found.clusters),
        **({"target": target} if target else {}),
        "model": cards[0].asked,
        "task": task.to_json(),
        "headline": task.headline,
        "split_hash": hashes[0] if len(hashes) == 1 else hashes,
        "folds": len({(t.repeat, t.fold) for t in found.trainings}),
        "seeds": len(found.seeds),
        "trainings": len(found.trainings),
        "protocol": cards[0].protocol,
        "features": cards[0].features.plain(),
        "warnings": [],
        "over_folds": {k: {"mean": m, "sd": sd, "n": n} for k, (m, sd, n) in over.items()},
        "test": {k: asdict(v) for k, v in told.items()},
        "pairs": estimand.pairs(found),
        "horizons": horizons,
        "confidence": config.confidence,
        "bootstrap": config.bootstrap,
        "per_fold": per_fold,
        "choices": chosen(folders, cards).plain(),
    }
    if len(found.seeds) > 1:
        made["ensemble"] = _intervals(ensemble.of_seeds(rows, task), task, horizons, config)
    if measure.pooled:
        whole = _intervals(pooled(together), task, (), config)
        made["pooled"] = {k: whole[k] for k in whole if k in measure.ranking}

    def scaled(how: bool) -> list[Row]:
        asked = config.model_copy(update={"calibrate": how})
        return ensemble.ensemble(predictions.predictions(folders, asked, target)[0], task)

    made |= measure.own_tables(together) | measure.tables(found, rows, together, config, scaled)
    made["warnings"] = [
        *_missing(every),
        *_unknown(len(every) - len(folders), len(every), target),
        *_warnings(cards, task),
        *undefined(found, over, told, config, task),
        *one_class(rows),
    ]
    return Metrics.of(no_nan(made), METRICS)


def of_what(n: int, clusters: np.ndarray | None) -> dict[str, Any]:
    """unit, and how many patients (and slides, where each is a bag) numbers are of. clusters: see `Answers`."""
    if clusters is None:
        return {"unit": "patient", "patients": n}
    return {"unit": "slide", "patients": len(np.unique(clusters)), "slides": n}


def chosen(folders: Sequence[Path], cards: Sequence[Card]) -> choices.Choices:
    """What was chosen between trainings, counted."""
    cells = [cell_of(f) for f in folders]
    offered = len(list((folders[0].parents[1]).iterdir())) if cells[0] else 0
    return choices.count(cards, cells, offered)


def cell_of(folder: Path) -> str:
    """Of a grid, "" without one."""
    return folder.parent.name if folder.parent.parent.name == "grid" else ""


def pooled(rows: Sequence[Row]) -> list[Row]:
    """One row per patient as if one training had made them all: pairs of different models' answers count too."""
    return [{**row, "repeat": 0, "seed": 0, "fold": 0} for row in rows]


def mean_horizons(cards: Sequence[Card]) -> list[float]:
    """The times of survival's time-dependent AUCs: each fold has its own, from its training part; all are looked at in
    their mean, so that one name is one time."""
    known = [c.horizons for c in cards if c.horizons]
    return [float(v) for v in np.mean(known, axis=0)] if known else []


def lines(found: Metrics) -> list[tuple[str, str, str]]:
    """(metric, mean ± sd over trainings, value inside trainings with interval) for a table; what is of other things
    follows under its own name."""
    n = len(found.per_fold) if found.trainings is None else found.trainings

    def over_trainings(name: str) -> str:
        over = found.over_folds.get(name)
        if over is None:
            return ""
        spread = "" if over.sd is None else f" ± {over.sd:.3f}"
        mean = "undefined" if over.mean is None else f"{over.mean:.3f}{spread}"
        return mean + (f" ({over.n} of {n})" if 0 < over.n < n else "")

    if found.targets is not None:
        return [(k, over_trainings(k), text_of(v)) for k, v in found.test.items()]
    measure, made = measures.of(found.task.value), []
    for name in found.over_folds:
        made.append((measure.label(name, found.horizons), over_trainings(name), text_of(found.test.get(name))))
    for told, what in ((found.pooled, "folds pooled"), (found.ensemble, "ensemble of seeds")):
        shown = [k for k in dict.fromkeys((*measure.ranking, *measure.decided[:1], found.headline)) if k in told]
        made += [(f"{k}, {what}", "", text_of(told[k])) for k in shown]
    return made


def text_of(value: Estimate | None) -> str:
    """value [low, high] of an interval as `metrics.json` holds it."""
    if value is None or value.value is None:
        return "undefined"
    bounds = f" [{value.low:.3f}, {value.high:.3f}]" if value.low is not None and value.high is not None else ""
    return f"{value.value:.3f}{bounds}"


def one_class(rows: Sequence[Row]) -> list[str]:
    """What to say when a model, or every model, calls all its patients (or slides, where each is a bag) one class."""
    said: dict[Place, set[str]] = {}
    truth: dict[Place, set[str]] = {}
    for row in rows:
        if row.get("decision"):
            said.setdefault(place(row), set()).add(row["decision"])
            truth.setdefault(place(row), set()).add(row["label"])
    flat = {place: next(iter(calls)) for place, calls in said.items() if len(calls) == 1 and len(truth[place]) > 1}
    if not flat:
        return []
    counts = Counter(flat.values())
    bags = "slides" if any(map(of_slides, rows)) else "patients"
    told = ", ".join(f"{n} of {len(said)} trainings call all their {bags} {name!r}" for name, n in counts.most_common())
    if len(flat) == len(said) and len(counts) == 1:
        told += ": the decision tells nothing here"
    return [told]


def undefined(
    found: Answers,
    over: Mapping[str, tuple[float, float, int]],
    told: Mapping[str, Interval],
    config: ScoreConfig,
    task: Task,
) -> list[str]:
    """Which numbers are of fewer trainings or fewer bootstrap samples than there are, and why."""
    said, measure = [], measures.of(task)
    n, bag = len(found.trainings), "patient" if found.clusters is None else "slide"
    name = task.headline
    lacking = n - over[name][2]
    if lacking:
        said.append(
            f"{measure.headline} is undefined in {lacking} of {n} trainings ({measure.no_pair} among the {bag}s they "
            "held out), which are left out of its mean over trainings and add no pair: fewer folds would help"
        )
    if any(len(t.who) == 1 for t in found.trainings):
        said.append(
            f"folds of one {bag} hold no pair, so ranking is undefined in them; their patients are drawn "
            "together in the bootstrap"
        )
    drawn = told[name].n
    if drawn < config.bootstrap:
        said.append(
            f"the interval of {measure.headline} is of {drawn} of {config.bootstrap} bootstrap samples; the others "
            "hold no pair"
        )
    return said


def no_nan(value: Any) -> Any:
    """NaN has no place in JSON: None says undefined."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: no_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [no_nan(v) for v in value]
    return value


def _intervals(rows: Sequence[Row], task: Task, horizons: Sequence[float], config: ScoreConfig) -> dict[str, Any]:
    found = estimand.answers(rows, task)
    return {k: asdict(v) for k, v in estimand.intervals(found, horizons, config.bootstrap, config.confidence).items()}


def _per_fold(folder: Path, card: Card, each: Mapping[Place, dict[str, float]], found: Answers) -> dict[str, Any]:
    place = card.place
    (own,) = (t for t in found.trainings if (t.repeat, t.fold, t.seed) == place)
    return {
        "repeat": place[0],
        "fold": place[1],
        "seed": place[2],
        **_sizes(own.who, found),
        "epoch": card.epoch,
        "cell": cell_of(folder),
        **({"fallback": card.fallback.plain()} if card.fallback else {}),
        **({"choice": card.choice.plain()} if card.choice else {}),
        "metrics": each[place],
    }


def sizes_of(rows: Iterable[Row]) -> dict[str, Any]:
    """How many patients (and slides, where each is a bag) rows are of."""
    bags = {bag_of(r): (r["patient"], of_slides(r)) for r in rows}
    patients = {"patients": len({patient for patient, _ in bags.values()})}
    return patients | ({"slides": len(bags)} if any(alone for _, alone in bags.values()) else {})


def _sizes(who: np.ndarray, found: Answers) -> dict[str, Any]:
    of = of_what(len(who), None if found.clusters is None else found.clusters[who])
    return {k: v for k, v in of.items() if k != "unit"}


def _unknown(lacking: int, n: int, target: str) -> list[str]:
    if not lacking:
        return []
    return [f"{lacking} of {n} trainings held out no patient whose {target} is known, and are in no number of it"]


def _missing(folders: Sequence[Path]) -> list[str]:
    """Folds of the splits that have no model: their patients are in no number."""
    cards = [bundle.card_of(f) for f in folders]
    file = next((p / "splits.csv" for p in folders[0].parents[:3] if (p / "splits.csv").exists()), None)
    if file is None:
        return []  # weights that were brought in
    wanted = {(int(r["repeat"]), int(r["fold"])) for r in tables.read(file)}
    seeds = {c.seed for c in cards}
    there = {(c.place[:2], c.seed) for c in cards}
    lacking = sorted((*place, s) for place in wanted for s in seeds if (place, s) not in there)
    if not lacking:
        return []
    told = ", ".join(
        f"fold {fold}" + (f" of repetition {repeat}" if repeat else "") + f" with seed {seed}"
        for repeat, fold, seed in lacking[:5]
    ) + (" ..." if len(lacking) > 5 else "")
    return [
        f"{len(lacking)} of {len(wanted) * len(seeds)} trainings are missing ({told}): they failed or were never "
        "made, and the patients that only they held out are in no number here"
    ]


def _warnings(cards: Sequence[Card], task: Task) -> list[str]:
    """What a reader must know before believing the numbers."""
    said = []
    if cards[0].protocol == "paper":
        said.append("optimistic: the epoch was chosen on the test fold (train.protocol=paper)")
    if len({c.seed for c in cards}) == 1:
        what = measures.of(task).headline
        said.append(f"one seed: differences of about one point of {what} between models mean nothing")
    fallen = [c.fallback for c in cards if c.fallback]
    if fallen:
        why = fallen[0].why
        said.append(f"{len(fallen)} of {len(cards)} trainings fell back to the plain model: {why}")
    return said
