"""Folds that are alike in many labels at once: iterative stratification.

Sechidis, Tsoumakas and Vlahavas 2011, On the stratification of multi-label data: the rarest label that is left is dealt
first, each of its patients to the part that lacks it most; a tie goes to the part that lacks patients most, then by
lot. Pure: patients and their labels in, parts out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np


def iterative(
    labels: Mapping[str, tuple[int, ...]], patients: Sequence[str], shares: Sequence[float], rng: np.random.Generator
) -> dict[str, int]:
    """patient -> part. shares: wished-for sizes of the parts, relative to each other."""
    share = np.asarray(shares, dtype=np.float64) / sum(shares)
    left = [patients[i] for i in rng.permutation(len(patients))]
    lacks = share * len(left)  # patients that each part still lacks
    counts = Counter(label for p in patients for label in labels[p])  # of the patients left
    of = {label: share * n for label, n in counts.items()}
    part_of: dict[str, int] = {}

    def give(patient: str, wish: np.ndarray) -> None:
        ties = np.flatnonzero(wish >= wish.max() - 1e-9)
        ties = ties[lacks[ties] >= lacks[ties].max() - 1e-9]
        part = int(ties[rng.integers(len(ties))])
        part_of[patient] = part
        lacks[part] -= 1
        for label in labels[patient]:
            of[label][part] -= 1
            counts[label] -= 1

    while there := [label for label, n in counts.items() if n]:
        rarest = min(there, key=lambda label: (counts[label], label))
        for patient in [p for p in left if rarest in labels[p]]:
            give(patient, of[rarest])
        left = [p for p in left if p not in part_of]
    for patient in left:  # without any label
        give(patient, lacks)
    return part_of


def part(
    labels: Mapping[str, tuple[int, ...]], patients: Sequence[str], fraction: float, rng: np.random.Generator
) -> set[str]:
    """The patients of a part with about `fraction` of them, never empty and never with all patients of a label."""
    found = iterative(labels, patients, [1.0 - fraction, fraction], rng)
    chosen = {p for p in patients if found[p] == 1}
    for label in sorted({label for p in patients for label in labels[p]}):
        own = [p for p in patients if label in labels[p]]
        if all(p in chosen for p in own):
            chosen -= set(own)
    if not chosen:  # a patient whose labels all have others
        spare = [p for p in patients if all(sum(label in labels[q] for q in patients) > 1 for label in labels[p])]
        chosen = set((spare or list(patients[1:]))[:1])
    return chosen
