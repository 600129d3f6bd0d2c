"""A table as a member of a fusion: its columns as a training part knows them, and a ridge regression on them.

In: `Rows` of the training patients, targets, inner folds. Out: `TableModel`, which scores any rows, and the training
patients' out-of-fold scores. Columns are fitted anew inside each inner fold, so that no scaler, imputer or selector
sees a patient that it is judged by. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mhim.mil.fusion import columns, linear, member
from mhim.mil.fusion.columns import Columns, ColumnsError, Options
from mhim.mil.fusion.linear import Form, Linear
from mhim.mil.fusion.rows import Rows


@dataclass(frozen=True, eq=False)
class TableModel:
    """columns: as fitted. linear: on their features, or with `by_groups` on the means of their groups. penalty: the one
    that the inner folds chose. skill: cross-validated loss per penalty of `member.PENALTIES`."""

    columns: Columns
    linear: Linear
    by_groups: bool
    penalty: float
    risk: tuple[float, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What each weight is of: a feature or a group."""
        return tuple(self.columns.groups) if self.by_groups else self.columns.names

    def scores(self, rows: Rows) -> np.ndarray:
        """float64 (n, q); NaN for who has no known cell. Each row by itself."""
        found = self.linear.scores(_matrix(self.columns, rows, self.by_groups))
        found[~rows.present] = np.nan
        return found

    def importance(self, form: Form) -> dict[str, float]:
        """Feature or group -> its weight per standard deviation, as `linear.one_number` reads it."""
        values = linear.one_number(self.linear.weights, form)
        return dict(zip(self.names, values.tolist(), strict=True))

    def group_importance(self, form: Form) -> dict[str, float]:
        """Group -> what all its columns add together per standard deviation of their mean, as `linear.one_number`
        reads it; of a model by groups its weights. Columns of several groups count in each."""
        if self.by_groups:
            return self.importance(form)
        found = {}
        for (name, at), sd in zip(self.columns.groups.items(), self.columns.group_sd, strict=True):
            total = self.linear.weights[list(at)].sum(axis=0) * sd
            found[name] = float(linear.one_number(total, form))
        return found

    def plain(self) -> dict[str, Any]:
        """What is no long vector, as JSON values."""
        own = {"by_groups": self.by_groups, "penalty": self.penalty, "risk": list(self.risk)}
        return {"columns": self.columns.plain(), **own}

    def arrays(self) -> dict[str, np.ndarray]:
        """The vectors, float64."""
        own = {"weights": self.linear.weights, "offset": self.linear.offset}
        return own | {f"columns.{k}": v for k, v in self.columns.arrays().items()}

    @classmethod
    def of(cls, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TableModel:
        """What `plain` and `arrays` gave. Raises ValueError where they do not fit."""
        own = {k.removeprefix("columns."): v for k, v in arrays.items() if k.startswith("columns.")}
        found = Linear(arrays["weights"], arrays["offset"])
        made = Columns.of(plain["columns"], own)
        model = cls(made, found, bool(plain["by_groups"]), float(plain["penalty"]), tuple(plain["risk"]))
        if len(model.names) != len(found.weights):
            raise ValueError(f"a table of {len(model.names)} features has {len(found.weights)} weights")
        return model


def fit(
    rows: Rows,
    target: np.ndarray,
    form: Form,
    inner: Sequence[np.ndarray],
    levels: int = 0,
    options: Options | None = None,
    by_groups: bool = False,
    plain_targets: Sequence[Any] | None = None,
) -> tuple[TableModel, np.ndarray]:
    """A table fitted on its training patients, and their out-of-fold scores (n, q), NaN for who has no known cell.

    target, inner, levels: as `member.fit` takes them. plain_targets: for `options.select`. Raises ColumnsError where no
    column is left, or `by_groups` finds no group."""
    present = np.flatnonzero(rows.present)
    place = {int(i): k for k, i in enumerate(present)}
    here = rows.of([rows.patients[i] for i in present])
    folds = [np.array([place[int(i)] for i in left if int(i) in place], dtype=np.int64) for left in inner]

    def fitted(learn: np.ndarray) -> Columns:
        own = None if plain_targets is None else [plain_targets[present[i]] for i in learn]
        return columns.fit(here.of([here.patients[i] for i in learn]), options, own)

    def design(learn: np.ndarray) -> np.ndarray:
        try:
            return _matrix(fitted(learn), here, by_groups)
        except ColumnsError:  # of an inner fold: it tells the patients it left out nothing
            return np.zeros((len(here.patients), 0))

    known = fitted(np.arange(len(present)))
    if by_groups and not known.groups:
        raise ColumnsError("no group of the table has columns enough: its means cannot be fused")
    made = member.fit(design, target[present], form, [f for f in folds if len(f)], levels)
    outside = np.full((len(rows.patients), made.outside.shape[1]), np.nan)
    outside[present] = made.outside
    return TableModel(known, made.linear, by_groups, made.penalty, made.risk), outside


def _matrix(known: Columns, rows: Rows, by_groups: bool) -> np.ndarray:
    return known.group_matrix(rows) if by_groups else known.matrix(rows)
