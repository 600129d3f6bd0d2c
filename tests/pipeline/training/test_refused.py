"""What training refuses, leaves out or reports, and runs that are compared: each with a message that says why."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhim.configs.load import ConfigError
from mhim.configs.schema import TrainConfig
from mhim.mil.splits import SplitError
from mhim.pipeline.cohort import patients
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.results import compare
from mhim.pipeline.store import layout, reading, writing
from mhim.pipeline.training import plan
from tests.pipeline.bags import WIDTH, make_features
from tests.pipeline.trained import scored, settings, trained


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


def test_a_loss_that_is_no_number_fails_that_item_only_and_keeps_the_last_state(
    work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_features(work)
    config = settings(lr=1e20)  # runs away after the first epochs
    report = trained(work, rows, config)
    assert report.exit_code == 1
    assert all("train.lr" in o.message for o in report.failures)
    assert {o.key for o in report.failures} == {"fold_0", "fold_1"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: [replace(r, label="no") for r in rows], "two classes are needed"),
        (lambda rows: [replace(r, label=None) for r in rows], "has a label"),
        (lambda rows: [replace(r, fold=0 if r.patient != "p03" else None) for r in rows], "p03 has no fold"),
        (lambda rows: [replace(r, label="yes" if r.patient == "p03" else "no") for r in rows], "rarest class has 1"),
    ],
)
def test_labels_that_cannot_be_trained_on_are_refused(work: layout.Work, change: Any, says: str) -> None:
    rows = make_features(work)
    with pytest.raises((CohortError, SplitError), match=says):
        trained(work, change(rows), settings())


def test_features_of_two_encoders_are_refused_by_slide(work: layout.Work) -> None:
    rows = make_features(work, 4)
    shutil.rmtree(work.feature_store("texture", "s02_0.svs"))
    x = np.zeros((3, WIDTH + 1), np.float16)
    writer = writing.StoreWriter(work.feature_store("texture", "s02_0.svs"), {"encoder": "texture", "weights_id": "w2"})
    writer.write("features", x)
    with pytest.raises(CohortError, match=r"features of s02_0\.svs have"):
        trained(work, rows, settings())


def test_what_is_left_out_is_listed(work: layout.Work) -> None:
    rows = make_features(work, 6)
    rows = [replace(rows[0], slide="gone.svs"), replace(rows[1], label=None), *rows[2:]]
    data = patients.labelled(rows, work.features("texture"), settings().train)
    assert len(data.patients) == 4
    assert data.notes == (
        "left out, 1 slides have features but no row in the labels: s00_0.svs",
        "left out, 1 rows of the labels have no features: gone.svs",
        "left out, 1 slides have no label: s01_0.svs",
    )


def test_a_slide_without_tiles_is_left_out_and_counted_as_such(work: layout.Work) -> None:
    rows = make_features(work)
    path = work.feature_store("texture", rows[3].slide)
    shutil.rmtree(path)
    writing.StoreWriter(path, {"encoder": "texture", "empty": "no tissue", "fingerprint": "none"})
    data = patients.labelled(
        [*rows, replace(rows[0], slide="other.svs", patient="other")], work.features("texture"), settings().train
    )
    assert len(data.patients) == len(rows) - 1
    assert data.notes == (
        f"left out, 1 slides have no tiles: {rows[3].slide}",
        "left out, 1 rows of the labels have no features: other.svs",
    )


def test_identical_slides_of_two_patients_are_reported(work: layout.Work) -> None:
    rows = make_features(work, 3)
    for i, digest in enumerate(("aa", "bb", "aa")):
        writing.StoreWriter(work.tile_store(f"s{i:02d}_0.svs"), {"quickhash": digest})
    (line,) = patients.duplicates(patients.labelled(rows, work.features("texture"), settings().train), work)
    assert "s00_0.svs (patient p00) and s02_0.svs (patient p02) are identical" in line


def test_slides_of_a_patient_do_not_touch(work: layout.Work) -> None:
    rows = make_features(work, 2, slides_each=3)
    data = patients.labelled(rows, work.features("texture"), settings().train)
    features, coords, tile = patients.StoredBag(data.patients[0].stores)()
    sizes = [len(reading.read_array(s, "coords")) for s in data.patients[0].stores]
    assert len(features) == len(coords) == sum(sizes)
    below = 0
    for k, n in enumerate(sizes):
        part = coords[below : below + n]
        rest = coords[below + n :]
        assert k == len(sizes) - 1 or rest[:, 1].min() >= part[:, 1].max() + 2 * tile
        below += n


def test_runs_on_the_same_splits_are_compared_and_others_refused(work: layout.Work) -> None:
    rows = make_features(work, 20)
    configs = {"weak": settings(lr=1e-9), "strong": settings(lr=0.03, epochs=20), "other": settings(seed=5)}
    for name, config in configs.items():
        trained(work, rows, config, name)
        if name != "other":
            scored(work, config, name)
    score = settings().score.model_copy(update={"bootstrap": 200})
    found = compare.compare(work.run("weak"), work.run("strong"), score)
    turned = compare.compare(work.run("strong"), work.run("weak"), score)
    assert found["auc"]["difference"].value == pytest.approx(-turned["auc"]["difference"].value)
    assert found["auc"]["verdict"] == "better"
    assert turned["auc"]["verdict"] == "worse"
    same = compare.compare(work.run("weak"), work.run("weak"), score)
    assert same["auc"]["verdict"] == "no difference"
    with pytest.raises(layout.StoreError, match="not scored"):
        compare.compare(work.run("weak"), work.run("other"), score)
    scored(work, settings(seed=5), "other")
    with pytest.raises(layout.StoreError, match="only runs on the same splits"):
        compare.compare(work.run("weak"), work.run("other"), score)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"warmup_epochs": 4, "epochs": 4}, "warmup_epochs"),
        ({"task": "survival", "balance": "weights"}, "balance=weights is of classes"),
        ({"split_by": "csv", "repeats": 2}, "repeats must be 1"),
        ({"grid": {"folds": (2, 3)}}, "grid: folds"),
        ({"grid": {"lr": ()}}, "lr has no value"),
    ],
)
def test_contradictory_settings_are_refused(train: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        settings(**train)


def test_no_event_in_the_training_part_fails_that_fold_and_says_why(work: layout.Work) -> None:
    made = make_features(work, 12)
    seen = {"p00", "p01", "p02", "p03"}
    rows = [
        replace(r, label=None, time=float(i + 1), event=int(r.patient in seen), fold=int(r.patient in seen))
        for i, r in enumerate(made)
    ]
    report = trained(work, rows, settings(survival_loss="cox", val_fraction=0.3))
    (failed,) = report.failures
    assert failed.key == "fold_1"
    assert "no event" in failed.message


def test_a_value_to_try_that_its_setting_does_not_take_is_a_mistake_of_the_user() -> None:
    with pytest.raises(ConfigError, match=r"train\.grid, lr-abc: lr: Input should be a valid number"):
        plan.cells(settings(grid={"lr": (0.001, "abc")}).train)


def test_two_cells_of_a_grid_never_share_a_folder() -> None:
    """Signs that no folder's name should hold become `-`: the second cell would have taken the first one's place."""
    same = TrainConfig(model="mhim", grid={"student": ["a b", "a-b"]})
    with pytest.raises(ConfigError, match="share the folder grid/student-a-b"):
        plan.cells(same)
    assert len(plan.cells(TrainConfig(model="mhim", grid={"student": ["a", "b"], "merge_k": [2, 3, 3]}))) == 4
