"""train.bag=slide: slides of one patient with labels of their own; patients whole in splits and intervals."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mhim.mil import resampling, splits, tasks
from mhim.pipeline import api
from mhim.pipeline.cohort.labels.rows import OWN_LABELS, CohortError, Row, contradictions
from mhim.pipeline.maps import stored
from mhim.pipeline.pictures import risk_curves
from mhim.pipeline.results import compare, estimand
from mhim.pipeline.results.views import View
from mhim.pipeline.store import layout
from mhim.pipeline.training import bundle
from tests.pipeline.bags import make_features, sets, write_labels
from tests.pipeline.trained import settings

Cli = Callable[..., tuple[int, str]]
QUICK = [*sets("train.folds=2", "train.epochs=3", "train.lr=0.01", "score.bootstrap=40", "score.heatmaps=none")]

MAP = [*sets("map.components=4", "map.gallery=0", "cluster.workers=1"), "--method", "pca", "--clusters", "2"]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def mixed(work: layout.Work, patients: int, prefix: str = "") -> list:  # type: ignore[type-arg]
    """Patients with one slide of each label: the features of two neighbours (no, yes) given to one of them."""
    rows = make_features(work, 2 * patients, prefix=prefix, seed=3 if prefix else 0)
    return [replace(row, patient=f"{prefix}P{k // 2}") for k, row in enumerate(rows)]


def test_slides_of_one_patient_may_have_labels_of_their_own(tmp_path: Path, cli: Cli) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", mixed(work, 8))
    shared = ["--work", work.root, *QUICK, "--workers", "1", "--labels", labels]
    code, text = cli("train", *shared, "--model", "abmil")
    assert code == 2, text
    assert "--set train.bag=slide" in " ".join(text.split()), text
    shared += sets("train.bag=slide")
    for name, model in (("one", "abmil"), ("two", "mean")):
        code, text = cli("train", *shared, "--model", model, "--name", name)
        assert code == 0, text
        assert "the 8 patients stay whole" in " ".join(text.split())
        code, text = cli("score", "--work", work.root, *QUICK, "--workers", "1", "--name", name)
        assert code == 0, text
        assert "16 held-out slides of 8 patients" in " ".join(text.split()), text

    run = work.run("one")
    for fold in ("0", "1"):
        sides: dict[str, set[str]] = {}
        for row in read(run / "splits.csv"):
            if row["fold"] == fold:
                sides.setdefault(row["patient"], set()).add(row["split"])
        assert len(sides) == 8
        assert all(len(found) == 1 for found in sides.values())
    rows = read(run / "predictions.csv")
    assert len(rows) == 16
    assert {(r["slide"], r["patient"], r["unit"]) for r in rows} == {
        (f"s{k:02d}_0.svs", f"P{k // 2}", "slide") for k in range(16)
    }
    found = json.loads((run / "metrics.json").read_text())
    assert (found["unit"], found["patients"], found["slides"]) == ("slide", 8, 16)
    assert sum(f["slides"] for f in found["per_fold"]) == 16
    assert bundle.card_of(run / "fold_0").bag == "slide"

    code, text = cli("compare", "one", "two", "--work", work.root)
    assert code == 0, text
    assert "auc" in text, text
    assert "patients drawn with all their slides, over all folds together" in " ".join(text.split()), text
    told, answers = compare.scored(View(run))
    of_patients = told.model_copy(update={"unit": "patient", "split_hash": "another"})  # as their splits are, too
    with pytest.raises(layout.StoreError, match=r"answers for each slide, b for each patient \(train.bag\)"):
        compare.refuse_others(("a", "b"), (told, of_patients), (answers, answers))
    assert cli("report", "--name", "one", "--work", work.root)[0] == 0
    page = (run / "report.html").read_text()
    assert "16 held-out slides of 8 patients" in page
    assert "inside their folds" not in page
    assert "patients drawn with all their slides, over all folds together" in page
    code, text = cli("train", "--work", work.root, *QUICK, *sets("train.bag=slide", "train.fusion=late"), "--labels",
                     labels, "--table", f"a={labels}")  # fmt: skip
    assert code == 2, text
    assert "each slide has an answer of its own" in " ".join(text.split()), text

    code, text = cli("map", "--work", work.root, "--labels", labels, *MAP, *sets("train.bag=slide"), "--name", "given")
    assert code == 0, text
    code, text = cli(
        "map", "--work", work.root, *MAP, "--run", "one", "--name", "own"
    )  # labels as the run records them
    assert code == 0, text
    for name in ("given", "own"):
        made = stored.read(work.maps / name)
        assert {r["by_label"] for r in made.slides} == {"no", "yes"}
        assert [r["by_label"] for r in made.rows("patients")] == [""] * 8  # each has slides of both

    there = api.Work(work.root).patients(labels, bag="slide")
    assert [(p.id, p.of, p.label) for p in there][:2] == [("s00_0.svs", "P0", "no"), ("s01_0.svs", "P0", "yes")]
    assert [[s.id for s in p.slides] for p in there] == [[p.id] for p in there]
    with pytest.raises(CohortError, match="has 'yes' here and 'no'"):
        api.Work(work.root).patients(labels)

    other = layout.Work(tmp_path / "other")
    theirs = write_labels(tmp_path / "theirs.csv", mixed(other, 3, "x"))
    code, text = cli("score", "--work", work.root, *QUICK, "--workers", "1", "--name", "one", "--features",
                     other.features("texture"), "--labels", theirs, "--as", "there")  # fmt: skip
    assert code == 0, text
    assert "internal: slides of 8 held-out patients; external: 6 slides of 3 patients" in " ".join(text.split())
    new = run / "new" / "there"
    assert {(r["slide"], r["patient"]) for r in read(new / "predictions.csv")} == {
        (f"xs{k:02d}_0.svs", f"xP{k // 2}") for k in range(6)
    }
    outside = json.loads((new / "metrics.json").read_text())
    assert (outside["unit"], outside["patients"], outside["slides"]) == ("slide", 3, 6)


def test_a_run_of_patients_does_not_know_the_setting(tmp_path: Path) -> None:
    from mhim.configs.schema import fingerprint_fields

    assert "bag" not in fingerprint_fields(settings().train)
    assert fingerprint_fields(settings(bag="slide").train)["bag"] == "slide"


def test_patients_are_drawn_with_all_their_slides() -> None:
    whose = np.array([0, 0, 0, 1, 2, 2])
    (weights,) = resampling.draws(6, 200, clusters=whose)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 4] == weights[:, 5]).all()
    assert (weights[:, [0, 3, 4]].sum(axis=1) == 3).all()  # three patients a draw
    alone = next(resampling.draws(3, 200))
    assert (weights[:, [0, 3, 4]] == alone).all()


def test_slides_of_one_patient_widen_the_interval() -> None:
    """Ten slides a patient that all say the same are ten patients' worth only to who counts slides."""
    task = tasks.classification(("n", "y"), [0, 1])
    rng = np.random.default_rng(0)
    rows = []
    for p in range(12):
        positive = 1 / (1 + np.exp(-(rng.normal() + p % 2)))
        for s in range(10):
            truth = {"label": ("n", "y")[p % 2], "p_n": 1 - positive, "p_y": positive, "decision": "n"}
            rows.append({"slide": f"{p}-{s}", "patient": f"{p}", "repeat": 0, "fold": 0, "seed": 0, **truth})
    of_slides = [row | {"unit": "slide"} for row in rows]
    as_people = [row | {"patient": row["slide"]} for row in rows]
    width = []
    for some in (of_slides, as_people):
        told = estimand.intervals(estimand.answers(some, task), (), 200, 0.95)["auc"]
        width.append(told.high - told.low)
    assert width[0] > 2 * width[1]


def test_slides_of_one_patient_are_no_pair_of_survival() -> None:
    """They end at one time: neither is known to have come before the other, and the patient is drawn as one."""
    rng, rows = np.random.default_rng(1), []
    for p in range(8):
        told = {"patient": f"{p}", "time": float(p + 1), "event": int(p != 5), "repeat": 0, "fold": 0, "seed": 0}
        own = rng.normal() - p / 4
        rows += [told | {"slide": f"{p}-{s}", "unit": "slide", "risk": own + 0.1 * rng.normal()} for s in range(3)]
    among = [(a, b) for a in rows for b in rows if a["patient"] != b["patient"]]
    known = [(a, b) for a, b in among if a["event"] and a["time"] < b["time"]]
    right = np.mean([a["risk"] > b["risk"] for a, b in known])
    of_slides = estimand.intervals(estimand.answers(rows, tasks.Cox()), (), 200, 0.95)["c_index"]
    alone = [row | {"patient": row["slide"]} for row in rows]
    as_people = estimand.intervals(estimand.answers(alone, tasks.Cox()), (), 200, 0.95)["c_index"]
    assert of_slides.value == as_people.value == pytest.approx(right, abs=1e-12)
    assert of_slides.high - of_slides.low > 1.2 * (as_people.high - as_people.low)


def test_what_happens_happens_to_a_patient() -> None:
    one = Row(2, "a", "P", time=9.0, event=1)
    two = Row(3, "b", "P", time=7.0, event=1)  # its own time: counted from when the slide was taken
    assert contradictions([one, two], bag="slide") == []
    told = " ".join(contradictions([one, replace(two, event=0)], {"event": "dead"}, bag="slide"))
    assert "row 3, column dead: patient 'P' has 0 here and 1 in row 2" in told
    assert "happens to a patient" in told
    unknown = replace(one, number=1, slide="u", time=None, event=None)
    assert contradictions([unknown, one, two], bag="slide") == []
    blank_first = contradictions([unknown, one, replace(two, event=0)], bag="slide")
    assert "patient 'P' has 0 here and 1 in row 2" in blank_first[0], "a blank row hides nothing"
    assert OWN_LABELS in contradictions([one, two])  # the way out is named


def test_curves_of_slides_say_so() -> None:
    rows = [{"time": 1.0 + k, "event": 1, "risk": k % 2, "risk_threshold": 0.5} for k in range(6)]
    assert risk_curves.counted(rows) == ""
    assert risk_curves.counted([row | {"unit": "slide"} for row in rows]) == "slides"


def test_a_class_with_slides_of_few_patients_is_refused() -> None:
    owner = {"a": "p", "b": "p", "c": "q", "d": "r"}
    strata = splits.of_owners({"a": 0, "b": 1, "c": 0, "d": 0}, owner)
    assert strata == {"p": (0, 1), "q": (0,), "r": (0,)}
    with pytest.raises(splits.SplitError, match="slides of 1 patients for 2 folds"):
        splits.enough_owners(strata, 2)
    assert splits.of_owners({"a": 0, "b": 0, "c": 1, "d": 1}, owner) == {"p": 0, "q": 1, "r": 1}
