"""Who trains, who selects, who is tested: patients, labels and sites in, folds out. Pure: no file, no global state.

Every function works on patients, so a patient cannot be on two sides. The unit of a `Fold` is the patient id; where
each slide is a bag (train.bag=slide) the folds of patients are dealt first, and `spread` to their slides. `digest` is
the hash that every result carries. Knows no features and no models.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mhim.configs.errors import UserError
from mhim.mil import stratify

SIDES = ("train", "val", "test")


class SplitError(UserError, ValueError):
    """These patients cannot be split as asked; the message says why and what to do."""


_TIME_PARTS = 2  # groups of time in which survival folds are alike
_NUMBER_PARTS = 5  # groups of a number in which regression folds are alike

# patient -> stratum; or, of several targets, the strata of all that is known of the patient, no two targets' alike
Strata = Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True)
class Fold:
    """One training: patient ids of its three sides, each sorted. repeat and fold number it from 0."""

    repeat: int
    fold: int
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        sides = [set(self.train), set(self.val), set(self.test)]
        both = (sides[0] & sides[1]) | (sides[0] & sides[2]) | (sides[1] & sides[2])
        if both:
            raise SplitError(f"patient {sorted(both)[0]} is on two sides of fold {self.fold} (repeat {self.repeat})")
        if not self.train or not (self.test or isinstance(self, Sealed)):
            empty = "training" if not self.train else "test"
            raise SplitError(f"fold {self.fold} (repeat {self.repeat}) has no {empty} patient")

    @property
    def name(self) -> str:
        """Name of the fold's folder: fold_3, or rep_1_fold_3 from the second repetition on."""
        return f"fold_{self.fold}" if self.repeat == 0 else f"rep_{self.repeat}_fold_{self.fold}"


class Sealed(Fold):
    """A fold whose test side is nowhere in it, for work that may not know it."""

    @classmethod
    def of(cls, fold: Fold) -> Sealed:
        """The same training without its test side."""
        return cls(fold.repeat, fold.fold, fold.train, fold.val, ())


def k_fold(
    strata: Strata,
    folds: int,
    val_fraction: float,
    seed: int,
    repeats: int = 1,
    sites: Mapping[str, str] | None = None,
    survival: bool = False,
) -> list[Fold]:
    """Stratified folds over patients, each with an inner validation part of the rest.

    strata: patient -> class index (survival: `survival_strata`, a number: `number_strata`); where patients have several
    each, folds are dealt by iterative stratification (`stratify.py`). sites: patient -> site; when given, a site is
    wholly in one fold, and the validation part holds whole sites too where that leaves every class in training. In
    survival the strata are those of `survival_strata`, and a fold needs an event, but neither a censored patient nor
    one of each stratum. Raises SplitError when a fold or class is too small. The same arguments give the same folds;
    the order of `strata` does not matter.
    """
    patients = sorted(strata)
    if folds > len(patients):
        raise SplitError(f"{folds} folds but only {len(patients)} patients: {_folds_or(len(patients), 'add some')}")
    if sites is None:
        _enough(strata, folds, survival)
    made: list[Fold] = []
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        if sites is None:
            test_of = _deal(patients, strata, folds, rng)
        else:
            test_of = _deal_sites(patients, strata, sites, folds, rng)
        for k in range(folds):
            rest = [p for p in patients if test_of[p] != k]
            val = _inner_sites(rest, strata, sites, val_fraction, rng) if sites else set()
            val = val or _inner(rest, strata, val_fraction, rng)
            train = tuple(p for p in rest if p not in val)
            made.append(Fold(repeat, k, train, tuple(sorted(val)), tuple(p for p in patients if test_of[p] == k)))
    return made


def from_fold_column(column: Mapping[str, str], strata: Strata, val_fraction: float, seed: int) -> list[Fold]:
    """Folds given by the labels: patient -> fold name. Each name is the test side once; validation is drawn inside."""
    names = sorted(set(column.values()), key=lambda v: (0, int(v), "") if v.isdigit() else (1, 0, v))
    if len(names) < 2:
        raise SplitError(f"the fold column holds only {names[0]!r}: at least two folds are needed")
    patients = sorted(column)
    made = []
    for k, name in enumerate(names):
        rng = np.random.default_rng([seed, 0, k])
        rest = [p for p in patients if column[p] != name]
        val = _inner(rest, strata, val_fraction, rng)
        made.append(
            Fold(
                0,
                k,
                tuple(p for p in rest if p not in val),
                tuple(sorted(val)),
                tuple(p for p in patients if column[p] == name),
            )
        )
    return made


def from_split_column(column: Mapping[str, str], strata: Strata, val_fraction: float, seed: int) -> list[Fold]:
    """The one split given by the labels: patient -> train, val or test. Without val, it is drawn from train."""
    for patient, side in sorted(column.items()):
        if side not in SIDES:
            raise SplitError(f"patient {patient}: split {side!r} is none of train, val, test")
    side_of = {s: tuple(sorted(p for p, v in column.items() if v == s)) for s in SIDES}
    train, val, test = side_of["train"], side_of["val"], side_of["test"]
    if not val and train:
        drawn = _inner(list(train), strata, val_fraction, np.random.default_rng([seed, 0]))
        train, val = tuple(p for p in train if p not in drawn), tuple(sorted(drawn))
    return [Fold(0, 0, train, val, test)]


def select_on_test(folds: Sequence[Fold]) -> list[Fold]:
    """The published protocol: no inner validation part, all of it trains. The caller then selects on the test fold,
    which makes the reported numbers optimistic; never used by default."""
    return [Fold(f.repeat, f.fold, tuple(sorted((*f.train, *f.val))), (), f.test) for f in folds]


def survival_strata(time: Mapping[str, float], event: Mapping[str, int]) -> dict[str, int]:
    """patient -> stratum of survival folds: 0 and 1 censored, 2 and 3 with event, the earlier half of each first."""
    strata: dict[str, int] = {}
    for seen in (0, 1):
        group = sorted((p for p in time if int(event[p]) == seen), key=lambda p: (time[p], p))
        for i, patient in enumerate(group):
            strata[patient] = seen * _TIME_PARTS + (i * _TIME_PARTS) // len(group)
    return strata


def number_strata(values: Mapping[str, float], folds: int) -> dict[str, int]:
    """patient -> stratum of regression folds: fifths of the patients by value, fewer where a stratum would have less
    than a patient per fold, or less than two in the training part (one of them to validate on)."""
    order = sorted(values, key=lambda p: (values[p], p))
    least = folds if folds > 2 else 4
    parts = max(1, min(_NUMBER_PARTS, len(order) // least))
    return {patient: (i * parts) // len(order) for i, patient in enumerate(order)}


def shared_sites(folds: Sequence[Fold], sites: Mapping[str, str]) -> list[str]:
    """What is to be told where split_by=site could not keep sites apart inside the training part: there too few sites
    hold a class, and validation is drawn by patient. sites: patient (or slide) -> site."""
    shared = [len({sites[p] for p in f.val} & {sites[p] for p in f.train}) for f in folds if {sites[p] for p in f.val}]
    if not any(shared):
        return []
    return [
        f"train.split_by=site: in {sum(n > 0 for n in shared)} of {len(folds)} folds no choice of whole sites leaves"
        " each class in training and in validation; validation is drawn by patient there and shares sites with training"
        " (test sites stay apart in every fold)"
    ]


def digest(folds: Sequence[Fold]) -> str:
    """Hash of a set of folds, 16 hex digits: equal folds, equal hash, whatever made them."""
    plain = [[f.repeat, f.fold, list(f.train), list(f.val), list(f.test)] for f in folds]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=True).encode()).hexdigest()[:16]


def rows(folds: Sequence[Fold], owner: Mapping[str, str] | None = None) -> list[dict[str, str | int]]:
    """One row per repeat, fold and patient, ready for splits.csv. owner: slide -> patient, where each slide is a bag:
    then one row per slide, which it names."""
    return [
        {"repeat": f.repeat, "fold": f.fold, **({"patient": p} if owner is None else {"patient": owner[p], "slide": p})}
        | {"split": side}
        for f in folds
        for side in SIDES
        for p in getattr(f, side)
    ]


def of_owners(strata: Strata, owner: Mapping[str, str]) -> dict[str, int | tuple[int, ...]]:
    """patient -> the strata of all its slides: one number each where no patient has two. strata: of slides."""
    found: dict[str, set[int]] = {}
    for slide, own in strata.items():
        found.setdefault(owner[slide], set()).update((own,) if isinstance(own, int) else own)
    if all(len(own) == 1 for own in found.values()):
        return {patient: next(iter(own)) for patient, own in found.items()}
    return {patient: tuple(sorted(own)) for patient, own in found.items()}


_FEW = "merge it with another class, or leave its patients out"


def _folds_or(most: int, else_: str) -> str:
    """What to do where there are no more than `most` of what each fold needs. else_: what helps where two folds are too
    many."""
    return f"set train.folds to {most} or less" if most > 1 else else_


def enough_owners(strata: Strata, folds: int) -> None:
    """Raise SplitError unless each class has slides of a patient per fold. strata: as `of_owners` gives them."""
    counts = Counter(s for own in _all(strata).values() for s in own)
    if counts and min(counts.values()) < folds:
        n = min(counts.values())
        raise SplitError(
            f"the rarest class has slides of {n} patients for {folds} folds, and patients stay whole, so some fold "
            f"would lack it: {_folds_or(n, _FEW)}"
        )


def spread(folds: Sequence[Fold], owner: Mapping[str, str]) -> list[Fold]:
    """Folds of patients as folds of their slides. owner: slide -> patient."""

    def members(side: Sequence[str]) -> tuple[str, ...]:
        wanted = set(side)
        return tuple(sorted(s for s, p in owner.items() if p in wanted))

    return [Fold(f.repeat, f.fold, members(f.train), members(f.val), members(f.test)) for f in folds]


def _enough(strata: Strata, folds: int, survival: bool) -> None:
    """Raise SplitError unless every fold can have a patient of each class, or one with an event. `_deal` deals the
    strata of events one after the other, so that as many of them as folds are enough. Of several targets a fold may
    lack a class of one."""
    single = _single(strata)
    if single is None:
        return
    counts = np.bincount(list(single.values()))
    if survival:
        events = int(counts[_TIME_PARTS:].sum())
        if events < folds:
            raise SplitError(
                f"only {events} patients have an event, for {folds} folds, so some fold would have none: "
                f"{_folds_or(events, 'add patients with an event')}"
            )
        return
    smallest = int(counts[counts > 0].min())
    if smallest < folds:
        raise SplitError(
            f"the rarest class has {smallest} patients for {folds} folds, so some fold would lack it: "
            f"{_folds_or(smallest, _FEW)}"
        )


def _single(strata: Strata) -> dict[str, int] | None:
    """The strata, if each patient has one."""
    found = {p: s for p, s in strata.items() if isinstance(s, int)}
    return found if len(found) == len(strata) else None


def _all(strata: Strata) -> dict[str, tuple[int, ...]]:
    return {p: (s,) if isinstance(s, int) else s for p, s in strata.items()}


def _deal(patients: Sequence[str], strata: Strata, folds: int, rng: np.random.Generator) -> dict[str, int]:
    """patient -> fold: each class is shuffled and dealt round; the start moves on so that fold sizes stay even."""
    fold_of: dict[str, int] = {}
    start = 0
    single = _single(strata)
    if single is None:
        return stratify.iterative(_all(strata), patients, [1.0] * folds, rng)
    for stratum in sorted(set(single.values())):
        group = [p for p in patients if single[p] == stratum]
        for i, j in enumerate(rng.permutation(len(group))):
            fold_of[group[j]] = (start + i) % folds
        start += len(group)
    return fold_of


def _deal_sites(
    patients: Sequence[str], strata: Strata, sites: Mapping[str, str], folds: int, rng: np.random.Generator
) -> dict[str, int]:
    """patient -> fold with whole sites together: large sites first, each to the fold it leaves best balanced.

    Balance is the squared distance of the folds' class counts from an even share (a greedy form of the
    site-preserved cross-validation of Howard et al. 2021).
    """
    missing = [p for p in patients if not sites.get(p)]
    if missing:
        raise SplitError(f"patient {missing[0]} has no site: fill the site column or use train.split_by=patient")
    names = sorted({sites[p] for p in patients})
    if len(names) < folds:
        cure = _folds_or(len(names), "use train.split_by=patient")
        raise SplitError(f"{folds} folds but only {len(names)} sites: {cure}")
    labels = _all(strata)
    classes = sorted({c for found in labels.values() for c in found})
    count = {s: np.array([sum(sites[p] == s and c in labels[p] for p in patients) for c in classes]) for s in names}
    shuffled = [names[i] for i in rng.permutation(len(names))]
    shuffled.sort(key=lambda s: -int(count[s].sum()))
    ideal = np.sum([count[s] for s in names], axis=0) / folds
    held = np.zeros((folds, len(classes)))
    fold_of_site: dict[str, int] = {}
    for i, site in enumerate(shuffled):
        unused = [k for k in range(folds) if not held[k].any()]
        # When as many sites are left as folds are empty, each must open one.
        choice = unused if len(shuffled) - i <= len(unused) else list(range(folds))
        # The cost of adding the site to fold k, up to terms that do not depend on k; scaled by class size.
        cost = [float((((held[k] + count[site] - ideal) ** 2 - (held[k] - ideal) ** 2) / ideal).sum()) for k in choice]
        k = choice[int(np.argmin(cost))]
        held[k] += count[site]
        fold_of_site[site] = k
    return {p: fold_of_site[sites[p]] for p in patients}


def _inner_sites(
    rest: Sequence[str], strata: Strata, sites: Mapping[str, str], fraction: float, rng: np.random.Generator
) -> set[str]:
    """The validation part of `rest` as whole sites; nothing where no choice of sites leaves every class on both sides.

    Of random orders of the sites, each taken until the part would grow too large, the one nearest to `fraction`."""
    names = sorted({sites[p] for p in rest})
    labels = _all(strata)
    wanted = {c for p in rest for c in labels[p]}
    best: tuple[float, set[str]] = (float("inf"), set())
    for _ in range(min(200, 20 * len(names))):
        val: set[str] = set()
        for i in rng.permutation(len(names)):
            more = val | {p for p in rest if sites[p] == names[i]}
            if abs(len(more) / len(rest) - fraction) < abs(len(val) / len(rest) - fraction):
                val = more
        off = abs(len(val) / len(rest) - fraction)
        both = {c for p in val for c in labels[p]}, {c for p in rest if p not in val for c in labels[p]}
        if both == (wanted, wanted) and off < best[0]:
            best = (off, val)
    return best[1] if best[0] <= 0.5 * (1 - fraction) else set()


def _inner(rest: Sequence[str], strata: Strata, fraction: float, rng: np.random.Generator) -> set[str]:
    """The validation part of `rest`: at least one patient of each stratum that has two or more, never all of one. Of
    several targets the iterative rule's part, without the only patients of a stratum."""
    val: set[str] = set()
    single = _single({p: strata[p] for p in rest})
    if single is None:
        return stratify.part(_all(strata), rest, fraction, rng)
    for stratum in sorted({single[p] for p in rest}):
        group = [p for p in rest if single[p] == stratum]
        take = min(max(round(fraction * len(group)), 1), len(group) - 1)
        val.update(group[j] for j in rng.permutation(len(group))[:take])
    if not val:
        raise SplitError("no class has two training patients, so no validation part can be drawn: add patients")
    return val
