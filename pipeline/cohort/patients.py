"""From labels and stored features to patients that can be trained on, and their folds.

In: the rows of a labels CSV and a folder of feature stores. Out: a `Dataset` of patients (one bag each, all its
slides), what was left out and why, and the folds. Holds paths, never features: a `StoredBag` reads them when asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import TrainConfig
from mhim.mil import splits
from mhim.mil.splits import Fold, SplitError
from mhim.mil.tasks import Target
from mhim.pipeline.cohort import outcomes as outcome
from mhim.pipeline.cohort import provenance
from mhim.pipeline.cohort.labels.match import Matched, match
from mhim.pipeline.cohort.labels.of_patients import each_alone, joint_sites, mixed_tissue
from mhim.pipeline.cohort.labels.rows import CohortError, Row, counted, some
from mhim.pipeline.cohort.outcomes import Outcome
from mhim.pipeline.cohort.provenance import Made
from mhim.pipeline.store import layout, reading, seals

# Facts of the features that a model is bound to: scoring refuses others.
FACTS = ("encoder", "weights_id", "mpp", "tile_px", "stain_norm", "dim", "pooling", "transform", "encoder_name")
_NO_SLIDE = "\0"  # before a patient's name: stands for the slide of who has none


@dataclass(frozen=True)
class Patient:
    """One bag. target: as `mil.tasks` reads it, or None if unknown. stores: feature stores, in the order of
    `slides`. digest: hash of the features' fingerprints. wrong: why it cannot be used, if its features are damaged.
    of: the patient, where the bag is one of its slides and `id` that slide's (train.bag=slide)."""

    id: str
    slides: tuple[str, ...]
    stores: tuple[Path, ...]
    target: Target | None
    digest: str
    split: str | None = None
    fold: int | None = None
    site: str | None = None
    wrong: str = ""
    of: str = ""

    @property
    def whose(self) -> str:
        """The patient's name."""
        return self.of or self.id


@dataclass(frozen=True)
class Dataset:
    """Patients that can be trained on or scored. facts: what all features share. notes: what was left out, and why.
    classes: of a single outcome that has them. outcomes: what the targets are; none without labels. made: the settings
    of tiling and extraction that all features share. damaged: slides whose features are damaged; no patient of these is
    among `patients`."""

    patients: tuple[Patient, ...]
    classes: tuple[str, ...]
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
    made: Made = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()

    @property
    def survival(self) -> bool:
        """Whether it is of survival alone."""
        return [o.kind for o in self.outcomes] == ["survival"]

    @property
    def order(self) -> list[str]:
        """What the labels are taken for, to be told."""
        return [o.order for o in self.outcomes if self.outcomes and (o.name or o.kind != "survival")]

    def by_id(self) -> dict[str, Patient]:
        return {p.id: p for p in self.patients}

    def owners(self, bags: Iterable[str]) -> set[str]:
        """The patients of these bags, which are slides of theirs or themselves."""
        known = self.by_id()
        return {known[bag].whose for bag in bags}

    @property
    def owner(self) -> dict[str, str] | None:
        """Slide -> patient, where each slide is a bag; None where a patient is one."""
        return {p.id: p.of for p in self.patients} if any(p.of for p in self.patients) else None


@dataclass(frozen=True)
class StoredBag:
    """Reads the bag of a patient: features (N, D), coords int32 (N, 2), tile edge in level-0 px.

    Several slides stand one below the other, a tile apart, in the level-0 px of the first, so that no tile of one is
    the neighbour of another's.
    """

    stores: tuple[Path, ...]

    def __call__(self) -> tuple[np.ndarray, np.ndarray, float]:
        parts = [self._read(path) for path in self.stores]
        if len(parts) == 1:
            return parts[0]
        tile = parts[0][2]
        coords, below = [], 0
        for _, here, size in parts:
            scaled = np.rint(here * (tile / size)).astype(np.int64)
            scaled -= scaled.min(axis=0, initial=0) if len(scaled) else 0
            coords.append(scaled + np.array([0, below]))
            below += int(scaled[:, 1].max(initial=0)) + 2 * int(np.ceil(tile)) if len(scaled) else 0
        return np.concatenate([p[0] for p in parts]), np.concatenate(coords).astype(np.int32), tile

    def rows(self) -> list[int]:
        """Number of tiles of each slide, in order: cuts a patient's scores back into slides."""
        return [len(reading.read_array(path, "coords")) for path in self.stores]

    @staticmethod
    def _read(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
        tile_l0 = reading.read_attrs(path).get("tile_l0") or 1.0
        return reading.read_array(path, "features"), reading.read_array(path, "coords"), float(np.mean(tile_l0))


def labelled(rows: Sequence[Row], features: Path, config: TrainConfig, in_tables: Collection[str] = ()) -> Dataset:
    """The patients of `rows` that have a label and features. in_tables: who has other data, and is taken without slides
    too. Raises CohortError when nothing can be trained on."""
    stores, damaged = _usable(features)
    every = {**stores, **damaged}
    matched = match(rows, every)
    notes = [*_damaged(damaged), *matched.notes]
    notes += _left_out(matched.without_row, "slides have features but no row in the labels")
    bare = _bare(matched, in_tables) if matched.rows else []  # without any bag there is no slide model to fuse
    lone = {r.patient for r, _ in bare}
    notes += _without_features([r for r in matched.without_slide if r.patient not in lone], features, every)
    if lone:
        notes.append(
            f"{counted(len(lone), 'patient', 'has', 'have')} no slides with features, tables alone: "
            f"{some(sorted(lone))}"
        )
    alone = config.bag == "slide"

    def bag(row: Row, slide: str) -> str:
        return slide if alone else row.patient

    lost = {bag(r, i) for r, i in matched.rows if i in damaged}  # a bag without one of its slides is another bag
    outcomes = outcome.told([r for r, i in (*matched.rows, *bare) if bag(r, i) not in lost], config)
    notes += _left_out(
        [i for r, i in matched.rows if bag(r, i) in lost and i not in damaged],
        "slides are of patients with a damaged one",
    )
    pairs = [*matched.rows, *bare]
    known = [(r, i) for r, i in pairs if outcome.has_target(r, outcomes) and bag(r, i) not in lost]
    what = outcome.lacking(outcomes)
    notes += _left_out([i for r, i in matched.rows if not outcome.has_target(r, outcomes)], f"slides have no {what}")
    if not known:
        what = "time and event" if what == "time" else what
        why = "; ".join(notes) or "the labels are empty"
        raise CohortError(f"no slide with features in {features} has a {what}; {why}")
    target_of = dict(zip((i for _, i in known), outcome.targets([r for r, _ in known], outcomes), strict=True))
    groups: dict[str, list[tuple[Row, str]]] = {}
    for row, slide in known:
        groups.setdefault(bag(row, slide), []).append((row, slide))
    sites, joined = joint_sites([r for r, _ in known], config.split_by)
    notes += joined + mixed_tissue({name: _slides(members) for name, members in groups.items()})
    patients = []
    for name, members in sorted(groups.items()):
        members.sort(key=lambda member: member[1])  # by slide: the order of the table is nobody's business
        row = replace(members[0][0], site=sites.get(members[0][0].patient))
        one = patient_of(name, _slides(members), stores, target_of[members[0][1]], row)
        patients.append(replace(one, of=row.patient) if alone else one)
    notes += each_alone([(p.whose, p.target) for p in patients]) if alone else []
    used = {i: stores[i] for p in patients for i in p.slides}
    made, differ = _made(used, features)
    classes = outcomes[0].classes if len(outcomes) == 1 else ()
    return Dataset(tuple(patients), classes, _facts(used), (*notes, *differ), made, tuple(damaged), outcomes)


def _bare(matched: Matched, in_tables: Collection[str]) -> list[tuple[Row, str]]:
    """One row of each patient without slides at hand who is in a table, with a stand-in for the name of a slide."""
    there = {r.patient for r, _ in matched.rows}
    first: dict[str, Row] = {}
    for row in matched.without_slide:
        if row.patient in in_tables and row.patient not in there:
            first.setdefault(row.patient, row)
    return [(row, _NO_SLIDE + name) for name, row in sorted(first.items())]


def _slides(members: Sequence[tuple[Row, str]]) -> list[str]:
    return [i for _, i in members if not i.startswith(_NO_SLIDE)]


def unlabelled(features: Path, rows: Sequence[Row] = ()) -> Dataset:
    """Patients without target: those whose slides `rows` name, and every other slide with features by itself.

    Raises CohortError where a slide without row bears the name of a patient."""
    stores, damaged = _usable(features)
    every = {**stores, **damaged}
    matched = match(rows, every)
    groups: dict[str, list[str]] = {}
    for row, slide in sorted(matched.rows, key=lambda pair: pair[1]):
        groups.setdefault(row.patient, []).append(slide)
    for slide in matched.without_row:
        if slide in groups:
            raise CohortError(f"slide {slide} has no row, but a patient of other slides is called so: add its row")
        groups[slide] = [slide]
    groups = {name: of for name, of in groups.items() if not damaged.keys() & set(of)}
    notes = [*_damaged(damaged), *matched.notes]
    notes += _without_features(matched.without_slide, features, every)
    notes += mixed_tissue(groups)
    if rows:
        alone = matched.without_row
        notes += [f"no row tells the patient of {len(alone)} slides: each is one by itself"] if alone else []
    patients = tuple(patient_of(name, sorted(of), stores) for name, of in sorted(groups.items()))
    made, differ = _made(stores, features)
    return Dataset(patients, (), _facts(stores), (*notes, *differ), made, tuple(damaged))


def make_folds(dataset: Dataset, config: TrainConfig) -> list[Fold]:
    """The folds that `config` asks for. Raises SplitError."""
    how = config.split_by
    patients = dataset.patients
    if how == "auto":
        how = "csv" if any(p.split or p.fold is not None for p in patients) else "patient"
    of = {p.id: p.target for p in patients if p.target is not None}
    strata = outcome.strata(of, dataset.outcomes, config.folds)
    if dataset.owner is not None:  # patients are dealt, each with all its slides
        strata = splits.of_owners(strata, dataset.owner)
        if how == "patient" and dataset.classes:
            splits.enough_owners(strata, config.folds)
    if how == "csv":
        if any(p.fold is not None for p in patients):
            lacking = [p.whose for p in patients if p.fold is None]
            if lacking:
                raise SplitError(f"patient {lacking[0]} has no fold, others have: fill the column, or drop it")
            column = {p.whose: str(p.fold) for p in patients}
            made = splits.from_fold_column(column, strata, config.val_fraction, config.seed)
        elif any(p.split for p in patients):
            lacking = [p.whose for p in patients if not p.split]
            if lacking:
                raise SplitError(f"patient {lacking[0]} has no split, others have: fill the column, or drop it")
            column = {p.whose: p.split or "" for p in patients}
            made = splits.from_split_column(column, strata, config.val_fraction, config.seed)
        else:
            raise SplitError("train.split_by=csv, but the labels have no split and no fold column")
    else:
        sites = {p.whose: p.site or "" for p in patients} if how == "site" else None
        made = splits.k_fold(
            strata, config.folds, config.val_fraction, config.seed, config.repeats, sites, dataset.survival
        )
    made = made if dataset.owner is None else splits.spread(made, dataset.owner)
    return splits.select_on_test(made) if config.protocol == "paper" else made


def told_of_sites(dataset: Dataset, config: TrainConfig, folds: Sequence[Fold]) -> list[str]:
    """What is to be told of sites that validation shares with training; nothing unless `train.split_by` is site."""
    if config.split_by != "site" or config.protocol == "paper":
        return []
    return splits.shared_sites(folds, {p.id: p.site or "" for p in dataset.patients})


def duplicates(dataset: Dataset, work: layout.Work) -> list[str]:
    """Slides of different patients that are the same picture, by OpenSlide's quickhash: one line each."""
    first: dict[str, tuple[str, str]] = {}
    lines = []
    for patient in dataset.patients:
        for slide in patient.slides:
            tiles = seals.look(work.tile_store(slide))
            digest = tiles.attrs.get("quickhash") if tiles else None
            if not digest:
                continue
            other = first.setdefault(digest, (patient.whose, slide))
            if other[0] != patient.whose:
                lines.append(
                    f"slides {other[1]} (patient {other[0]}) and {slide} (patient {patient.whose}) are "
                    "identical: if they are one patient, the folds leak"
                )
    return lines


def digest_of(patients: Sequence[Patient]) -> str:
    """Hash of which patients, with which targets and features: 16 hex digits."""
    plain = [[p.id, outcome.plain(p.target), p.digest, *([p.of] if p.of else [])] for p in patients]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def _usable(features: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The stores with tiles, and those that are damaged, as far as seals and sizes tell."""
    stores = layout.feature_stores(features)
    if not stores:
        raise CohortError(f"no features in {features}; run `pipeline extract` first (or name their --encoder)")
    looked = {i: seals.look(path) for i, path in stores.items()}
    damaged = {i: stores[i] for i, found in looked.items() if found is None or found.wrong}
    usable = {i: stores[i] for i, found in looked.items() if found and not found.wrong and not found.attrs.get("empty")}
    return usable, damaged


def _damaged(stores: dict[str, Path]) -> list[str]:
    """One line for each, what is wrong and what to do."""
    found = {slide: seals.look(path) for slide, path in stores.items()}
    return [
        f"left out, {slide}: {reading.damage(stores[slide], there.wrong if there else 'it is missing')}"
        for slide, there in found.items()
    ]


def patient_of(
    name: str, slides: Sequence[str], stores: dict[str, Path], target: Target | None = None, row: Row | None = None
) -> Patient:
    """A patient with the features of its slides. Where those are damaged, that is told in `wrong`."""
    found = [seals.look(stores[i]) for i in slides]
    marks = [there.attrs.get("fingerprint", "") if there else "" for there in found]
    wrong = [
        reading.damage(stores[i], there.wrong if there else "it is missing")
        for i, there in zip(slides, found, strict=True)
        if there is None or there.wrong
    ]
    digest = hashlib.sha256(json.dumps([list(slides), marks]).encode()).hexdigest()[:16]
    more = (row.split, row.fold, row.site) if row else (None, None, None)
    return Patient(name, tuple(slides), tuple(stores[i] for i in slides), target, digest, *more, "; ".join(wrong))


def _made(stores: dict[str, Path], features: Path) -> tuple[Made, list[str]]:
    return provenance.shared({i: provenance.of_features(i, path, features) for i, path in stores.items()})


def facts_of(attrs: dict[str, Any]) -> dict[str, Any]:
    """What a model is bound to, out of a feature store's attributes.

    An encoder has one name, by which the settings call it and its folder is called. Version 0.1 stored the one that a
    user's own encoder gives itself, and the other among the settings: `encoder_name` keeps it for its models."""
    facts = {k: attrs[k] for k in FACTS if k in attrs}
    named = attrs.get("settings", {}).get("extract.encoder")
    if named and named != attrs.get("encoder"):
        return facts | {"encoder": named, "encoder_name": attrs.get("encoder")}
    return facts


def features_of(work: layout.Work, facts: dict[str, Any]) -> Path:
    """The folder of the features that a model with these facts was trained on: by its encoder's name, or, where a model
    of version 0.1 has the name that a user's own encoder gives itself, the folder whose stores say that name."""
    usual = work.features(str(facts.get("encoder")))
    if not usual.is_dir():
        for folder in sorted((work.root / "features").glob("[!.]*")):
            first = next(iter(layout.feature_stores(folder).values()), None)
            if first is not None:
                attrs = reading.read_attrs(first)
                if facts.get("encoder") in (attrs.get("encoder"), attrs.get("encoder_name")):
                    return folder
    return usual


def _facts(stores: dict[str, Path]) -> dict[str, Any]:
    """What all features share. Raises CohortError naming two slides that differ."""
    shared: dict[str, Any] = {}
    first = next(iter(stores), "")
    for slide, path in stores.items():
        facts = facts_of(reading.read_attrs(path))
        shared = shared or facts
        for key in facts.keys() | shared.keys():
            if facts.get(key) != shared.get(key):
                raise CohortError(
                    f"features of {slide} have {key} {facts.get(key)!r}, those of {first} have "
                    f"{shared.get(key)!r}: extract all slides with one encoder and one tile size"
                )
    return shared


def _without_features(rows: Sequence[Row], features: Path, every: dict[str, Path]) -> list[str]:
    """Lines on `rows` that name none of the slides in `every`: those without tiles, and those without a store."""
    bare = {i for i in layout.feature_stores(features) if i not in every}
    return [
        *_left_out([r.slide for r in rows if r.slide in bare], "slides have no tiles"),
        *_left_out([r.slide for r in rows if r.slide not in bare], "rows of the labels have no features"),
    ]


def _left_out(names: Sequence[str], why: str) -> list[str]:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"left out, {len(names)} {why}: {', '.join(names[:5])}{more}"] if names else []
