"""How unlike the training bags a bag is: a model answers about any features, also where its answer means nothing.

In: features of bags. Out: a profile of the training bags, and distances to it. Knows no model, no file, no label.

A bag is described by the mean of its features. Its distance is the root mean square, over features, of how many
standard deviations (between training bags) its mean lies from theirs: about 1 for bags of the same kind, several times
that for other staining, another scanner or another tissue.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SAMPLE = 512  # tiles of a bag that are looked at, evenly spread: their mean is within a twentieth of a tile's sd
FEWEST = 4  # bags below which nothing is said
BEYOND = 2.0  # a bag this many times as far as the farthest that was held out is called unlike


@dataclass(frozen=True)
class Profile:
    """mean, sd: float32 (D,), of the means of the training bags."""

    mean: np.ndarray
    sd: np.ndarray

    @property
    def size(self) -> float:
        """Root mean square of the features' means."""
        return float(np.sqrt(np.mean(np.square(self.mean, dtype=np.float64))))

    def distance(self, features: np.ndarray) -> float:
        """Distance of a bag, features (N, D); NaN for one without tiles."""
        z = (_middle(features) - self.mean) / self.sd
        return float(np.sqrt(np.mean(np.square(z, dtype=np.float64))))


def profile(bags: Iterable[np.ndarray]) -> Profile | None:
    """The profile of training bags, features (N, D) each; None for fewer than 4 bags with tiles."""
    means = [_middle(x) for x in bags if len(x)]
    if len(means) < FEWEST:
        return None
    stacked = np.stack(means).astype(np.float64)
    sd = stacked.std(axis=0, ddof=1)
    # a feature that hardly varied must not decide alone
    least = max(0.05 * float(np.sqrt(np.mean(sd**2))), 1e-6)
    return Profile(stacked.mean(axis=0).astype(np.float32), np.maximum(sd, least).astype(np.float32))


def limit(held_out: Iterable[float]) -> float | None:
    """The distance from which on a bag is unlike those the model knows, from those of bags that it was not trained on;
    None without any that says something."""
    known = [d for d in held_out if np.isfinite(d) and d > 0]
    return BEYOND * max(known) if known else None


def _middle(features: np.ndarray) -> np.ndarray:
    """float32 (D,), mean of at most SAMPLE evenly spread rows."""
    if not len(features):
        return np.full(features.shape[1], np.nan, np.float32)
    rows = np.linspace(0, len(features) - 1, min(SAMPLE, len(features))).astype(np.int64)
    return np.asarray(np.asarray(features[rows], np.float32).mean(axis=0, dtype=np.float64), np.float32)
