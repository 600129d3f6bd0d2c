"""Thresholds come from validation alone, keep what was wished for, and leave the right share undecided."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhim.configs.schema import ScoreConfig
from mhim.mil import tasks
from mhim.mil.tasks import Classification
from mhim.pipeline.results import operating_point
from mhim.pipeline.store import tables
from mhim.pipeline.training import fold as training
from tests.pipeline import records

Validated = tuple[Path, np.ndarray, np.ndarray]
TWO = Classification(classes=("benign", "tumour"))


def fold(folder: Path, p: np.ndarray, labels: np.ndarray) -> Path:
    """A fold whose validation patients have these probabilities, and one absurd test patient."""
    logit = np.log(p / (1 - p))
    rows = [
        {"side": "val", "patient": str(i), "slides": "[]", "target": int(t), "logit_0": 0.0, "logit_1": float(x)}
        for i, (x, t) in enumerate(zip(logit, labels, strict=True))
    ]
    rows.append({"side": "test", "patient": "t", "slides": "[]", "target": 0, "logit_0": -50.0, "logit_1": 50.0})
    folder.mkdir(exist_ok=True)
    (folder / training.PREDICTIONS).write_text(tables.of_mappings(rows))
    return folder


def val(folder: Path) -> Callable[[], list[dict[str, Any]]]:
    return partial(training.read_side, folder, "val")


@pytest.fixture
def validated(tmp_path: Path) -> Validated:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 50)
    p = np.clip(rng.normal(0.35 + 0.3 * labels, 0.15), 0.01, 0.99)
    return fold(tmp_path / "f", p, labels), p, labels


@pytest.mark.parametrize("wish", [0.8, 0.9, 1.0])
def test_the_wished_for_sensitivity_is_kept_on_validation(validated: Validated, wish: float) -> None:
    folder, p, labels = validated
    at = operating_point.point(val(folder), records.card(), TWO, ScoreConfig(sensitivity=wish))
    assert at is not None
    assert (p[labels == 1] >= at.threshold).mean() >= wish
    better = [t for t in np.unique(p) if (p[labels == 1] >= t).mean() >= wish]  # all other thresholds that keep it
    assert (p[labels == 0] < at.threshold).mean() == max((p[labels == 0] < t).mean() for t in better)


@pytest.mark.parametrize("wish", [0.8, 0.95])
def test_the_wished_for_specificity_is_kept_on_validation(validated: Validated, wish: float) -> None:
    folder, p, labels = validated
    at = operating_point.point(val(folder), records.card(), TWO, ScoreConfig(specificity=wish))
    assert at is not None
    assert (p[labels == 0] < at.threshold).mean() >= wish


@pytest.mark.parametrize(("sensitivity", "specificity"), [(0.95, 0.95), (0.99, 0.9), (0.5, 0.5)])
def test_between_a_sensitivity_and_a_specificity_nothing_is_called(
    validated: Validated, sensitivity: float, specificity: float
) -> None:
    folder, p, labels = validated
    at = operating_point.point(
        val(folder), records.card(), TWO, ScoreConfig(sensitivity=sensitivity, specificity=specificity)
    )
    assert at is not None
    told = np.array([operating_point.columns(at, float(v), TWO.classes)["decision"] for v in p])
    assert (told[labels == 1] != "benign").mean() >= sensitivity
    assert (told[labels == 0] != "tumour").mean() >= specificity
    undecided = (told == operating_point.UNDECIDED).any()
    assert undecided == (sensitivity + specificity > 1.5)  # where one threshold keeps both, all are called


def test_a_band_by_both_wishes_and_by_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"score\.abstain"):
        ScoreConfig(sensitivity=0.9, specificity=0.9, abstain=0.1)


def test_the_frozen_threshold_is_used_as_it_stands(validated: Validated) -> None:
    at = operating_point.point(val(validated[0]), records.card(threshold=0.123, temperature=1.0), TWO, ScoreConfig())
    assert at == operating_point.Point(0.123, 0.123, 0.123)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_band_holds_the_wished_for_share_of_validation(validated: Validated, share: float) -> None:
    folder, p, _ = validated
    at = operating_point.point(val(folder), records.card(threshold=0.5), TWO, ScoreConfig(abstain=share))
    assert at is not None
    told = [operating_point.columns(at, float(v), TWO.classes)["decision"] for v in p]
    assert told.count(operating_point.UNDECIDED) / len(told) == pytest.approx(share, abs=0.011)
    assert operating_point.columns(at, 0.999, TWO.classes)["decision"] == "tumour"
    assert operating_point.columns(at, 0.001, TWO.classes)["decision"] == "benign"


def test_the_temperature_is_applied_before_the_threshold(tmp_path: Path) -> None:
    p, labels = np.array([0.2, 0.3, 0.7, 0.9]), np.array([0, 0, 1, 1])
    folder = fold(tmp_path / "f", p, labels)
    plain = operating_point.point(val(folder), records.card(temperature=4.0), TWO, ScoreConfig(calibrate=False))
    scaled = operating_point.point(val(folder), records.card(temperature=4.0), TWO, ScoreConfig())
    assert plain is not None
    assert scaled is not None
    assert plain.threshold == pytest.approx(0.5)
    softer = 1 / (1 + np.exp(-np.log(p / (1 - p)) / 4))
    assert softer[1] < scaled.threshold < softer[2]


def test_no_operating_point_without_two_classes() -> None:
    three = tasks.Classification(classes=("a", "b", "c"))
    assert operating_point.point(val(Path("nowhere")), records.card(), three, ScoreConfig()) is None
    assert operating_point.columns(None, 0.4, three.classes) == {}


def test_counts_leave_the_undecided_out_of_both_shares() -> None:
    rows = [
        {"label": a, "decision": b}
        for a, b in (("tumour", "tumour"), ("tumour", "benign"), ("tumour", "undecided"), ("benign", "benign"))
    ]
    told = operating_point.counts(rows, TWO.classes)
    assert told == {"sensitivity": 0.5, "specificity": 1.0, "undecided": 0.25, "patients": 4}


def test_reliability_bins_count_every_patient() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1], 200)
    labels = (rng.random(200) < p[:, 1]).astype(int)
    found = operating_point.reliability(labels, p)
    assert sum(b["n"] for b in found["bins"]) == 200
    assert found["ece"] < 0.1  # calibrated by construction
    gap = sum(abs(b["accuracy"] - b["confidence"]) * b["n"] for b in found["bins"]) / 200
    assert gap == pytest.approx(found["ece"])
