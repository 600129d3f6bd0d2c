"""The bags of hand-written digits: a set anyone can make, with known truth."""

from __future__ import annotations

import numpy as np


def digits(witnesses: int, bags: int = 100, folds: int = 5, seed: int = 0, low: int = 50, high: int = 120) -> str:
    """Bags of real hand-written digits (scikit-learn's 1,797 images of 8 x 8) as the text of such a table.

    A bag holds `low` to `high` images; it is positive if it holds nines, then exactly `witnesses` of them: 1 is one
    metastasis in a slide, 20 a plain tumour. Every image belongs to one fold, so no image of a test bag was seen in
    training. Half of the bags of each fold are positive.
    """
    from sklearn.datasets import load_digits

    images, digit = load_digits(return_X_y=True)
    rng = np.random.default_rng([seed, witnesses])
    home = rng.permutation(len(images)) % folds
    lines = ["label,bag,fold," + ",".join(f"px{i}" for i in range(images.shape[1]))]
    for bag in range(bags):
        fold, positive = bag % folds, (bag // folds) % 2
        nines, others = (np.flatnonzero((home == fold) & ((digit == 9) == nine)) for nine in (True, False))
        chosen = draw_bag(rng, nines if positive else nines[:0], others, witnesses, low, high)
        lines += [f"{positive},bag{bag:03d},{fold}," + ",".join(f"{v / 4:g}" for v in images[i]) for i in chosen]
    return "\n".join(lines) + "\n"


def draw_bag(
    rng: np.random.Generator, nines: np.ndarray, others: np.ndarray, witnesses: int, low: int = 50, high: int = 120
) -> np.ndarray:
    """Indices of the images of one bag: `low` to `high` of them, `witnesses` of which are `nines` if any are given."""
    size = int(rng.integers(low, high + 1))
    held = rng.choice(nines, witnesses, replace=False) if len(nines) else nines
    return rng.permutation(np.concatenate([rng.choice(others, size - len(held), replace=False), held]))
