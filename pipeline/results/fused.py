"""What a fused run says of its modalities: each alone, each removed, the weights, and what the tables lean on.

In: the folders of a fused run's trainings and of what they are made of. Out: `fusion.json` beside `metrics.json`, its
lines for a table, and what each modality weighs for each patient. All numbers are of the same held-out patients, and
differences are paired: the same draws of patients (`estimand.py`). Who has no row in a table is scored by that table's
mean, and counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import ScoreConfig
from mhim.mil import resampling
from mhim.mil.fusion.joined import JOINT
from mhim.mil.tasks import Task
from mhim.pipeline.results import estimand, measures, numbers, predictions
from mhim.pipeline.results.measures.measure import Row, place
from mhim.pipeline.results.metrics_file import METRICS
from mhim.pipeline.store import reading, tables
from mhim.pipeline.training import bundle, fold, fusion_bundle
from mhim.pipeline.training.fused import PARTS, TABLES
from mhim.pipeline.training.fusion_bundle import SLIDE, Fusion

FILE = "fusion.json"
SHOWN = 20  # of a table's features or groups


def is_fused(folders: Sequence[Path]) -> bool:
    """Whether a run's trainings are fused ones."""
    return bundle.card_of(folders[0]).fusion is not None


def members(run: Path, folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Modality (and network of several) -> the trainings of it alone, on the folds of `folders`; tables are fitted once
    per fold."""
    names = (bundle.card_of(folders[0]).fusion or _none()).members
    found: dict[str, list[Path]] = {}
    for name in names:
        network = name in (SLIDE, JOINT)
        root = run / name if network else run / TABLES / name
        found[name] = [root / f.name for f in folders if network or (root / f.name).is_dir()]
    return found


def alone(run: Path, folders: Sequence[Path], config: ScoreConfig) -> dict[str, list[Row]]:
    """Modality -> the held-out predictions of the models of it alone."""
    return {name: predictions.predictions(of, config)[0] for name, of in members(run, folders).items()}


@dataclass(frozen=True)
class Share:
    """One patient's modalities, means over the trainings that held the patient out. weights: modality at hand, and the
    network of several where it is asked -> its weight, sum 1. parts: what it adds to the score, in the unit that `unit`
    tells."""

    weights: Mapping[str, float]
    parts: Mapping[str, float]


def shares(folders: Sequence[Path]) -> dict[str, Share]:
    """Patient -> what each modality at hand weighs and adds."""
    each: dict[str, list[tuple[float, Mapping[str, str]]]] = {}
    for folder in folders:
        task: Any = bundle.card_of(folder).task.value
        scale = task.sd if task.kind == "regression" else 1.0
        for row in tables.read(folder / PARTS):
            each.setdefault(row["patient"], []).append((scale, row))
    found = {}
    for patient, rows in each.items():
        names = rows[0][1]["modalities"].split("+")  # the same in every training: who has what is of the patient
        names += [JOINT] if any(r.get(f"weight.{JOINT}") for _, r in rows) else []
        # a training whose patients never had these modalities together asks no network
        weights = {n: float(np.mean([float(r.get(f"weight.{n}") or 0.0) for _, r in rows])) for n in names}
        parts = {n: float(np.mean([scale * float(r.get(f"part.{n}") or 0.0) for scale, r in rows])) for n in names}
        found[patient] = Share(weights, parts)
    return found


def unit(task: Task) -> str:
    """What the parts of a score are in."""
    if task.kind == "classification":
        return f"log-odds of {task.classes[-1]}" if len(task.classes) == 2 else "logits of the likeliest class"
    if task.kind == "ordinal":
        return "log-odds of the next grade"
    return "the label's unit" if task.kind == "regression" else "log risk"


def summary(
    folders: Sequence[Path],
    rows: Sequence[Row],
    alone: Mapping[str, Sequence[Row]],
    task: Task,
    config: ScoreConfig,
) -> dict[str, Any]:
    """The content of `fusion.json`. rows: the fused predictions; alone: as `alone` gives them."""
    fused = [f for f in (fusion_bundle.read(folder) for folder in folders) if f is not None]
    places = [bundle.card_of(folder).place for folder in folders]
    once = [f for f, place in zip(fused, places, strict=True) if place[2] == places[0][2]]  # no seed enters a table
    removed = _removed(folders, rows, task, config)
    names = list(alone)
    value, told = _compared(rows, {**alone, **{f"without {n}": r for n, r in removed.items()}}, task, config)
    made = {
        "format": 1,
        "kind": fused[0].kind,
        "headline": task.headline,
        "confidence": config.confidence,
        "fused": value,
        "alone": {n: told[n] for n in names},
        "removed": {n: told[f"without {n}"] for n in names if f"without {n}" in told},
        "best_single": max((n for n in names if n != JOINT), key=lambda n: _worth(told[n]["value"]["value"])),
        "weights": _weights(folders, names),
        "skill": {n: _spread([f.late.skill[n] for f in fused if n in f.late.skill]) for n in names},
        "patterns": _patterns(fused, folders),
        "tables": {n: _importance(once, n) for n in names if n not in (SLIDE, JOINT)},
    }
    return dict(numbers.no_nan(made))


def read(run: Path) -> dict[str, Any] | None:
    """The `fusion.json` of a scored run, None where it is of slides alone. Raises StoreError."""
    return dict(reading.read_json(run / FILE)) if (run / FILE).is_file() else None


def text(found: Mapping[str, Any]) -> str:
    """The file's text."""
    return json.dumps(found, indent=1) + "\n"


def lines(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, value with interval, fused minus it, mean weight ± sd) for a table."""

    def interval(of: Mapping[str, Any], sign: str = "") -> str:
        if of["value"] is None:
            return "undefined"
        bounds = "" if of["low"] is None else f" [{of['low']:{sign}.3f}, {of['high']:{sign}.3f}]"
        return f"{of['value']:{sign}.3f}{bounds}"

    made = [(f"fused ({found['kind']})", interval(found["fused"]), "", "")]
    for name, one in found["alone"].items():
        weight = found["weights"][name]
        spread = "" if weight["sd"] is None else f" ± {weight['sd']:.2f}"
        best = " (best alone)" if name == found["best_single"] else ""
        made.append(
            (
                f"{name} alone{best}",
                interval(one["value"]),
                interval(one["fused_minus"], "+"),
                f"{weight['mean']:.2f}{spread}",
            )
        )
    made += [
        (f"without {name} at test", interval(one["value"]), interval(one["fused_minus"], "+"), "")
        for name, one in found["removed"].items()
    ]
    return made


def _compared(
    rows: Sequence[Row], others: Mapping[str, Sequence[Row]], task: Task, config: ScoreConfig
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The headline of the fused rows, and of the others with the fused one minus theirs."""
    name = task.headline
    own = estimand.answers(sorted(rows, key=_order), task)
    sides = {n: estimand.answers(sorted(r, key=_order), task) for n, r in others.items()}

    def values(weights: np.ndarray) -> dict[str, np.ndarray]:
        fused = estimand.values(own, weights)[name]
        each = {n: estimand.values(side, weights)[name] for n, side in sides.items()}
        return {"": fused, **each, **{f"-{n}": fused - v for n, v in each.items()}}

    point, drawn = resampling.bootstrap(values, len(own.patients), config.bootstrap, own.strata)
    found = {k: asdict(resampling.interval(v, drawn[k], config.confidence)) for k, v in point.items()}
    return found[""], {n: {"value": found[n], "fused_minus": found[f"-{n}"]} for n in others}


def _removed(folders: Sequence[Path], rows: Sequence[Row], task: Task, config: ScoreConfig) -> dict[str, list[Row]]:
    """Modality -> the predictions without it; of who lacks it anyway, or has nothing else, as they are."""
    by = {(*place(r), r["patient"]): r for r in rows}
    found: dict[str, list[Row]] = {}
    for folder in folders:
        card = bundle.card_of(folder)
        for name in (card.fusion or _none()).members:
            before = f"without.{name}."
            for row in tables.read(folder / PARTS):
                whole = by[*card.place, row["patient"]]
                own = {k.removeprefix(before): v for k, v in row.items() if k.startswith(f"{before}logit_") and v}
                if own:
                    whole = whole | measures.of(task).answers(fold.logits_of([own]), card, config)[0]
                found.setdefault(name, []).append(whole)
    return found


def _weights(folders: Sequence[Path], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Modality -> its weight, mean over a training's held-out patients who have all of them (or over all, where nobody
    has), and the spread of these means over the trainings."""
    each: dict[str, list[float]] = {n: [] for n in names}
    for folder in folders:
        rows = tables.read(folder / PARTS)
        whole = [r for r in rows if r["modalities"] == "+".join(n for n in names if n != JOINT)] or rows
        for n in names:
            each[n].append(float(np.mean([float(r.get(f"weight.{n}") or 0.0) for r in whole])))
    return {n: _spread(v) for n, v in each.items()}


def _patterns(fused: Sequence[Fusion], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """How each pattern of modalities is weighed, over the trainings, and how many held-out answers rest on it."""
    said = [row["modalities"] for folder in folders for row in tables.read(folder / PARTS)]
    made = []
    for of in fused[0].late.patterns:
        each = [f.late.patterns[of] for f in fused]
        members = dict.fromkeys(m for p in each for m in p.weights)  # the network only where somebody has all of `of`
        made.append(
            {
                "of": list(of),
                "weights": {m: _spread([p.weights.get(m, 0.0) for p in each]) for m in members},
                "slope": _spread([p.slope for p in each]),
                "answers": said.count("+".join(of)),
            }
        )
    return made


def _importance(fused: Sequence[Fusion], name: str) -> dict[str, Any]:
    """The features and groups that a table's models lean on: mean weight per sd and its sd over the folds, in how many
    of these it is used, and how many agree with the mean in sign. fused: one per fold."""
    models, form = [f.tables[name] for f in fused], fused[0].late.form
    return {
        "penalty": [m.penalty for m in models],
        "features": _stable([m.importance(form) for m in models]),
        "groups": _stable([m.group_importance(form) for m in models]),
    }


def _stable(each: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    values: dict[str, list[float]] = {}
    for one in each:
        for name, value in one.items():
            values.setdefault(name, []).append(value)
    found = [
        {"name": name, **_spread(v), "in": len(v), "same_sign": int(sum(np.sign(v) == np.sign(np.mean(v))))}
        for name, v in values.items()
    ]
    return sorted(found, key=lambda f: -abs(f["mean"]))[:SHOWN]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    mean = float(np.mean(values)) if len(values) else None
    return {"mean": mean, "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _worth(value: float | None) -> float:
    return -np.inf if value is None or not np.isfinite(value) else value


def _order(row: Row) -> tuple[Any, ...]:
    """The same order of patients in every set of rows, so that one weight is of one patient."""
    return row["repeat"], row["fold"], row["patient"], row["seed"]


def _none() -> Any:
    raise ValueError(f"no fused training, see {METRICS}")
