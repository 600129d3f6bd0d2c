"""What was chosen between trainings, counted: the alarm, the fallback by validation, the cell of a grid.

In: the cards (`model.json`) of the trainings that a run's results are made of. Out: counts for `metrics.json`, and one
line per kind of choice for every table, how many of how many. No test patient had a part in any of them, unless
`train.protocol=paper`, which is said elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

ALARM, VALIDATION = "alarm", "validation"


def model_of(card: Mapping[str, Any]) -> str:
    """The model that was asked for, also where a training fell back to its plain model."""
    return str(card.get("fallback", {}).get("from", card["model"]))


def why_fallen(fallback: Mapping[str, Any]) -> str:
    """Which check decided a fallback; cards of version 0.1 tell it in words only."""
    return str(fallback.get("by") or (ALARM if fallback["why"].startswith("training loss") else VALIDATION))


def count(cards: Sequence[Mapping[str, Any]], cells: Sequence[str] = (), offered: int = 0) -> dict[str, Any]:
    """The counts. cells: the grid cell of each training ("" without a grid); offered: how many cells there are.

    watched: trainings that could have fallen back (taught by a plain model, `train.fallback` set)."""
    watched = [c for c in cards if "fallback" in c or (_taught(c) and c.get("train", {}).get("fallback") is not None)]
    by = Counter(why_fallen(c["fallback"]) for c in cards if "fallback" in c)
    folds = {(c["split"]["repeat"], c["split"]["fold"]): cell for c, cell in zip(cards, cells, strict=False) if cell}
    made: dict[str, Any] = {
        "trainings": len(cards),
        "watched": len(watched),
        "taught": sum(map(_taught, cards)),
        ALARM: by[ALARM],
        VALIDATION: by[VALIDATION],
    }
    if folds:
        made["grid"] = {"cells": offered, "folds": len(folds), "chosen": dict(sorted(Counter(folds.values()).items()))}
    return made


def lines(found: Mapping[str, Any]) -> list[str]:
    """One line per kind of choice that the run could make; none for a plain model without a grid."""
    made = []
    n = found["trainings"]
    if found["watched"]:
        kept = found["watched"] - found[ALARM] - found[VALIDATION]
        made.append(
            f"fallback to the plain model: {found[ALARM]} of {found['watched']} trainings by the alarm, "
            f"{found[VALIDATION]} of {found['watched']} by validation; {kept} of {n} kept their own model"
        )
    elif found["taught"]:
        made.append(f"no fallback to the plain model was allowed (train.fallback) in {n} of {n} trainings")
    if "grid" in found:
        grid = found["grid"]
        chosen = ", ".join(f"{cell} in {k} of {grid['folds']} folds" for cell, k in grid["chosen"].items())
        made.append(f"grid of {grid['cells']} cells, cell chosen on validation fold by fold: {chosen}")
    return made


def _taught(card: Mapping[str, Any]) -> bool:
    return bool(card.get("taught", "fallback" in card or card.get("train", {}).get("model") == "mhim"))
