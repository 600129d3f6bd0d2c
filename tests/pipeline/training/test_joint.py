"""Fused runs with a network that reads bag and tables: beside the rest, blind to test patients, resumed to the same.

A whole run has twelve networks; where a claim is of one fold, only what that fold needs is trained.
"""

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
from mhim.mil import tasks
from mhim.mil import train as loop
from mhim.mil.fusion import coattn, columns, joined
from mhim.mil.fusion.joined import JOINT
from mhim.mil.fusion.outcome import NotFused
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.cohort.patients import StoredBag
from mhim.pipeline.resume import runner, stage
from mhim.pipeline.resume.stage import State
from mhim.pipeline.stages.train import Train
from mhim.pipeline.store import layout
from mhim.pipeline.store import tables as csv
from mhim.pipeline.training import bundle, fold, fusion_bundle
from mhim.pipeline.training.joint import Joint
from tests.pipeline import fused
from tests.pipeline.bags import tree
from tests.pipeline.trained import in_turn, kill_after, scored


def config(**train: Any) -> Config:
    params = {"width": 8, "hidden": 8, "layers": 0}
    return fused.config(**({"fusion": "coattn", "fusion_params": params, "epochs": 1, "survival_bins": 2} | train))


def some(made: Train, *keys: str) -> stage.Report:
    """Train these alone, and what they are made of."""
    return runner.run(stage.plan(made, [i for i in made.items() if i.key in keys]), in_turn)


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


def test_the_network_is_one_more_member_and_its_answers_come_back_from_the_bundle(work: layout.Work) -> None:
    """Of two tables, which a single patient has both of: one of the two folds learns from nobody who has all."""
    rows, tables = fused.cohort(work, "survival")
    names = tables["clinical"].patients
    for table, whose in (("rna", names[:21]), ("clinical", names[20:])):
        tables[table] = replace(tables[table], rows=tables[table].rows.of(whose))
    given = config()
    report = fused.trained(work, rows, tables, given)
    assert not report.failures, report.failures
    run = work.run("run")
    assert len(list(run.glob("joint/inner/fold_*/fold_*/patterns.csv"))) == 4
    scored(work, given)
    found = json.loads((run / "fusion.json").read_text())
    assert set(found["alone"]) == {"slide", "clinical", "rna", JOINT} == set(found["removed"])
    assert found["best_single"] != JOINT
    assert sum(w["mean"] for w in found["weights"].values()) == pytest.approx(1.0)
    assert set(found["tables"]) == {"clinical", "rna"}
    patterns = {tuple(p["of"]): p["weights"] for p in found["patterns"]}
    for of in (("slide", "rna"), ("slide", "clinical"), ("slide", "clinical", "rna")):
        assert set(patterns[of]) == {*of, JOINT}
        assert sum(w["mean"] for w in patterns[of].values()) == pytest.approx(1.0)
    weighed = [json.loads((run / f"fold_{k}" / "fusion.json").read_text())["late"]["joined"] for k in (0, 1)]
    (known,) = (one[-1] for one in weighed if one[-1]["of"] == ["slide", "clinical", "rna"])
    assert found["skill"][JOINT] == {"mean": known["late"]["skill"][JOINT], "sd": None}
    # a patient that is scored anew has the answer that the training wrote
    fusion = fusion_bundle.read(run / "fold_0")
    assert fusion is not None
    written = {r["patient"]: r for r in csv.read(run / "fold_0" / "predictions.csv") if r["side"] == "test"}
    slide = {r["patient"]: r for r in csv.read(run / "slide" / "fold_0" / "predictions.csv") if r["side"] == "test"}
    patients = fused.training(work, rows, tables, given).data.by_id()
    for name in written:
        logits = [np.array([float(slide[name]["logit_0"]), float(slide[name]["logit_1"])])]
        bag = StoredBag(patients[name].stores)
        (answer,), rest_on = fusion.of_bags(name, logits, {n: t.rows for n, t in tables.items()}, [bag])
        assert answer[0] == pytest.approx(float(written[name]["logit_0"]), abs=1e-5)
        if "rna" in rest_on:
            assert fusion.of_bags(name, None, {"rna": tables["rna"].rows})[1] == "rna"


def test_the_network_answers_alike_in_whatever_order_tables_are_given() -> None:
    rng = np.random.default_rng(0)
    rows = {n: Rows(("p", "q", "r"), ("A", "B"), rng.normal(size=(3, 2)), {}, {}) for n in ("rna", "clinical")}
    known = {n: columns.fit(r, columns.Options()) for n, r in rows.items()}
    with loop.seeded(0):
        network = coattn.build(3, 2, known, coattn.Params(width=8, hidden=8)).eval()
    of = Joint(network, known, None, tasks.Classification(("no", "yes")), 0.5)
    bag = rng.normal(size=(4, 3)).astype(np.float32), np.zeros((4, 2), np.int32), 1.0
    one = of.answers("p", lambda: bag, rows)
    two = of.answers("p", lambda: bag, dict(reversed(rows.items())))
    assert one.keys() == two.keys()
    assert joined.key(("slide", "clinical", "rna")) in one
    for k, scores in one.items():
        np.testing.assert_allclose(scores, two[k], rtol=1e-6)


@pytest.mark.parametrize("task", ["classification", "ordinal", "regression"])
def test_every_outcome_is_fused(work: layout.Work, task: str) -> None:
    rows, tables = fused.cohort(work)
    if task != "classification":  # 0, 1, 2 in turn, or a number
        rows = [
            replace(r, label=str(i % 3) if task == "ordinal" else f"{i * 0.37 % 5:.2f}") for i, r in enumerate(rows)
        ]
    report = some(fused.training(work, rows, {"rna": tables["rna"]}, config(task=task)), "fold_0")
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
    given, needed = config(survival_loss="cox"), ("fold_0", "joint/fold_1")
    made = fused.training(work, rows, tables, given)
    assert not some(made, *needed).failures
    folds = made.folds
    held = set(folds[0].test)
    table = tables["rna"].rows
    worse = np.where(np.isin(table.patients, list(held))[:, None], table.values * 100, table.values)
    poisoned = {"rna": replace(tables["rna"], rows=replace(table, values=worse))}
    swapped = [replace(r, time=r.time * 3 + 1, event=1 - r.event) if r.patient in held else r for r in rows]  # type: ignore[operator]
    made = fused.training(work, swapped, poisoned, given, "poisoned")
    made.folds = folds
    assert not some(made, *needed).failures

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


def test_killed_between_two_epochs_and_given_its_tables_in_another_order_it_ends_in_the_same_bytes(
    work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tables = fused.cohort(work)
    made = [fused.training(work, rows, t, config(epochs=3)) for t in (tables, dict(reversed(tables.items())))]
    assert some(made[0], "joint/fold_0").count(State.DONE) == 1
    before = tree(work.run("run"))
    shutil.rmtree(work.run("run") / "joint/fold_0")
    kill_after(monkeypatch, [2])
    with pytest.raises(SystemExit):
        some(made[1], "joint/fold_0")
    assert not (work.run("run") / "joint/fold_0").exists()
    assert some(made[1], "joint/fold_0").count(State.DONE) == 1
    after = tree(work.run("run"))
    assert {k: v for k, v in after.items() if ".seal" not in k} == {k: v for k, v in before.items() if ".seal" not in k}


def test_what_has_no_meaning_is_refused_before_any_training(work: layout.Work) -> None:
    rows, tables = fused.cohort(work)
    with pytest.raises(LookupFailed, match="depth"):
        fused.training(work, rows, tables, config(fusion_params={"depth": 3})).items()
    with pytest.raises(LookupFailed, match="width 8 is not a multiple of 3"):
        fused.training(work, rows, tables, config(fusion_params={"width": 8, "heads": 3})).items()
    with pytest.raises(NotFused, match="fusion=late has no settings"):
        fused.training(work, rows, tables, config(fusion="late")).items()
    with pytest.raises(NotFused, match="cannot be called joint"):
        fused.training(work, rows, {"joint": tables["rna"]}, config()).items()
    made = fused.training(work, rows, tables, config())
    made.data = replace(made.data, outcomes=made.data.outcomes * 2)
    with pytest.raises(NotFused, match="is of one outcome"):
        made.items()
