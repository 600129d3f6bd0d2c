"""Whose the slides of a map are, and what they can be coloured by: labels, sites, and what a run says of them.

In: rows of a label table, a scored run. Out: values by slide. What a run says is what its trainings say of the patients
they held out; nobody else has a score. Each answer is placed among the patients whom the same training held out, 0
lowest to 1 highest, so that no two models' numbers stand on one scale.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mhim.mil import heatmap
from mhim.pipeline.cohort.labels.match import match
from mhim.pipeline.cohort.labels.rows import DoubtfulComma, Row, plain_number
from mhim.pipeline.maps import stored
from mhim.pipeline.results import estimand, measures, views
from mhim.pipeline.results.measures.measure import place
from mhim.pipeline.results.metrics_file import Metrics
from mhim.pipeline.results.present import Present
from mhim.pipeline.store import reading
from mhim.pipeline.store.layout import StoreError

MOST_CLASSES = 12  # distinct numbers up to which a column of numbers is coloured as classes
Kind = Literal["classes", "number", "rank"]


@dataclass(frozen=True)
class Colour:
    """What slides are coloured by. values: slide -> text of classes; a number; or a rank from 0 to 1. outcome: whether
    it is what patients are labelled with, of which shares are counted."""

    name: str
    kind: Kind
    values: dict[str, str | float]
    outcome: bool = False


@dataclass(frozen=True)
class People:
    """Slide -> patient, what the slides can be coloured by, and what is to be told."""

    patient: dict[str, str]
    colours: tuple[Colour, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Hash of all that is told of the slides: 16 hex digits."""
        told = [sorted(self.patient.items()), [[c.name, c.kind, sorted(c.values.items())] for c in self.colours]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def people(rows: Sequence[Row], slides: Sequence[str]) -> People:
    """Those of the rows; a slide that no row names is a patient by itself, without label."""
    matched = match(rows, slides)
    of = {slide: row for row, slide in matched.rows}
    found = {slide: of[slide].patient if slide in of else slide for slide in slides}
    colours: list[Colour] = []
    columns = list(dict.fromkeys(name for row in of.values() for name, _ in row.targets))
    several = {name: {s: dict(r.targets).get(name) for s, r in of.items()} for name in columns}
    labels = several or {"label": {s: r.label for s, r in of.items()}}
    for name, cells in labels.items():
        known = {s: v for s, v in cells.items() if v is not None}
        if known:
            colours.append(_of_cells(name, known, next(iter(of.values())).separator))
    events = {s: "event" if r.event else "censored" for s, r in of.items() if r.event is not None}
    if events:
        times: dict[str, str | float] = {s: float(r.time) for s, r in of.items() if r.time is not None}
        colours += [Colour("event", "classes", dict(events)), Colour("time", "number", times)]
    sites: dict[str, str | float] = {s: r.site for s, r in of.items() if r.site}
    colours += [Colour("site", "classes", sites)] if sites else []
    alone = len(matched.without_row)
    told = [f"no row tells the patient of {alone} slides: each is one by itself"] if alone and rows else []
    return People(found, tuple(colours), (*matched.notes, *told))


def _of_cells(name: str, cells: dict[str, str], separator: str) -> Colour:
    """A column of labels: classes, or numbers where it holds many of them."""
    try:
        numbers = {s: plain_number(name, v, separator) for s, v in cells.items()}
    except (ValueError, DoubtfulComma):
        numbers = {}
    if len(set(numbers.values())) > MOST_CLASSES and all(map(math.isfinite, numbers.values())):
        return Colour(name, "number", dict(numbers), outcome=True)
    return Colour(name, "classes", dict(cells), outcome=True)


@dataclass(frozen=True)
class Scored:
    """What a run says of slides. digest: hash of its results, as far as they are used here."""

    name: str
    folder: Path
    digest: str
    colours: tuple[Colour, ...]
    marks: dict[str, str] = field(default_factory=dict)  # slide -> fingerprint of its scores
    models: tuple[str, ...] | None = None  # fingerprints of the trainings that the results are of, where known


def of_features(run: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the run was trained on such features (`Sample.facts`). Raises StoreError where it is not scored."""
    return stored.alike(Metrics.read(views.of(run)[0].folder).features.plain(), facts)


def of_patients(colour: Colour, patient: Mapping[str, str]) -> dict[str, Any]:
    """Patient -> the class that its slides agree in, of numbers their mean. Patients whose slides are of different
    classes are left out. patient: slide -> its patient."""
    each: dict[str, list[Any]] = {}
    for slide, value in sorted(colour.values.items()):
        if slide in patient:
            each.setdefault(patient[slide], []).append(value)
    if colour.kind != "classes":
        return {p: float(np.mean(own)) for p, own in each.items()}
    return {p: own[0] for p, own in each.items() if len(set(own)) == 1}


def scored(run: Path, slides: Sequence[str]) -> Scored:
    """Raises StoreError where the run is not scored, or of none of the slides."""
    present = Present(run)
    present.check()
    colours: list[Colour] = []
    there = set(slides)
    for view in views.of(run):
        file = view.folder / "predictions.csv"
        if not file.exists():
            raise StoreError(f"{run} is not scored; run `pipeline score --name {run.name}` first")
        task = Metrics.read(view.folder).task.value
        rows = estimand.read(file)
        for name, value in _questions(task, view.target):
            values = {s: v for s, v in _placed(rows, value).items() if s in there}
            colours += [Colour(name, "rank", values)] if values else []
    if not colours:
        raise StoreError(f"the run {run.name} held out none of the slides of this map; name another with --run")
    marks = {s: found.fingerprint for s in slides if (found := present.scores(s)) is not None}
    told = [[c.name, sorted(c.values.items())] for c in colours]
    digest = hashlib.sha256(json.dumps([told, sorted(marks.items())]).encode()).hexdigest()[:16]
    models = None if present.models is None else tuple(sorted(present.models))
    return Scored(run.name, run, digest, tuple(colours), marks, models)


def _questions(task: Any, target: str) -> Iterator[tuple[str, Any]]:
    """(name of a colour, the number of a row) for each number that a kind of outcome ranks patients by."""
    of = f" of {target}" if target else ""
    measure = measures.of(task)
    classes = tuple(task.classes)
    if task.kind == "classification" and len(classes) > 2:
        for c in classes:
            yield f"score {c}{of}", lambda row, c=c: float(row[f"p_{c}"])
        return
    what = f" {classes[-1]}" if task.kind == "classification" and classes else ""
    yield f"score{what}{of}", measure.positive


def _placed(rows: Sequence[dict[str, Any]], value: Any) -> dict[str, str | float]:
    """Slide -> mean place of its patient among those that the same training held out, over the trainings."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(place(row), []).append(row)
    each: dict[str, list[float]] = {}
    for members in groups.values():
        ranks = heatmap.scaled(np.array([value(r) for r in members]), "percentile").values
        for row, rank in zip(members, ranks.tolist(), strict=True):
            for slide in row["slide"].split(";"):
                each.setdefault(slide, []).append(rank)
    return {slide: float(np.mean(ranks)) for slide, ranks in each.items()}


def attention(of: Scored, slide: str, rows: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """Place of tiles among all of their slide by held-out attention, 0 to 1, float64 (n,); NaN where it is not known,
    or of other tiles. rows, coords: of the tiles."""
    unknown = np.full(len(rows), np.nan)
    if slide not in of.marks:
        return unknown
    store = of.folder / "scores" / f"{slide}.zarr"
    try:
        places, scores = reading.read_array(store, "coords"), reading.read_array(store, "attention")
    except StoreError:
        return unknown  # `pipeline verify` tells which
    if rows.max(initial=-1) >= len(places) or not np.array_equal(places[rows], coords):
        return unknown
    if not np.isfinite(scores).all():
        return unknown
    within: np.ndarray = heatmap.scaled(scores, "percentile").values[rows].astype(np.float64)
    return within
