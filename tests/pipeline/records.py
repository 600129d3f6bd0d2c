"""Whole cards and metrics of runs that tests write by hand, with what a test is about put in."""

from __future__ import annotations

from typing import Any

from mhim.mil.tasks import Classification, Task
from mhim.pipeline.results.metrics_file import METRICS, Metrics
from mhim.pipeline.store import layout
from mhim.pipeline.training.card import Card

TWO = Classification(classes=("a", "b"))


def card(task: Task = TWO, repeat: int = 0, fold: int = 0, **told: Any) -> Card:
    """A training of abmil. told: fields of the card instead of the usual ones."""
    usual = {
        "format": layout.FORMAT,
        "model": "abmil",
        "model_params": {},
        "in_dim": 8,
        "task": task.to_json(),
        "features": {"encoder": "texture", "mpp": 0.5},
        "split": {"hash": "x", "repeat": repeat, "fold": fold, "train": 2, "val": 1, "test": 1},
        "seed": 1,
        "protocol": "clean",
        "train": {"threads": 1},
        "versions": {"mhim-pipeline": "0.1.0"},
        "epoch": 1,
        "epochs": 2,
        "validation": {task.headline: 0.75},
        "test": {task.headline: None},
    }
    return Card.of(usual | told, "model.json")


def metrics(task: Task = TWO, **told: Any) -> Metrics:
    """The numbers of a run without any training. told: fields instead of the usual ones."""
    usual = {
        "numbers": layout.NUMBERS,
        "unit": "patient",
        "patients": 0,
        "model": "abmil",
        "task": task.to_json(),
        "headline": task.headline,
        "split_hash": "x",
        "folds": 3,
        "seeds": 1,
        "trainings": 3,
        "protocol": "clean",
        "features": {"encoder": "texture"},
        "warnings": [],
        "over_folds": {},
        "test": {},
        "pairs": 0,
        "horizons": [],
        "confidence": 0.95,
        "bootstrap": 10,
        "per_fold": [],
        "choices": {"trainings": 3, "watched": 0, "taught": 0, "alarm": 0, "validation": 0},
    }
    return Metrics.of(usual | told, METRICS)
