"""What the labels are labels of: which outcome each column holds, the targets of patients, and how folds stay alike.

In: rows of a labels table and `train.task`. Out: one `Outcome` per target, a target per patient, strata. Told from the
labels only where that is safe: time and event are survival, words or two distinct values are classes; of more than two
distinct numbers nobody but the user knows what they mean, unless `train.classes` (or `train.levels`) lists them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mhim.configs import outcomes as settings
from mhim.configs.schema import TrainConfig
from mhim.mil import splits
from mhim.mil.tasks import Cells, One, Target
from mhim.pipeline.cohort.labels.rows import CohortError, Row, plain_number, some

Kind = Literal["classification", "ordinal", "regression", "survival"]
SURVIVAL = "survival"  # name of a target of several that the columns of time and event tell
_MOST = 20  # wrong cells that one error lists
_NAMED = ("classification", "ordinal")  # kinds with classes or levels
_KINDS: dict[str, Kind] = {
    "classification": "classification",
    "ordinal": "ordinal",
    "regression": "regression",
    "survival": "survival",
    "multilabel": "classification",
}


@dataclass(frozen=True)
class Outcome:
    """One target. name: its column, where there are several; empty of a single one. classes: in their order, of classes
    and levels. of: what was taken for what, to be told."""

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()

    @property
    def order(self) -> str:
        """The classes or levels in their order, to be told: which of two is the positive one decides what every number
        means."""
        ours = f"{self.name}: " if self.name else ""
        other = f"train.levels={{{self.name}: [...]}}" if self.name else "train.classes"
        if self.kind == "ordinal":
            return f"{ours}levels, lowest first: {', '.join(self.classes)} (other order: {other})"
        if self.kind == "classification":
            last = f"; the positive one is {self.classes[-1]} (other order: {other})" if len(self.classes) == 2 else ""
            return f"{ours}classes: {', '.join(self.classes)}{last}"
        return f"{ours}{'a number' if self.kind == 'regression' else 'time and event'}"


def told(rows: Sequence[Row], config: TrainConfig) -> tuple[Outcome, ...]:
    """What the labelled rows hold: one outcome, or several, in the order of the columns. Raises CohortError."""
    kinds = settings.kinds(config.task)
    names = [name for name, _ in rows[0].targets] if rows else []
    if not names:
        return (_single(rows, config),)
    if any(r.time is not None for r in rows):
        names.append(SURVIVAL)
    unknown = sorted((kinds.keys() | config.levels.keys()) - set(names))
    if unknown:
        raise CohortError(
            f"train.task or train.levels names {unknown[0]!r}, which is none of the targets ({', '.join(names)}): "
            "name the column with --label-column"
        )
    if kinds.get(SURVIVAL, "survival") != "survival":
        raise CohortError(f"train.task: {SURVIVAL} is what the time and event columns tell; rename the label column")
    return tuple(
        _of_column(name, rows, kinds.get(name, config.task if not kinds else "auto"), config) for name in names
    )


def _single(rows: Sequence[Row], config: TrainConfig) -> Outcome:
    if settings.kinds(config.task):
        raise CohortError(
            f"train.task={config.task} names columns, but the labels are of one column: name two or more with "
            "--label-column A,B, or give the kind alone, such as --task ordinal"
        )
    if config.task == "multilabel":
        raise CohortError("--task multilabel needs two or more columns of labels: --label-column er,pr,her2")
    if config.task == "survival" or (config.task == "auto" and any(r.time is not None for r in rows)):
        return Outcome("", "survival")
    values = [r.label for r in rows if r.label is not None]
    if not values:  # who has none is told by the caller
        return Outcome("", _KINDS.get(config.task, "classification"))
    kind = _kind("", values, config.task, bool(config.classes), rows[0].separator)
    classes = classes_of("", kind, values, config.classes, rows[0].separator) if kind in _NAMED else ()
    return Outcome("", kind, classes)


def _of_column(name: str, rows: Sequence[Row], asked: str, config: TrainConfig) -> Outcome:
    if name == SURVIVAL:
        return Outcome(name, "survival")
    values = [v for r in rows if (v := dict(r.targets).get(name)) is not None]
    if not values:
        raise CohortError(f"column {name}: no slide with features has a value; leave it out of --label-column")
    given = config.levels.get(name, ())
    kind = _kind(name, values, asked, bool(given), rows[0].separator)
    classes = classes_of(name, kind, values, given, rows[0].separator) if kind in _NAMED else ()
    if asked == "multilabel" and len(classes) != 2:
        raise CohortError(
            f"column {name}: {len(classes)} distinct values ({some(classes)}), but --task multilabel needs two in each "
            f"column; name the kinds instead: --task {name}=classification,..."
        )
    return Outcome(name, kind, classes)


def _kind(name: str, values: Sequence[str], asked: str, listed: bool, separator: str) -> Kind:
    """The kind of one column of labels, as asked for or as its values tell it. Raises CohortError."""
    if asked == "survival":
        raise CohortError(f"column {name}: survival is told by the time and event columns, not by a label")
    if asked == "regression":
        _differ(name, values, separator)
    if asked != "auto":
        return _KINDS[asked]
    distinct = {v if (n := number(v, separator)) is None else n for v in values}
    if listed or len(distinct) <= 2 or any(isinstance(v, str) for v in distinct):
        return "classification"
    shown = some(sorted(distinct), 6)
    how = "--task classification, --task ordinal (levels in order) or --task regression"
    if name:
        how = f"--task {name}=classification, {name}=ordinal (levels in order) or {name}=regression"
    where = f"column {name}" if name else "the labels"
    raise CohortError(
        f"{where}: {len(distinct)} distinct numbers ({shown}), which may be classes, grades or measurements: say which "
        f"with {how}"
    )


def _differ(name: str, values: Sequence[str], separator: str) -> None:
    """Raises CohortError where all labels are one number: no fold could learn from them."""
    if len(values) > 1 and len({v if (n := number(v, separator)) is None else n for v in values}) == 1:
        where = f"column {name}: " if name else ""
        raise CohortError(f"{where}all {len(values)} labelled slides are {values[0]!r}: there is nothing to learn")


def classes_of(
    name: str, kind: Kind, values: Sequence[str], given: Sequence[str], separator: str = ","
) -> tuple[str, ...]:
    """Names in order: as given, else numbers by value, then names by letter; levels that are words need `given`.

    separator: of the table. A decimal comma makes numbers of levels, not of classes, whose order earlier versions fixed
    by letter."""
    where = f"column {name}: " if name else ""
    setting = f"train.levels of {name}" if name else "train.classes"
    present = set(values)
    if given:
        unknown = sorted(present - set(given))
        if unknown:
            raise CohortError(f"{where}label {unknown[0]!r} is none of {setting} ({', '.join(given)})")
        return tuple(given)
    if len(present) < 2:
        raise CohortError(
            f"{where}all {len(values)} labelled slides are {values[0]!r}: two classes are needed to train"
        )
    values_of = {v: number(v, separator if kind == "ordinal" else ",") for v in present}
    if None not in values_of.values():
        if kind == "ordinal" and len(set(values_of.values())) < len(present):
            alike = next(
                sorted(w for w in present if values_of[w] == values_of[v])
                for v in sorted(present)
                if sum(values_of[w] == values_of[v] for w in present) > 1
            )
            raise CohortError(f"{where}levels {' and '.join(map(repr, alike))} are one number: write it in one way")
        return tuple(sorted(present, key=lambda v: (values_of[v], v)))
    if kind == "ordinal":
        words = ", ".join(sorted(present))
        example = "[LOWEST, ..., HIGHEST]"  # never the words by letter: whoever copies them has a wrong order unawares
        how = f"--set 'train.levels={{{name}: {example}}}'" if name else f"--set 'train.classes={example}'"
        raise CohortError(
            f"{where}levels in words ({words}) have no order of their own: give it, lowest first, as {how}"
        )
    return tuple(sorted(present, key=lambda v: (0, float(v), "") if v.isdigit() else (1, 0.0, v)))


def number(text: str, separator: str = ",") -> float | None:
    """The finite number that a label is in a table of that separator, or None."""
    try:
        value = plain_number("", text, separator)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------ targets


def has_target(row: Row, outcomes: Sequence[Outcome]) -> bool:
    """Whether the row tells at least one target."""
    if len(outcomes) == 1:
        return (row.time if outcomes[0].kind == "survival" else row.label) is not None
    return row.time is not None or any(v is not None for _, v in row.targets)


def lacking(outcomes: Sequence[Outcome]) -> str:
    """What a row without target lacks."""
    if len(outcomes) > 1:
        return f"value of {' or '.join(o.name for o in outcomes)}"
    return "time" if outcomes[0].kind == "survival" else "label"


def targets(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> list[Target | None]:
    """The target of each row. Raises CohortError naming every cell (at most 20) that is no number."""
    wrong: list[str] = []
    found: list[Target | None] = []
    for row in rows:
        try:
            cells = [_cell(row, o) for o in outcomes]
        except ValueError as error:
            wrong.append(f"row {row.number}, {error}")
            continue
        found.append(
            cells[0] if len(outcomes) == 1 else Cells(tuple(cells)) if any(c is not None for c in cells) else None
        )
    if wrong:
        more = f"\n  ... and {len(wrong) - _MOST} more" if len(wrong) > _MOST else ""
        cure = "write numbers, or name a word for missing values in labels.missing"
        raise CohortError("--task regression:\n  " + "\n  ".join(wrong[:_MOST]) + f"{more}\n{cure}")
    return found


def _cell(row: Row, outcome: Outcome) -> One | None:
    if outcome.kind == "survival":
        return None if row.time is None or row.event is None else (row.time, float(row.event))
    text = dict(row.targets).get(outcome.name) if outcome.name else row.label
    if text is None:
        return None
    if outcome.kind == "regression":
        return finite_number(row, text, outcome.name)
    return outcome.classes.index(text)


def finite_number(row: Row, text: str, name: str = "") -> float:
    """The number that a cell of the row holds. name: of its column, where there are several. Raises ValueError."""
    column = name or row.label_column
    value = plain_number(column, text, row.separator)
    if not math.isfinite(value):
        raise ValueError(f"column {column}: {text!r} is not finite")
    return value


def cells(target: Target | None, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A target as the cells of a label table that read as it again."""
    if target is None:
        return {}
    parts = target.values if isinstance(target, Cells) else (target,)
    found: dict[str, Any] = {}
    for outcome, part in zip(outcomes, parts, strict=True):
        if isinstance(part, tuple):
            found |= {"time": repr(part[0]), "event": int(part[1])}
        elif part is not None:
            known = repr(part) if outcome.kind == "regression" else outcome.classes[int(part)]
            found[outcome.name or "label"] = known
        elif outcome.name:
            found |= {"time": "", "event": ""} if outcome.kind == "survival" else {outcome.name: ""}
    return found


def plain(target: Target | None) -> Any:
    """A target as plain values for JSON."""
    return {"cells": list(target.values)} if isinstance(target, Cells) else target


# ------------------------------------------------------------------------------------------ folds


def strata(of: Mapping[str, Target], outcomes: Sequence[Outcome], folds: int) -> splits.Strata:
    """patient -> stratum, in which folds are alike: class, level, `survival_strata`, fifths of a number. Of several,
    the strata of every cell that the patient has."""
    if len(outcomes) == 1:
        return _strata({p: t for p, t in of.items() if not isinstance(t, Cells)}, outcomes[0], folds)
    labels: dict[str, list[int]] = {p: [] for p in of}
    start = 0
    for k, outcome in enumerate(outcomes):
        known = {p: v for p, t in of.items() if isinstance(t, Cells) and (v := t.values[k]) is not None}
        own = _strata(known, outcome, folds)
        _enough(outcome, own)
        for patient, stratum in own.items():
            labels[patient].append(start + stratum)
        start += max(own.values(), default=0) + 1
    return {p: tuple(found) for p, found in labels.items()}


def _strata(of: Mapping[str, One], outcome: Outcome, folds: int) -> dict[str, int]:
    if outcome.kind == "survival":
        pairs = {p: t for p, t in of.items() if isinstance(t, tuple)}
        return splits.survival_strata({p: t[0] for p, t in pairs.items()}, {p: int(t[1]) for p, t in pairs.items()})
    plain_ones = {p: t for p, t in of.items() if not isinstance(t, tuple)}
    if outcome.kind == "regression":
        return splits.number_strata(plain_ones, folds)
    return {p: int(t) for p, t in plain_ones.items()}


def _enough(outcome: Outcome, own: Mapping[str, int]) -> None:
    """Of several targets a fold may lack a class of one at test, where its metric is undefined, but not in training."""
    if outcome.kind in _NAMED:
        for k, name in enumerate(outcome.classes):
            n = sum(v == k for v in own.values())
            if n < 3:
                raise splits.SplitError(
                    f"column {outcome.name}: {n} patients are {name!r}, and training, validation and test need one "
                    "each: leave the column out of --label-column, or merge classes"
                )
