"""Rows of patients in one table, as numbers and words: what the members of a fusion are fitted on and applied to.

In: arrays and words. Out: `Rows`, of all patients or of some in any order. Knows no file, no label and no fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class Rows:
    """patients: ids, each once. columns: names of the number columns; values: float64 (patients, columns), NaN where
    not known. factors: column -> one word per patient, None where not known. groups: name -> number columns."""

    patients: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray
    factors: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.patients), len(self.columns)):
            raise ValueError(
                f"{self.values.shape} values of {len(self.patients)} patients, {len(self.columns)} columns"
            )
        if any(len(words) != len(self.patients) for words in self.factors.values()):
            raise ValueError("a factor has not one word per patient")

    @property
    def present(self) -> np.ndarray:
        """bool (patients,): who has any known cell; who has none is as good as not in the table."""
        known: np.ndarray = np.isfinite(self.values).any(axis=1)
        for words in self.factors.values():
            known |= np.array([w is not None for w in words], dtype=bool)
        return known

    def of(self, patients: Sequence[str]) -> Rows:
        """The rows of these patients, in this order; who is not in the table gets a row without a known cell."""
        at = {p: i for i, p in enumerate(self.patients)}
        where = np.array([at.get(p, -1) for p in patients], dtype=np.int64)
        values = np.full((len(patients), len(self.columns)), np.nan)
        values[where >= 0] = self.values[where[where >= 0]]
        factors = {name: tuple(words[i] if i >= 0 else None for i in where) for name, words in self.factors.items()}
        return replace(self, patients=tuple(patients), values=values, factors=factors)
