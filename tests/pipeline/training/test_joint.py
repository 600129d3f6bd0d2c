"""Fused runs with a network that reads bag and tables: beside the rest, blind to test patients, resumed to the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhim.configs.lookup import LookupFailed
from mhim.configs.schema import Config
from mhim.mil.fusion.joined import JOINT
from mhim.mil.fusion.outcome import NotFused
from mhim.pipeline.cohort.patients import StoredBag
from mhim.pipeline.resume import runner, stage
from mhim.pipeline.resume.stage import State
from mhim.pipeline.store import layout
from mhim.pipeline.store import tables as csv
from mhim.pipeline.training import bundle, fold, fusion_bundle
from tests.pipeline import fused
from tests.pipeline.bags import tree
from tests.pipeline.trained import in_turn, kill_after, scored


def config(**train: Any) -> Config:
    params = {"width": 8, "hidden": 8, "layers": 0}
    return fused.config(**({"fusion": "coattn", "fusion_params": params, "epochs": 2, "survival_bins": 2} | train))


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


def test_the_network_is_one_more_member_and_its_answers_come_back_from_the_bundle(work: layout.Work) -> None:
    rows, tables = fused.cohort(work, "survival")
    tables = {"rna": tables["rna"]}
    given = config()
    report = fused.trained(work, rows, tables, given)
    assert not report.failures, report.failures
    run = work.run("run")
    assert len(list(run.glob("joint/inner/fold_*/fold_*/patterns.csv"))) == 4
    scored(work, given)
    found = json.loads((run / "fusion.json").read_text())
    assert set(found["alone"]) == {"slide", "rna", JOINT} == set(found["removed"])
    assert found["best_single"] != JOINT
    assert sum(w["mean"] for w in found["weights"].values()) == pytest.approx(1.0)
    assert set(found["tables"]) == {"rna"}
    both = next(p for p in found["patterns"] if p["of"] == ["slide", "rna"])
    assert set(both["weights"]) == {"slide", "rna", JOINT}
    # a patient that is scored anew has the answer that the training wrote
    fusion = fusion_bundle.read(run / "fold_0")
    assert fusion is not None
    written = {r["patient"]: r for r in csv.read(run / "fold_0" / "predictions.csv") if r["side"] == "test"}
    slide = {r["patient"]: r for r in csv.read(run / "slide" / "fold_0" / "predictions.csv") if r["side"] == "test"}
    known = fused.training(work, rows, tables, given).data.by_id()
    for name in written:
        logits = [np.array([float(slide[name]["logit_0"]), float(slide[name]["logit_1"])])]
        bag = StoredBag(known[name].stores)
        (answer,), rest_on = fusion.of_bags(name, logits, {"rna": tables["rna"].rows}, [bag])
        assert answer[0] == pytest.approx(float(written[name]["logit_0"]), abs=1e-5)
        if rest_on != "slide":
            assert fusion.of_bags(name, None, {"rna": tables["rna"].rows})[1] == "rna"


@pytest.mark.parametrize("task", ["classification", "ordinal", "regression"])
def test_every_outcome_is_fused(work: layout.Work, task: str) -> None:
    rows, tables = fused.cohort(work)
    if task != "classification":  # 0, 1, 2 in turn, or a number
        rows = [
            replace(r, label=str(i % 3) if task == "ordinal" else f"{i * 0.37 % 5:.2f}") for i, r in enumerate(rows)
        ]
    given = config(task=task, folds=2, epochs=1)
    report = fused.trained(work, rows, {"rna": tables["rna"]}, given)
    assert not report.failures, report.failures
    card = bundle.card_of(work.run("run") / "fold_0")
    assert card.task.kind == task
    found = [
        [float(v) for k, v in r.items() if k.startswith("logit_")]
        for r in fold.read_predictions(work.run("run") / "fold_0")
    ]
    assert np.isfinite(found).all()
    assert len({tuple(f) for f in found}) > 20


def test_held_out_rows_and_outcomes_change_no_byte_of_the_network(work: layout.Work) -> None:
    rows, tables = fused.cohort(work, "survival")
    tables = {"rna": tables["rna"]}
    given = config(survival_loss="cox", epochs=1)
    fused.trained(work, rows, tables, given)
    folds = fused.training(work, rows, tables, given).folds
    held = set(folds[0].test)
    table = tables["rna"].rows
    worse = np.where(np.isin(table.patients, list(held))[:, None], table.values * 100, table.values)
    poisoned = {"rna": replace(tables["rna"], rows=replace(table, values=worse))}
    swapped = [replace(r, time=r.time * 3 + 1, event=1 - r.event) if r.patient in held else r for r in rows]  # type: ignore[operator]
    made = fused.training(work, swapped, poisoned, given, "poisoned")
    made.folds = folds
    assert not runner.run(stage.plan(made, made.items()), in_turn).failures

    def same(name: str) -> bool:
        one, two = ((work.run(r) / name).read_bytes() for r in ("run", "poisoned"))
        return one == two

    names = ("joint.json", "joint.safetensors", "model.safetensors")
    inner = [p.relative_to(work.run("run")) for p in work.run("run").glob("joint/inner/fold_0/fold_*")]
    assert len(inner) == 2
    for place in ("joint/fold_0", "fold_0/joint", *map(str, inner)):
        for name in names:
            assert same(f"{place}/{name}"), (place, name)
    assert same("fold_0/fusion.json")
    assert not same("joint/fold_1/joint.safetensors")  # whose training part they are
    test = [
        [r for r in csv.read(work.run(n) / "fold_0" / "predictions.csv") if r["side"] == "test"]
        for n in ("run", "poisoned")
    ]
    assert test[0] != test[1]


def test_killed_between_two_epochs_it_ends_in_the_same_bytes(
    work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tables = fused.cohort(work)
    tables, given = {"rna": tables["rna"]}, config(epochs=3)
    fused.trained(work, rows, tables, given)
    before = tree(work.run("run"))
    for lost in ("joint/fold_0", "fold_0"):
        shutil.rmtree(work.run("run") / lost)
    kill_after(monkeypatch, [2])
    with pytest.raises(SystemExit):
        fused.trained(work, rows, tables, given)
    assert not (work.run("run") / "joint/fold_0").exists()
    report = fused.trained(work, rows, tables, given)
    assert report.count(State.DONE) == 2
    after = tree(work.run("run"))
    assert {k: v for k, v in after.items() if ".seal" not in k} == {k: v for k, v in before.items() if ".seal" not in k}


def test_what_has_no_meaning_is_refused_before_any_training(work: layout.Work) -> None:
    rows, tables = fused.cohort(work)
    with pytest.raises(LookupFailed, match="depth"):
        fused.training(work, rows, tables, config(fusion_params={"depth": 3})).items()
    with pytest.raises(NotFused, match="fusion=late has no settings"):
        fused.training(work, rows, tables, config(fusion="late")).items()
    with pytest.raises(NotFused, match="cannot be called joint"):
        fused.training(work, rows, {"joint": tables["rna"]}, config()).items()
