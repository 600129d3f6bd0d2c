"""Cards and metrics are read strictly and written as they were read: same keys, order and numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mhim.mil.tasks import Classification
from mhim.pipeline.results.metrics_file import ExternalMetrics, Metrics
from mhim.pipeline.store.layout import StoreError
from mhim.pipeline.training import bundle
from mhim.pipeline.training.card import Card
from tests.pipeline import records

TASK = {"kind": "classification", "classes": ["a", "b"], "edges": [], "weights": [0.5, 1.5], "alpha": 0.0}
# what version 0.1.0 wrote: `cell` after `seed`, no record of how the features were made
CARD_0_1: dict[str, Any] = {
    "format": 1,
    "model": "abmil",
    "model_params": {"width": 8, "dropout": 0.25},
    "fallback": {"from": "mhim", "why": "training loss 2.1 with whole bags, against 0.4 of the plain model"},
    "in_dim": 36,
    "task": TASK,
    "features": {"encoder": "texture", "weights_id": "texture-1", "mpp": 0.5, "tile_px": 256, "stain_norm": "none"},
    "split": {"hash": "0f", "repeat": 0, "fold": 2, "train": 10, "val": 3, "test": 4},
    "seed": 7,
    "cell": "",
    "protocol": "clean",
    "train": {"model": "mhim", "threads": 1, "fallback": 0.1},
    "versions": {"mhim-pipeline": "0.1.0", "torch": "2.4.0", "numpy": "1.26.4"},
    "epoch": 3,
    "epochs": 5,
    "validation": {"auc": 0.75, "f1": None},
    "test": {"auc": 1},
    "temperature": 1.2345678901234567,
    "threshold": 0.5,
}
METRICS_0_1: dict[str, Any] = {
    "unit": "patient",
    "patients": 17,
    "model": "abmil",
    "task": TASK,
    "headline": "auc",
    "split_hash": ["0f", "1e"],
    "folds": 3,
    "seeds": 1,
    "protocol": "clean",
    "features": {"encoder": "texture", "mpp": 0.5},
    "warnings": ["one seed"],
    "over_folds": {"auc": {"mean": 0.7, "sd": None, "n": 1}},
    "test": {
        "auc": {"value": 0.7, "low": 0.6, "high": 0.8, "n": 100},
        "f1": {"value": None, "low": None, "high": None, "n": 0},
    },
    "confidence": 0.95,
    "bootstrap": 100,
    "per_fold": [{"repeat": 0, "fold": 0, "seed": 7, "patients": 6, "epoch": 3, "cell": "", "metrics": {"auc": 0.7}}],
    "confusion": [[5, 1], [2, 9]],
    "decisions": {"sensitivity": 0.8, "specificity": 0.9, "undecided": 0.0, "patients": 17},
    "reliability": {
        "before": {"ece": 0.1, "brier": 0.2, "bins": [{"to": 0.6, "n": 3, "confidence": 0.5, "accuracy": 1.0}]}
    },
}


def text(values: dict[str, Any]) -> str:
    """As version 0.1 wrote it, by hand."""
    return json.dumps(values, indent=1) + "\n"


def test_a_card_is_written_as_it_was() -> None:
    found = {k: v for k, v in CARD_0_1.items() if k != "cell"}
    assert Card.of(found, "model.json").text() == text(found)
    survival = found | {"task": {**TASK, "kind": "nll", "classes": [], "edges": [3, 4.5]}}
    survival = {k: v for k, v in survival.items() if k not in ("fallback", "temperature", "threshold")}
    survival |= {"taught": True, "risk_threshold": math.nan, "horizons": [1.0, 2.0, 3.0], "unlike_from": 2.5}
    assert Card.of(survival, "model.json").text() == text(survival)  # NaN, and 3 beside 4.5


def test_a_card_of_0_1_is_read() -> None:
    card = Card.of(CARD_0_1, "model.json")
    assert (card.asked, card.model, card.place, card.headline) == ("mhim", "abmil", (0, 2, 7), "auc")
    assert card.made is None
    assert card.task.value == Classification(classes=("a", "b"), weights=(0.5, 1.5))
    assert card.plain() == CARD_0_1  # `cell` is kept


@pytest.mark.parametrize("kind", [Metrics, ExternalMetrics])
def test_metrics_are_written_as_they_were(kind: type[Metrics] | type[ExternalMetrics]) -> None:
    found = METRICS_0_1
    if kind is ExternalMetrics:
        found = {
            "numbers": 2,
            "unit": "patient",
            "patients": 3,
            "slides": 4,
            "without_label": 0,
            "of_another_class": 0,
            "task": TASK,
            "confidence": 0.9,
            "several_slides": "bag",
            "models": 3,
            "horizons": [],
            "external": METRICS_0_1["test"],
            "external_models": METRICS_0_1["over_folds"],
            "external_ensemble": {},
            "internal": {},
            "internal_patients": None,
            "choices": {"trainings": 3, "watched": 0, "taught": 0, "alarm": 0, "validation": 0},
            "warnings": [],
            "decisions": {"external": METRICS_0_1["decisions"], "internal": {}},
            "known": {"patients": 1, "slides": 1, "metrics": METRICS_0_1["test"]},
        }
    assert kind.of(found, "metrics.json").text() == text(found)


def test_metrics_of_0_1_are_known_as_counted_otherwise() -> None:
    found = Metrics.of(METRICS_0_1, "metrics.json")
    assert found.counted_otherwise
    assert found.choices is None
    assert not records.metrics().counted_otherwise


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epoch": "3"}, "epoch"),
        ({"split": [1]}, "split"),
        ({"validation": {"auc": "high"}}, "validation.auc"),
        ({"task": {**TASK, "kind": "guess"}}, "task.kind"),
        ({"task": {**TASK, "kind": "regression"}}, "task"),
        ({"seed": True}, "seed"),
        ({"model": None}, "model"),
    ],
)
def test_a_strangers_card_is_one_error_naming_file_and_key(wrong: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / bundle.CARD).write_text(text(CARD_0_1 | wrong))
    with pytest.raises(StoreError) as error:
        bundle.card_of(tmp_path)
    assert str(tmp_path / bundle.CARD) in str(error.value)
    assert f": {told}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_card_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / bundle.CARD).write_text(text(CARD_0_1 | {"format": 9}))
    with pytest.raises(bundle.BundleError, match="has format 9, this program reads 1"):
        bundle.card_of(tmp_path)
    del (found := dict(CARD_0_1))["split"]
    (tmp_path / bundle.CARD).write_text(text(found))
    with pytest.raises(bundle.BundleError, match=r"model\.json .*split: Field required"):
        bundle.card_of(tmp_path)


def test_keys_of_newer_versions_are_kept() -> None:
    found = CARD_0_1 | {"calibrated_on": {"patients": 3}}
    assert Card.of(found, "model.json").plain()["calibrated_on"] == {"patients": 3}
