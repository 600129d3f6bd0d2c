"""What was chosen between trainings, counted: the alarm, the fallback by validation, the cell of a grid.

In: the cards (`model.json`) of the trainings that a run's results are made of. Out: counts for `metrics.json`, and one
line per kind of choice for every table, how many of how many. No test patient had a part in any of them, unless
`train.protocol=paper`, which is said elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mhim.pipeline.store.records import Number, Record
from mhim.pipeline.training.card import Card, Fallback, Metric
from mhim.pipeline.training.kept import ALARM, INNER, VALIDATION

EARLY = 3  # a student that is kept so early is hardly more than the teacher that it starts from


class GridChoice(Record):
    """How many cells a grid has, of how many folds, and which cell was chosen in how many."""

    cells: int
    folds: int
    chosen: dict[str, int]


class Weighed(Record):
    """How students were held against their plain models by evidence (`train.choice` other than `point`).

    trainings: whose evidence was weighed (the alarm came first in the others). untold: where it was too little to tell,
    and the simpler model was kept. by: how many by `validation`, how many by `inner` folds. difference: mean over
    trainings of the headline, student less plain; patients: least and most that gave evidence."""

    rule: str
    margin: Number
    trainings: int
    untold: int
    by: dict[str, int]
    difference: Metric
    patients: list[int]


class Choices(Record):
    """The counts. watched: trainings that could have fallen back (taught by a plain model, `train.fallback` set).
    early: taught ones, begun at their plain model, that kept an epoch up to EARLY; None where there is none.
    alarm, validation, inner: those that did, and by which check (inner: out-of-fold answers of inner folds). weighed:
    the evidence. forms: form of MHIM -> how many kept it. draws: of a search; failed: its trainings without a model."""

    trainings: int
    watched: int
    taught: int
    alarm: int
    validation: int
    grid: GridChoice | None = None
    early: int | None = None
    forms: dict[str, int] | None = None
    draws: GridChoice | None = None
    failed: int = 0
    inner: int = 0
    weighed: Weighed | None = None


def why_fallen(fallback: Fallback) -> str:
    """Which check decided a fallback; cards of version 0.1 tell it in words only."""
    return fallback.by or (ALARM if fallback.why.startswith("training loss") else VALIDATION)


def count(cards: Sequence[Card], cells: Sequence[str] = (), offered: int = 0) -> Choices:
    """The counts. cells: the grid cell of each training ("" without a grid); offered: how many cells there are."""
    watched = [c for c in cards if c.fallback or (_taught(c) and c.train.get("fallback") is not None)]
    by = Counter(why_fallen(c.fallback) for c in cards if c.fallback)
    folds = {c.place[:2]: cell for c, cell in zip(cards, cells, strict=False) if cell}
    made = Choices(
        trainings=len(cards),
        watched=len(watched),
        taught=sum(map(_taught, cards)),
        alarm=by[ALARM],
        validation=by[VALIDATION],
    )
    early = sum(_of_teacher(c) and c.fallback is None and c.epoch <= EARLY < c.epochs for c in cards)
    if early:
        made = made.model_copy(update={"early": early})
    if by[INNER]:
        made = made.model_copy(update={"inner": by[INNER]})
    if (found := _weighed(cards)) is not None:
        made = made.model_copy(update={"weighed": found})
    if any(c.form for c in cards):
        forms = Counter(c.form.kept for c in cards if c.form and c.fallback is None)
        made = made.model_copy(update={"forms": dict(sorted(forms.items()))})
    drawn = {c.place[:2]: c.drawn for c in cards if c.drawn is not None}
    if drawn:
        first = next(iter(drawn.values()))
        chosen = {str(k): n for k, n in sorted(Counter(d.number for d in drawn.values()).items())}
        failed = sum(len(d.failed) for d in drawn.values())
        search = GridChoice(cells=first.draws, folds=len(drawn), chosen=chosen)
        return made.model_copy(update={"draws": search, "failed": failed})
    if not folds:
        return made
    chosen = dict(sorted(Counter(folds.values()).items()))
    return made.model_copy(update={"grid": GridChoice(cells=offered, folds=len(folds), chosen=chosen)})


def lines(found: Choices | None) -> list[str]:
    """One line per kind of choice that the run could make; none for a plain model without a grid."""
    made: list[str] = []
    if found is None:  # numbers of version 0.1 tell none
        return made
    n = found.trainings
    if found.watched:
        kept = found.watched - found.alarm - found.validation - found.inner
        inner = f", {found.inner} of {found.watched} by inner folds" if found.inner else ""
        made.append(
            f"fallback to the plain model: {found.alarm} of {found.watched} trainings by the alarm, "
            f"{found.validation} of {found.watched} by validation{inner}; {kept} of {n} kept their own model"
        )
    elif found.taught:
        made.append(f"no fallback to the plain model was allowed (train.fallback) in {n} of {n} trainings")
    if (weighed := found.weighed) is not None:
        made.append(_of_evidence(weighed))
    if found.forms is not None:
        kept_forms = ", ".join(f"{name} in {k}" for name, k in found.forms.items()) or "none"
        made.append(
            f"form of masking kept, the first whose student fits whole training bags: {kept_forms} of {n} trainings"
        )
    if found.early:
        made.append(
            f"an epoch up to {EARLY} was kept in {found.early} of {found.taught} taught trainings: "
            "hardly more than the plain model that they started from"
        )
    if (grid := found.grid) is not None:
        chosen = ", ".join(f"{cell} in {k} of {grid.folds} folds" for cell, k in grid.chosen.items())
        made.append(f"grid of {grid.cells} cells, cell chosen on validation fold by fold: {chosen}")
    if (search := found.draws) is not None:
        chosen = ", ".join(f"draw {k} in {n}" for k, n in search.chosen.items())
        made.append(
            f"search of {search.cells} settings per fold, draw 0 as given, the others at random; chosen on validation "
            f"with the test fold sealed: {chosen} of {search.folds} folds; "
            f"{found.failed} trainings of the search failed"
        )
    return made


def _weighed(cards: Sequence[Card]) -> Weighed | None:
    every = [c.choice for c in cards if c.choice is not None]
    if not every:
        return None
    known = [c.difference for c in every if c.difference is not None]
    return Weighed(
        rule=every[0].rule,
        margin=every[0].margin,
        trainings=len(every),
        untold=sum(not c.told for c in every),
        by=dict(sorted(Counter(c.by for c in every).items())),
        difference=sum(known) / len(known) if known else None,
        patients=[min(c.patients for c in every), max(c.patients for c in every)],
    )


def _of_evidence(found: Weighed) -> str:
    """One line: by which evidence, of how many patients, and where it was too little."""
    least, most = found.patients
    of = f"{least}" if least == most else f"{least} to {most}"
    where = {VALIDATION: "validation patients", INNER: "patients held out in inner folds"}
    whom = " or ".join(where.get(by, by) for by in found.by)
    mean = "undefined" if found.difference is None else f"{found.difference:+.3f}"
    return (
        f"choice by evidence (train.choice={found.rule}): a student had to be better by {found.margin:g} paired "
        f"standard errors on {of} {whom}; mean difference {mean}; too little to tell in {found.untold} of "
        f"{found.trainings} trainings, which kept the simpler model"
    )


def _of_teacher(card: Card) -> bool:
    """Whether the student that was kept started from the plain model; that of MHIM's published form does not."""
    return _taught(card) and card.model_params.get("student_start") == "teacher"


def _taught(card: Card) -> bool:
    if card.taught is not None:
        return card.taught
    return card.fallback is not None or card.train.get("model") == "mhim"
