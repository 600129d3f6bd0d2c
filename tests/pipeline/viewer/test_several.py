"""A run of several targets on real slides, survival among them: each target is a run of the viewer."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from mhim.mil.tasks import Several
from mhim.pipeline.cli.main import _main
from mhim.pipeline.results import estimand, predictions, views
from mhim.pipeline.store import layout, reading
from mhim.pipeline.training import bundle
from mhim.pipeline.viewer.data import Gallery
from tests.pipeline.bags import sets

QUICK = [
    *sets("train.epochs=2", "train.min_epochs=1", "train.folds=2", "train.lr=0.02", "score.bootstrap=20"),
    *sets("train.model=abmil", "train.model_params={width: 8, attention_width: 8}", "train.survival_loss=cox"),
    *sets("train.cox_bags=4", "train.val_fraction=0.4"),
    *("--workers", "1", "--name", "one"),
]


def test_every_target_is_a_run_with_answers_and_layers_of_its_own(
    tiled_cohort: Path, demo_cohort: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiled_cohort, tmp_path / "work")
    work = layout.Work(tmp_path / "work")
    with open(demo_cohort / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["slide,patient,tumour,share,time,event"]
    for i, row in enumerate(rows):
        lines.append(f"{row['slide']},P{i},{row['label']},{5 + 9 * i},{3 + i},{int(i % 4 > 0)}")
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(lines) + "\n")
    columns = ["--label-column", "tumour,share", "--time-column", "time", "--event-column", "event"]
    given = ["--labels", labels, *columns, "--task", "share=regression"]
    shared = ["--work", work.root, *QUICK]
    for words in (["train", *shared, *given], ["score", *shared, "--heatmaps", "none"]):
        assert _main([str(w) for w in words]) == 0, words
    run = work.run("one")
    slide = estimand.read(run / "predictions.csv")[0]["slide"].split(";")[0]
    gallery = Gallery(work)
    try:
        assert [r.name for r in gallery.runs] == ["one, tumour", "one, share", "one, survival"]
        number = {s.id: i for i, s in enumerate(gallery.slides)}[slide]
        told = {p["run"]: p for p in gallery.index()["slides"][number]["predictions"]}
        (share,) = [
            r for r in estimand.read(views.View(run, "share").folder / "predictions.csv") if r["slide"] == slide
        ]
        assert gallery.index()["slides"][number]["label"] == told[0]["label"]  # a share is no class to choose by
        assert told[1]["value"] == pytest.approx(share["predicted"])
        shown = {r["run"]: [x["name"] for x in r["layers"]] for r in gallery.about(number)["runs"]}
        of_classes = [f"probability_{c}" for c in gallery.runs[0].task.classes]
        assert set(of_classes[-1:]) <= set(shown[0])
        assert {"value", "contribution_value"} <= set(shown[1])
        assert {"risk", "contribution_risk"} <= set(shown[2])
        evidence = reading.read_array(run / "scores" / f"{slide}.zarr", "evidence")
        found = bundle.read(predictions.folds_of(run)[0]).task
        assert isinstance(found, Several)
        own = np.asarray(evidence)[:, found.slices["share"]][:, 0]  # in the labels' unit already
        raw = np.frombuffer(gallery.values(1, shown[1].index("value"), number), np.uint8)
        served = np.ascontiguousarray(raw.reshape(4, -1).T).view("<f4")[:, 0]
        assert served == pytest.approx(own, rel=1e-5)
    finally:
        gallery.read.close()
