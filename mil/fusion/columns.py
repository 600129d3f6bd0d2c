"""A table's columns as a training part knows them: what is missing, how much is much, which words there are.

In: the `Rows` of the training patients alone. Out: `Columns`, which turns the rows of any patients into standardised
features, and into means over groups of columns. Whatever is learnt (medians, means, standard deviations, levels of
factors, which columns are kept) is learnt in `fit` and from the rows that it is given: it cannot see another patient.
The order of rows and of columns changes no bit of it.

Feature j of patient i is z_ij = (x_ij - mean_j) / sd_j, cut to +-CLIP_SD. x is a number (missing: the training part's
median, or mean), 1 or 0 for a word of a factor, or 1 or 0 for a missing cell. Rules at use: a column that the new table
lacks counts as its training mean (z = 0), and so does a word that the training part did not have, unless patients
without a word were there to learn from; a patient without any known cell has z = 0 throughout and is not `present`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mhim.mil.fusion.relevance import Target, relevance
from mhim.mil.fusion.rows import Rows

FORMAT = 1
CLIP_SD = 10.0  # a cell farther from the training mean is a typing error or another unit; one cell must not decide
NUMBER, MISSING, LEVEL, UNKNOWN = "number", "missing", "level", "unknown"


class ColumnsError(ValueError):
    """A table cannot be fitted: nothing in it differs between the training patients."""


@dataclass(frozen=True)
class Options:
    """impute: `median` or `mean`. indicators: a feature per number column with missing cells. select: number of
    features to keep by relevance for the targets, 0 for all. smallest_group: columns that a group must have kept."""

    impute: str = "median"
    indicators: bool = False
    select: int = 0
    smallest_group: int = 3


@dataclass(frozen=True, eq=False)
class Columns:
    """features: (kind, column, word), one per feature. fill, mean, sd: float64 (features,); fill is of numbers, else 0.
    groups: name -> places among `features` of its number columns. group_mean, group_sd: of the mean z over a group in
    the training part. left: column -> why it is not used. levels: factor -> words of the training part."""

    features: tuple[tuple[str, str, str], ...]
    fill: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    group_mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    group_sd: np.ndarray = field(default_factory=lambda: np.ones(0))
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """One name per feature, for people: `age`, `grade = high`, `grade unknown`, `psa missing`."""
        form = {NUMBER: "{0}", MISSING: "{0} missing", LEVEL: "{0} = {1}", UNKNOWN: "{0} unknown"}
        return tuple(form[kind].format(column, word) for kind, column, word in self.features)

    def matrix(self, rows: Rows) -> np.ndarray:
        """Standardised features, float64 (patients, features); no other patient of `rows` changes a patient's row."""
        z = np.zeros((len(rows.patients), len(self.features)))
        columns = {name: i for i, name in enumerate(rows.columns)}
        numbers = [j for j, f in enumerate(self.features) if f[0] == NUMBER and f[1] in columns]
        if numbers:
            x = rows.values[:, [columns[self.features[j][1]] for j in numbers]]
            z[:, numbers] = self._scaled(np.where(np.isfinite(x), x, self.fill[numbers]), numbers)
        for j, (kind, column, word) in enumerate(self.features):
            if kind == MISSING and column in columns:
                z[:, j] = self._scaled(~np.isfinite(rows.values[:, columns[column]]), j)
            elif kind in (LEVEL, UNKNOWN) and column in rows.factors:
                z[:, j] = self._of_factor(j, kind, column, word, rows.factors[column])
        z[~rows.present] = 0.0
        return z

    def group_matrix(self, rows: Rows) -> np.ndarray:
        """Standardised mean z of each group's columns, float64 (patients, groups), in the order of `groups`."""
        return self._group_scaled(self._group_means(self.matrix(rows)), rows.present)

    def told(self, rows: Rows) -> list[str]:
        """What is to be known of new rows: columns that are not there, words that are new, cells far outside."""
        lines = []
        known = {*rows.columns, *rows.factors}
        absent = sorted({column for _, column, _ in self.features} - known)
        if absent:
            lines.append(f"{_count(absent, 'column')} not in the table, taken at the training mean: {_some(absent)}")
        for column, levels in self.levels.items():
            new = sorted({w for w in rows.factors.get(column, ()) if w is not None} - set(levels))
            if new:
                lines.append(
                    f"column {column}: {_some([repr(w) for w in new])} was not in training and counts as unknown"
                )
        columns = {name: i for i, name in enumerate(rows.columns)}
        far = {}
        for j, (kind, column, _) in enumerate(self.features):
            if kind == NUMBER and column in columns:
                x = rows.values[:, columns[column]]
                with np.errstate(over="ignore", invalid="ignore"):
                    n = int((np.abs((x - self.mean[j]) / self.sd[j]) >= CLIP_SD).sum())
                if n:
                    far[column] = n
        if far:
            cells = sum(far.values())
            lines.append(
                f"{cells} cell{'s' * (cells != 1)} of {_some(sorted(far))} {CLIP_SD:g} standard deviations or more "
                "from the training mean, taken as just so far: another unit?"
            )
        return lines

    # ------------------------------------------------------------------------------------------ to and from files

    def plain(self) -> dict[str, Any]:
        """What is no long vector, as JSON values."""
        return {
            "format": FORMAT,
            "features": [list(f) for f in self.features],
            "levels": {k: list(v) for k, v in self.levels.items()},
            "groups": {k: list(v) for k, v in self.groups.items()},
            "left": dict(self.left),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The vectors, float64."""
        return {k: getattr(self, k) for k in ("fill", "mean", "sd", "group_mean", "group_sd")}

    @classmethod
    def of(cls, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Columns:
        """What `plain` and `arrays` gave. Raises ValueError for another format or vectors that do not fit."""
        if plain.get("format") != FORMAT:
            raise ValueError(f"columns of format {plain.get('format')}; this program reads {FORMAT}")
        features = tuple((str(k), str(c), str(w)) for k, c, w in plain["features"])
        groups = {str(k): tuple(int(i) for i in v) for k, v in plain["groups"].items()}
        sizes = {"fill": features, "mean": features, "sd": features, "group_mean": groups, "group_sd": groups}
        for name, of in sizes.items():
            if arrays[name].shape != (len(of),):
                raise ValueError(f"columns: {name} has shape {arrays[name].shape}, there are {len(of)}")
        levels = {str(k): tuple(map(str, v)) for k, v in plain["levels"].items()}
        vectors = {k: np.asarray(arrays[k], dtype=np.float64) for k in sizes}
        return cls(features, levels=levels, groups=groups, left=dict(plain["left"]), **vectors)

    # ------------------------------------------------------------------------------------------

    def _scaled(self, x: np.ndarray, j: Any) -> np.ndarray:
        with np.errstate(over="ignore"):
            z: np.ndarray = np.clip((x - self.mean[j]) / self.sd[j], -CLIP_SD, CLIP_SD)
        return z

    def _of_factor(self, j: int, kind: str, column: str, word: str, words: Sequence[str | None]) -> np.ndarray:
        known = set(self.levels[column])
        strange = np.array([w not in known for w in words], dtype=bool)
        z = self._scaled(strange if kind == UNKNOWN else np.array([w == word for w in words], dtype=bool), j)
        if (UNKNOWN, column, "") not in self.features:
            z[strange] = 0.0  # no training patient was without a word: nothing is known of such
        return z

    def _group_means(self, z: np.ndarray) -> np.ndarray:
        return (
            np.stack([z[:, list(at)].mean(axis=1) for at in self.groups.values()], axis=1) if self.groups else z[:, :0]
        )

    def _group_scaled(self, means: np.ndarray, present: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = np.clip((means - self.group_mean) / self.group_sd, -CLIP_SD, CLIP_SD)
        scaled[~present] = 0.0
        return scaled


def fit(rows: Rows, options: Options | None = None, targets: Sequence[Target] | None = None) -> Columns:
    """What the training patients `rows` teach of their table. targets: one per patient, for `options.select` alone.

    Patients without a known cell teach nothing. Raises ColumnsError where no column is left."""
    options = options or Options()
    order = [int(i) for i in np.argsort(np.array(rows.patients)) if rows.present[i]]
    here = rows.of([rows.patients[i] for i in order])
    if len(order) < 2:
        raise ColumnsError(f"{_count(order, 'training patient')} in the table: two are needed to tell what differs")
    made = _Fitted(here, options)
    for column in sorted(here.columns):
        made.number(column)
    for column in sorted(here.factors):
        made.factor(column)
    found = made.columns()
    if not found.features:
        raise ColumnsError(f"no column differs between the {len(order)} training patients: {_some(sorted(found.left))}")
    if options.select and options.select < len(found.features):
        if targets is None:
            raise ValueError("select needs the targets of the training patients")
        found = _selected(found, here, [targets[i] for i in order], options.select)
    return _grouped(found, here, options)


class _Fitted:
    """Features as they are found, one column after the other."""

    def __init__(self, rows: Rows, options: Options) -> None:
        self.rows, self.options = rows, options
        self.values = np.ascontiguousarray(rows.values.T)  # a row per column: its sums know no other column
        self.at = {name: i for i, name in enumerate(rows.columns)}
        self.features: list[tuple[str, str, str]] = []
        self.vectors: list[tuple[float, float, float]] = []
        self.left: dict[str, str] = {}
        self.levels: dict[str, tuple[str, ...]] = {}

    def number(self, column: str) -> None:
        x = self.values[self.at[column]]
        missing = ~np.isfinite(x)
        known = x[~missing]
        if not len(known):
            self.left[column] = "no training patient has a value"
            return
        mean, sd = _moments(known)
        if sd is None:
            self.left[column] = "one value in the training part"
        else:
            self._add(NUMBER, column, "", mean if self.options.impute == "mean" else float(np.median(known)), mean, sd)
        if self.options.indicators and missing.any() and len(known) < len(x):
            self._flag(MISSING, column, "", missing)

    def factor(self, column: str) -> None:
        words = self.rows.factors[column]
        levels = tuple(sorted({w for w in words if w is not None}))
        absent = np.array([w is None for w in words], dtype=bool)
        if not levels:
            self.left[column] = "no training patient has a value"
            return
        if len(levels) == 1 and not absent.any():
            self.left[column] = "one value in the training part"
            return
        self.levels[column] = levels
        two = len(levels) == 2 and not absent.any()  # one feature tells both words
        for level in levels[1:] if two else levels:
            self._flag(LEVEL, column, level, np.array([w == level for w in words], dtype=bool))
        if absent.any():
            self._flag(UNKNOWN, column, "", absent)

    def columns(self) -> Columns:
        fill, mean, sd = (np.array(v, dtype=np.float64) for v in zip(*self.vectors, strict=True)) if self.vectors else (
            np.zeros(0),
        ) * 3  # fmt: skip
        return Columns(tuple(self.features), fill, mean, sd, levels=self.levels, left=self.left)

    def _flag(self, kind: str, column: str, word: str, flag: np.ndarray) -> None:
        mean, sd = _moments(flag.astype(np.float64))
        if sd is not None:
            self._add(kind, column, word, 0.0, mean, sd)

    def _add(self, kind: str, column: str, word: str, fill: float, mean: float, sd: float) -> None:
        self.features.append((kind, column, word))
        self.vectors.append((fill, mean, sd))


def _moments(x: np.ndarray) -> tuple[float, float | None]:
    """Mean and standard deviation (of n, not n - 1); None for one that is 0, or too large for a number."""
    mean = float(x.mean())
    if x.min() == x.max():
        return mean, None
    with np.errstate(over="ignore"):
        sd = float(x.std())
    return mean, sd if np.isfinite(sd) and sd > 1e-12 * abs(mean) else None


def _selected(found: Columns, rows: Rows, targets: Sequence[Target], most: int) -> Columns:
    """The `most` features with the highest relevance; of equals the first by name."""
    score = relevance(found.matrix(rows), targets)
    best = sorted(sorted(range(len(score)), key=lambda j: (-score[j], j))[:most])
    kept = {found.features[j][1] for j in best}
    dropped = {column: "not among the chosen" for _, column, _ in found.features if column not in kept}
    levels = {column: words for column, words in found.levels.items() if column in kept}
    return Columns(
        tuple(found.features[j] for j in best), found.fill[best], found.mean[best], found.sd[best],
        levels=levels, left={**found.left, **dropped},
    )  # fmt: skip


def _grouped(found: Columns, rows: Rows, options: Options) -> Columns:
    """With the groups that have columns enough among those that are kept, and do not stay the same."""
    at = {column: j for j, (kind, column, _) in enumerate(found.features) if kind == NUMBER}
    groups = {name: tuple(sorted(at[c] for c in set(of) if c in at)) for name, of in sorted(rows.groups.items())}
    groups = {name: of for name, of in groups.items() if len(of) >= options.smallest_group}
    z = found.matrix(rows)
    moments = {name: _moments(z[:, list(of)].mean(axis=1)) for name, of in groups.items()}
    kept = [name for name in groups if moments[name][1] is not None]
    mean, sd = (np.array([moments[name][k] for name in kept], dtype=np.float64) for k in (0, 1))
    return Columns(
        found.features, found.fill, found.mean, found.sd, found.levels,
        {name: groups[name] for name in kept}, mean, sd, found.left,
    )  # fmt: skip


def _count(things: Sequence[object], what: str) -> str:
    return f"{len(things)} {what}{'s' * (len(things) != 1)}"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
