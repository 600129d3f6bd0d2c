"""New patients of several slides: one bag as in training, or as the settings say; what labels say of them is told."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mhim.pipeline.cohort.patients import StoredBag
from mhim.pipeline.results import measures, views
from mhim.pipeline.store import layout, reading
from mhim.pipeline.training import bundle, fold
from tests.pipeline.bags import make_features, sets, write_labels
from tests.pipeline.numbered import COX

Cli = Callable[..., tuple[int, str]]
QUICK = [
    *sets("train.folds=2", "train.val_fraction=0.4", "train.epochs=4", "train.lr=0.01", "score.bootstrap=40"),
    "--workers",
    "1",
]


@pytest.fixture
def run(tmp_path: Path, cli: Cli) -> Path:
    """A trained and scored run in a work folder."""
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 16))
    shared = ["--work", work.root, *QUICK]
    code, text = cli("train", *shared, "--labels", labels, "--model", "abmil")
    assert code == 0, text
    assert cli("score", *shared, "--name", "abmil", "--heatmaps", "none")[0] == 0
    return work.run("abmil")


def other(folder: Path, slides_each: int = 3) -> tuple[layout.Work, Path]:
    """Features of four strangers with several slides each, and their labels."""
    work = layout.Work(folder)
    return work, write_labels(folder / "labels.csv", make_features(work, 4, slides_each, seed=5, prefix="x"))


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def alone(run: Path, stores: list[Path]) -> np.ndarray:
    """(folds,) probability of "yes" for one bag of these stores, by the models themselves."""
    from mhim.mil import train as loop
    from mhim.pipeline.cohort.patients import Patient

    found = []
    for folder in bundle.find(run):
        one = bundle.read(folder)
        patient = Patient("x", tuple(p.name for p in stores), tuple(stores), None, "")
        (got,) = loop.predict(one.model(), fold.cases([patient], 0.5), one.task, one.scale)
        z = got.logits / one.card.softening
        found.append(float(1 / (1 + np.exp(z[0] - z[1]))))
    return np.array(found)


def test_a_new_patient_s_slides_are_one_bag(run: Path, cli: Cli, tmp_path: Path) -> None:
    strangers, labels = other(tmp_path / "other")
    code, text = cli(
        "score",
        "--work",
        run.parents[1],
        "--name",
        "abmil",
        "--features",
        strangers.features("texture"),
        "--labels",
        labels,
        "--heatmaps",
        "none",
        *QUICK,
    )
    assert code == 0, text
    out = run / "new" / "texture"
    rows = read(out / "predictions.csv")
    assert [r["patient"] for r in rows] == ["xp00", "xp01", "xp02", "xp03"]
    for i, row in enumerate(rows):
        slides = [f"xs{i:02d}_{j}.svs" for j in range(3)]
        assert row["slide"] == ";".join(slides)
        assert row["label"] == ("no", "yes")[i % 2]
        stores = [strangers.feature_store("texture", s) for s in slides]
        expected = alone(run, stores)
        assert float(row["p_yes"]) == pytest.approx(expected.mean(), rel=1e-5)
        assert float(row["spread"]) == pytest.approx(expected.std(ddof=1), rel=1e-4)
        parts = [np.asarray(reading.read_array(out / "scores" / f"{s}.zarr", "attention")) for s in slides]
        assert [len(p) for p in parts] == StoredBag(tuple(stores)).rows()  # each slide keeps its own tiles
        assert sum(p.sum() for p in parts) == pytest.approx(1, rel=1e-5)  # over the patient
    found = json.loads((out / "metrics.json").read_text())
    assert (found["patients"], found["slides"], found["without_label"]) == (4, 12, 0)
    assert found["decisions"]["external"]["patients"] == 4
    assert found["decisions"]["internal"]["patients"] == 16
    assert set(found["reliability"]) == {"before", "after"}
    each = read(out / "predictions_by_model.csv")  # a ranking is the mean of the models', a decision the one handed out
    aucs = [
        roc_auc_score([r["label"] == "yes" for r in own], [float(r["p_yes"]) for r in own])
        for own in ([r for r in each if r["fold"] == k] for k in ("0", "1"))
    ]
    assert found["external"]["auc"]["value"] == pytest.approx(np.mean(aucs), abs=1e-9)
    assert found["external_models"]["auc"]["sd"] == pytest.approx(np.std(aucs, ddof=1), abs=1e-9)
    joint = roc_auc_score([r["label"] == "yes" for r in rows], [float(r["p_yes"]) for r in rows])
    assert found["external_ensemble"]["auc"]["value"] == pytest.approx(joint, abs=1e-9)
    right = [r["label"] == r["decision"] for r in rows]
    assert found["external"]["accuracy"]["value"] == pytest.approx(np.mean(right), abs=1e-9)
    assert np.trace(found["confusion"]) == sum(right)
    assert "sensitivity, frozen thresholds" in text
    former = out / "targets" / "er"  # as it was left by the run of several targets that had this name
    former.mkdir(parents=True)
    (former / "predictions.csv").write_text("of another model")
    again = ("score", "--work", run.parents[1], "--name", "abmil", "--features", strangers.features("texture"), *QUICK)
    code, text = cli(*again, "--heatmaps", "none")
    assert code == 0, text
    assert "metrics.json was of the predictions before and is removed" in " ".join(text.split())
    assert not (out / "metrics.json").exists()
    assert [view.target for view in views.of(out)] == [""]
    assert len(read(out / "predictions.csv")) == 12, "of slides: no table tells whose they are"


@pytest.mark.parametrize("how", ["mean", "max"])
def test_slides_scored_alone_are_joined_as_asked(run: Path, cli: Cli, tmp_path: Path, how: str) -> None:
    strangers, labels = other(tmp_path / "other")
    shared = [
        "score",
        "--work",
        run.parents[1],
        "--name",
        "abmil",
        "--features",
        strangers.features("texture"),
        "--labels",
        labels,
        "--heatmaps",
        "none",
        *QUICK,
    ]
    assert cli(*shared)[0] == 0  # as one bag first: another grouping must follow without a refusal
    code, text = cli(*shared, "--set", f"score.several_slides={how}")
    assert code == 0, text
    for i, row in enumerate(read(run / "new" / "texture" / "predictions.csv")):
        each = np.stack([alone(run, [strangers.feature_store("texture", f"xs{i:02d}_{j}.svs")]) for j in range(3)])
        joined = each.mean(0) if how == "mean" else each.max(0)  # per fold, then over the folds
        assert float(row["p_yes"]) == pytest.approx(joined.mean(), rel=1e-5)


def test_without_rows_each_slide_is_a_patient_and_labels_that_come_later_join_them(
    run: Path, cli: Cli, tmp_path: Path
) -> None:
    strangers, labels = other(tmp_path / "other")
    shared = [
        "score",
        "--work",
        run.parents[1],
        "--name",
        "abmil",
        "--features",
        strangers.features("texture"),
        "--heatmaps",
        "none",
        *QUICK,
    ]
    assert cli(*shared)[0] == 0
    out = run / "new" / "texture"
    assert len(read(out / "predictions.csv")) == 12
    assert not (out / "metrics.json").exists()
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join([*lines[:-1], "gone.svs,xp09,yes"]) + "\n")
    code, text = cli(*shared, "--labels", labels)
    assert code == 0, text
    assert "gone.svs" in text  # a row without features is told
    assert "no row tells the patient of 1 slides" in text
    rows = read(out / "predictions.csv")
    assert [r["patient"] for r in rows] == ["xp00", "xp01", "xp02", "xp03", "xs03_2.svs"]
    assert [r["label"] for r in rows] == ["no", "yes", "no", "yes", ""]
    assert json.loads((out / "metrics.json").read_text())["without_label"] == 1


@pytest.mark.parametrize(
    ("factor", "says"),
    [
        (30.4, ["12 of 12 new patients have times beyond the", "30.4 times): another unit, such as days and months"]),
        (1 / 30.4, ["0.0329 times): another unit"]),
        (1.5, ["7 of 12 new patients have times beyond the longest"]),
        (1.0, []),
    ],
)
def test_times_in_another_unit_are_told(factor: float, says: list[str]) -> None:
    times = [float(t) for t in range(10, 22)]
    told = measures.of(COX).odd([{"time": factor * t} for t in times], [{"time": str(t)} for t in times])
    assert len(told) == len(says)
    for said, expected in zip(told, says, strict=True):
        assert expected in said


def test_labels_without_new_slides_are_refused(run: Path, cli: Cli, tmp_path: Path) -> None:
    code, text = cli("score", "--work", run.parents[1], "--name", "abmil", "--labels", tmp_path / "labels.csv", *QUICK)
    assert code == 2
    assert "name the slides" in text


@pytest.mark.parametrize("grouped", [True, False])
def test_tcga_slides_without_a_table_are_grouped_as_in_training(tmp_path: Path, cli: Cli, grouped: bool) -> None:
    """Another slide of a patient that the run knows is no stranger, and slides of one new patient are one bag."""
    work, new = layout.Work(tmp_path / "work"), layout.Work(tmp_path / "new")
    rows = make_features(work, 12, prefix="TCGA-AA-10")
    named = {r.slide: f"TCGA-AA-10{k:02d}-01Z-00-DX1.svs" for k, r in enumerate(rows)}
    for old, name in named.items():
        work.feature_store("texture", old).rename(work.feature_store("texture", name))
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label\n" + "".join(f"{named[r.slide]},{r.label}\n" for r in rows))
    assert cli("train", "--work", work.root, "--labels", labels, "--model", "mean", *QUICK)[0] == 0
    strangers = [r.slide for r in make_features(new, 3, seed=4)]
    names = ["TCGA-AA-1003-01Z-00-DX2.svs", "TCGA-BB-0001-01Z-00-DX1.svs", "TCGA-BB-0001-01Z-00-DX2.svs"]
    for old, name in zip(strangers, names, strict=True):
        new.feature_store("texture", old).rename(new.feature_store("texture", name))
    code, text = cli(
        "score",
        "--work",
        work.root,
        "--name",
        "mean",
        "--features",
        new.features("texture"),
        "--heatmaps",
        "none",
        *QUICK,
        *([] if grouped else ["--no-tcga-patients"]),
    )
    assert code == 0, text
    rows_of = {r["patient"]: r for r in read(work.run("mean") / "new" / "texture" / "predictions.csv")}
    if not grouped:
        assert set(rows_of) == set(names)
        return
    assert "3 slides: they are of 2 patients by their TCGA barcodes" in " ".join(text.split())
    assert rows_of["TCGA-BB-0001"]["slide"] == ";".join(names[1:])
    assert rows_of["TCGA-AA-1003"]["known"].startswith("TCGA-AA-1003 of the run (the same patient id)")
