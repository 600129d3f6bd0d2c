"""Whether a training's features are standardised, and the rule that decides it.

In: the features of the training part. Out: their mean and sd where they are to be standardised, and what was found.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mhim.mil.feed import Feed, Scale, moments

# Models start for numbers of size 1: outside of this the first steps saturate, or move nothing.
SMALLEST, LARGEST = 0.03, 5.0
# From this ratio of the 90th to the 10th percentile of the features' spreads on, they are columns of different units.
# Below it standardising, which blows up the quiet ones, went either way: a CNN's channels differ 11-fold and did worse
# (58 breast fields .939 against .980), pixels of digits 20-fold and did better on one set and worse on another.
UNEVEN = 100.0


def chosen(feed: Feed, standardize: bool | Literal["auto"]) -> tuple[Scale | None, dict[str, Any] | None]:
    """Mean and sd of the cases of `feed`, or None where their features stay as they are; for "auto" also what was
    found: `rms` of all numbers, `uneven`, and `why` in words, None where nothing speaks for it."""
    if standardize is False:
        return None, None
    scale = moments(feed)
    if standardize is True:
        return scale, None
    found = judged(scale)
    return (None if found["why"] is None else scale), found


def told_raw(size: float) -> list[str]:
    """What is to be told of features that were taken as they are. size: root mean square of the bags' means."""
    if size <= LARGEST:
        return []
    return [
        f"the features are of size {size:.3g} (root mean square of the bags' means) and were taken as they are: some "
        "such trainings learn little; compare with --set train.standardize=true"
    ]


def judged(scale: Scale) -> dict[str, Any]:
    """What mean and sd of the training part's features say of standardising them: the rule behind "auto".

    It is done where the root mean square of all numbers lies outside of [.03, 5], or where the features' sds (constant
    ones left out) differ more than 100-fold between their 10th and 90th percentile. Features of an encoder with a last
    norm are neither, and stay raw; tables on their natural scales are both."""
    mean, sd = (v.astype(np.float64) for v in scale)
    varies = sd != 1.0  # of a constant feature the sd is told as 1
    spread = sd[varies]
    rms = float(np.sqrt((mean**2 + np.where(varies, sd, 0.0) ** 2).mean()))
    low, high = np.percentile(spread, [10, 90]) if len(spread) else (1.0, 1.0)
    uneven = float(high / max(low, 1e-12))
    why = None
    if not SMALLEST <= rms <= LARGEST:
        why = f"the features are of size {rms:.3g} (root mean square), not between {SMALLEST:g} and {LARGEST:g}"
    elif uneven > UNEVEN:
        why = f"the features' spreads differ {uneven:.3g}-fold (90th to 10th percentile), more than {UNEVEN:g}"
    return {"rms": rms, "uneven": uneven, "why": why}
