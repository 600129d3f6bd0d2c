"""What is odd about the columns of a table, by themselves and beside the outcome: for `pipeline check`.

In: a table's rows, perhaps targets and sites of its patients. Out: columns with a reason each. Every limit stands here:
a column that tells the outcome to `LEAK` by itself is more likely a copy of it, or known only after it, than a finding.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist

import numpy as np

from mhim.mil import estimators
from mhim.mil.fusion.rows import Rows

LEAK = 0.97  # area under the ROC curve, or C-index, or rank correlation, from which on one column is a leak
LUCK = 0.001  # columns of a table without meaning that may be told by luck, see `_telling`
LEAST = 10  # patients with the column known, and 5 of each kind, below which nothing is said
FEW = 5
MOST_PAIRS = 1500  # patients of whom all pairs are compared
_OUTCOME = re.compile(
    r"(^|[_. -])(os|dss|pfi|pfs|dfs|dfi|rfs|ttp|event|death|dead|died|deceased)($|[_. -])"
    r"|(^|[_. -])(censored|outcome|label|fold|split)($|[_. -])"
    r"|surviv|vital[_ ]?status|follow[_ -]?up|recurren|relaps|progressi",
    re.IGNORECASE,
)
UNITS = {
    2.2046: "kg and lb", 2.54: "cm and inches", 10: "a factor 10", 12: "months and years", 18.016: "mmol/l and mg/dl",
    30.44: "days and months", 38.67: "mmol/l and mg/dl", 88.42: "mg/dl and µmol/l", 100: "shares and percent",
    365.25: "days and years", 1000: "a factor 1000",
}  # fmt: skip
_UNIT_FIT = 0.12  # how far, as a share, the medians' ratio may lie from such a factor
_APART = 4.0  # the distance of the two heaps over the root mean square of their standard deviations (logs)


def constant(rows: Rows) -> list[str]:
    """Columns of which every known cell is the same."""
    flat = [c for c, x in _numbers(rows) if len(x) and x.min() == x.max()]
    return flat + [c for c, words in rows.factors.items() if len({w for w in words if w is not None}) == 1]


def copies(rows: Rows) -> list[tuple[str, str]]:
    """Pairs of number columns that hold the same."""
    first: dict[bytes, str] = {}
    pairs = []
    for column, x in zip(rows.columns, np.ascontiguousarray(rows.values.T), strict=True):
        if np.isfinite(x).any() and np.unique(x[np.isfinite(x)]).size > 1:
            other = first.setdefault(hashlib.sha256(x.tobytes()).digest(), column)
            if other != column:
                pairs.append((other, column))
    return pairs


def missing(rows: Rows) -> dict[str, float]:
    """Column -> share of its patients who lack it."""
    n = max(1, len(rows.patients))
    shares = dict(zip(rows.columns, (np.isnan(rows.values).sum(axis=0) / n).tolist(), strict=True))
    return shares | {c: sum(w is None for w in words) / n for c, words in rows.factors.items()}


def mixed_units(rows: Rows) -> dict[str, str]:
    """Columns in two heaps that are apart by a factor between two usual units. Column -> what was seen.

    The logarithms are cut in two where the heaps are tightest; heaps of another unit are alike in shape (the spread of
    the logarithms), hold FEW patients or more each, and do not run into each other."""
    found = {}
    for column, x in _numbers(rows):
        if len(x) < 2 * LEAST or x.min() <= 0 or len(np.unique(x)) < LEAST:
            continue
        logs = np.sort(np.log(x))
        k = _cut(logs)
        low, high = logs[:k], logs[k:]
        if min(len(low), len(high)) < max(FEW, 0.03 * len(logs)):
            continue
        spreads = max(low.std(), 1e-9), max(high.std(), 1e-9)
        apart = (high.mean() - low.mean()) / math.sqrt((spreads[0] ** 2 + spreads[1] ** 2) / 2)
        if apart < _APART or not 0.4 < spreads[0] / spreads[1] < 2.5:
            continue
        factor = math.exp(float(np.median(high)) - float(np.median(low)))
        unit = min(UNITS, key=lambda u: abs(math.log(factor / u)))
        if abs(factor / unit - 1) <= _UNIT_FIT:
            found[column] = (
                f"{len(low)} patients around {math.exp(np.median(low)):.3g}, {len(high)} around "
                f"{math.exp(np.median(high)):.3g} ({factor:.3g} times: {UNITS[unit]}?)"
            )
    return found


def _cut(ordered: np.ndarray) -> int:
    """Where to cut sorted numbers so that the squares within both parts are least."""
    n = len(ordered)
    centred = ordered - ordered.mean()
    sums, k = np.cumsum(centred)[:-1], np.arange(1, n)
    return int(np.argmax(sums**2 / k + sums**2 / (n - k))) + 1


def outcomes_by_name(rows: Rows) -> list[str]:
    """Columns that are called like outcomes, which are known only afterwards, or like folds."""
    return [c for c in (*rows.columns, *rows.factors) if _OUTCOME.search(c)]


# ---------------------------------------------------------------------------------------------- the outcome


def leaks_of_classes(rows: Rows, classes: Sequence[str | None]) -> dict[str, str]:
    """Columns that tell a class from the others by themselves. classes: one per patient, None where not known."""
    return {c: f"AUC {auc:.3f} of {name!r}" for c, (auc, name) in _telling(rows, classes).items()}


def leaks_of_sites(rows: Rows, sites: Sequence[str | None]) -> dict[str, str]:
    """Columns that tell by themselves which patients are of a site."""
    return {c: f"AUC {auc:.3f} of {name!r}" for c, (auc, name) in _telling(rows, sites, least=LEAST).items()}


def leaks_of_survival(rows: Rows, times: Sequence[tuple[float, int] | None]) -> dict[str, str]:
    """Columns that order the survival times, or tell the event. times: (time, event), None where not known."""
    events = [None if t is None else ("1" if t[1] else "0") for t in times]
    found = {c: f"AUC {auc:.3f} of the event" for c, (auc, _) in _telling(rows, events).items()}
    known = np.array([t is not None for t in times], dtype=bool)
    pairs = np.array([t if t is not None else (0.0, 0) for t in times], dtype=np.float64).reshape(-1, 2)
    for column, x in zip(rows.columns, np.ascontiguousarray(rows.values.T), strict=True):
        here = np.flatnonzero(known & np.isfinite(x))
        here = here[:: max(1, math.ceil(len(here) / MOST_PAIRS))]
        time, event = pairs[here, 0], pairs[here, 1] > 0
        if len(here) < LEAST or event.sum() < FEW or abs(_ranked(x[here][event], time[event])) < 0.8:
            continue  # what orders all pairs orders the events among themselves too
        c = float(estimators.ratio(estimators.concordance_pairs(time, event, x[here], np.ones((1, len(here)))))[0])
        if max(c, 1 - c) >= LEAK:
            found[column] = f"C-index {max(c, 1 - c):.3f}"
    return found


def leaks_of_numbers(rows: Rows, values: Sequence[float | None]) -> dict[str, str]:
    """Columns that order the patients as the outcome does."""
    y = np.array([np.nan if v is None else v for v in values])
    found = {}
    for column, x in zip(rows.columns, np.ascontiguousarray(rows.values.T), strict=True):
        here = np.isfinite(x) & np.isfinite(y)
        if here.sum() >= LEAST and abs(r := _ranked(x[here], y[here])) >= LEAK:
            found[column] = f"rank correlation {r:.3f}"
    return found


def _telling(rows: Rows, classes: Sequence[str | None], least: int = FEW) -> dict[str, tuple[float, str]]:
    """Columns that tell a class from the others: how well (AUC), and which.

    From LEAK on, and so far from 1/2, in standard deviations of an AUC without meaning, that of all the table's columns
    LUCK are as far by luck: thousands of columns make none. A word of a factor tells as much as the share of a class
    among its patients."""
    names = sorted({c for c in classes if c is not None})
    at = {c: i for i, c in enumerate(names)}
    codes = np.array([-1 if c is None else at[c] for c in classes], dtype=np.int64)
    found: dict[str, tuple[float, str]] = {}
    beyond = NormalDist().inv_cdf(1 - LUCK / max(1, len(rows.columns) + len(rows.factors)))
    for column, x, words in _scores(rows):
        here = (codes >= 0) & np.isfinite(x)
        n = np.bincount(codes[here], minlength=len(names)).astype(np.float64)
        others = n.sum() - n
        fit = (n >= least) & (others >= least)
        if here.sum() < LEAST or not fit.any():
            continue
        if words:
            auc = np.array([_auc(codes[here] == k, _shares(codes[here] == k, x[here])) for k in range(len(names))])
        else:  # from the ranks of all patients at once
            ranks = np.bincount(codes[here], weights=_ranks(x[here]), minlength=len(names))
            auc = np.divide(ranks - n * (n + 1) / 2, n * others, out=np.full(len(n), 0.5), where=fit)
        auc = np.where(fit, np.maximum(auc, 1 - auc), 0.0)
        best = int(np.argmax(auc))
        by_chance = math.sqrt((n.sum() + 1) / (12 * n[best] * others[best])) if fit[best] else math.inf
        if auc[best] >= LEAK and auc[best] - 0.5 >= beyond * by_chance:
            found[column] = (float(auc[best]), names[best])
    return found


def _scores(rows: Rows) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Every column as numbers, and whether they only stand for words (of FEW patients or more)."""
    for column, x in zip(rows.columns, np.ascontiguousarray(rows.values.T), strict=True):
        yield column, x, False
    for column, words in rows.factors.items():
        counts = {w: words.count(w) for w in set(words) if w is not None}
        codes = {w: i for i, w in enumerate(sorted(w for w, n in counts.items() if n >= FEW))}
        yield column, np.array([codes.get(w, np.nan) if w is not None else np.nan for w in words]), True


def _shares(positive: np.ndarray, codes: np.ndarray) -> np.ndarray:
    _, which = np.unique(codes, return_inverse=True)
    share: np.ndarray = (np.bincount(which, weights=positive) / np.bincount(which))[which]
    return share


def _auc(positive: np.ndarray, score: np.ndarray) -> float:
    return float(estimators.ratio(estimators.auc_pairs(positive, score, np.ones((1, len(score)))))[0])


def _ranked(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, 0 for a constant."""
    if len(x) < 3 or x.min() == x.max() or y.min() == y.max():
        return 0.0
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """From 1, ties their mean."""
    ordered = np.sort(x)
    ranks: np.ndarray = (np.searchsorted(ordered, x) + np.searchsorted(ordered, x, side="right") + 1) / 2
    return ranks


def _numbers(rows: Rows) -> Iterator[tuple[str, np.ndarray]]:
    """Each number column's known cells."""
    for column, x in zip(rows.columns, np.ascontiguousarray(rows.values.T), strict=True):
        yield column, x[np.isfinite(x)]


def ranges(rows: Rows) -> Mapping[str, tuple[float, float, float]]:
    """Number column -> least, median and greatest of its known cells."""
    return {c: (float(x.min()), float(np.median(x)), float(x.max())) for c, x in _numbers(rows) if len(x)}
