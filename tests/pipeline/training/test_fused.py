"""Runs that fuse slides with tables: every modality beside, nothing seen that may not be, resumed to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mhim.mil.fusion import gate, late
from mhim.mil.fusion.gate import Gate
from mhim.mil.fusion.late import Late
from mhim.mil.fusion.outcome import NotFused
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.pictures import modalities, report
from mhim.pipeline.results import fused as results
from mhim.pipeline.resume.stage import State
from mhim.pipeline.store import layout
from mhim.pipeline.store import tables as csv
from mhim.pipeline.training import bundle, fusion_bundle
from mhim.pipeline.training.fused import crossed
from mhim.pipeline.viewer import runs, verdict
from tests.pipeline import fused
from tests.pipeline.bags import tree
from tests.pipeline.trained import mhim, scored


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


@pytest.mark.parametrize("kind", ["classification", "survival"])
def test_a_fused_run_stands_beside_each_modality_alone(work: layout.Work, kind: str) -> None:
    rows, tables = fused.cohort(work, kind)
    config = fused.config(survival_bins=2, fusion_groups=("rna",) if kind == "survival" else ())
    report = fused.trained(work, rows, tables, config)
    assert not report.failures, report.failures
    run = work.run("run")
    assert {p.name for p in run.iterdir() if p.is_dir() and p.name[0] != "."} == {"fold_0", "fold_1", "slide", "tables"}
    assert len(list(run.glob("slide/inner/fold_*/fold_*/model.json"))) == 4
    found = scored(work, config)
    beside = json.loads((run / "fusion.json").read_text())
    assert found["test"][found["headline"]]["value"] == pytest.approx(beside["fused"]["value"], abs=1e-12)
    assert set(beside["alone"]) == {"slide", "clinical", "rna"} == set(beside["removed"])
    for one in (*beside["alone"].values(), *beside["removed"].values()):
        low, high = one["fused_minus"]["low"], one["fused_minus"]["high"]
        assert low <= one["fused_minus"]["value"] <= high
        assert one["fused_minus"]["value"] == pytest.approx(beside["fused"]["value"] - one["value"]["value"], abs=1e-9)
    assert sum(w["mean"] for w in beside["weights"].values()) == pytest.approx(1.0)
    assert {g["name"] for g in beside["tables"]["rna"]["groups"]} == {"PATHWAY_A", "PATHWAY_B"}


def test_training_again_makes_nothing_and_a_lost_fold_comes_back_to_the_same_bytes(work: layout.Work) -> None:
    rows, tables = fused.cohort(work)
    config = fused.config()
    fused.trained(work, rows, tables, config)
    before = tree(work.run("run"))
    assert fused.trained(work, rows, tables, config).count(State.DONE) == 0
    import shutil

    for lost in ("fold_0", "tables/rna/fold_1", "slide/inner/fold_0/fold_1"):
        shutil.rmtree(work.run("run") / lost)
    report = fused.trained(work, rows, tables, config)
    assert report.count(State.DONE) == 3
    after = tree(work.run("run"))
    assert {k: v for k, v in after.items() if ".seal" not in k} == {k: v for k, v in before.items() if ".seal" not in k}


def test_the_slide_part_is_the_same_training_as_a_run_of_slides_alone(work: layout.Work) -> None:
    rows, tables = fused.cohort(work)
    config = fused.config()
    alone = config.model_copy(update={"train": config.train.model_copy(update={"fusion": "none"})})
    from tests.pipeline.trained import trained

    trained(work, rows, alone, "alone")
    report = fused.trained(work, rows, tables, config)
    taken = [o for o in report.outcomes if any("the same training" in n for n in o.notes)]
    assert [o.key for o in taken] == ["slide/fold_0", "slide/fold_1"]
    for fold in ("fold_0", "fold_1"):
        one, two = (work.run("alone") / fold, work.run("run") / "slide" / fold)
        assert (one / "predictions.csv").read_bytes() == (two / "predictions.csv").read_bytes()


def test_a_model_with_a_teacher_is_fused_too(work: layout.Work) -> None:
    rows, tables = fused.cohort(work)
    config = fused.config(**mhim(), folds=2, epochs=2, fusion="gate")
    assert fused.training(work, rows, tables, config).told() == []  # no advice of choice=inner, which a fusion refuses
    report = fused.trained(work, rows, tables, config)
    assert not report.failures, report.failures
    assert (work.run("run") / "teacher" / "fold_0" / "model.json").is_file()
    assert len(list(work.run("run").glob("teacher/inner/fold_*/fold_*/model.json"))) == 4
    card = bundle.card_of(work.run("run") / "fold_0")
    assert card.fusion is not None
    assert card.fusion.kind == "gate"
    scored(work, config)
    found = json.loads((work.run("run") / "fusion.json").read_text())
    assert sum(w["mean"] for w in found["weights"].values()) == pytest.approx(1.0)


def test_held_out_rows_and_outcomes_change_no_fitted_number(work: layout.Work, tmp_path: Path) -> None:
    """Poisoned: the test patients' cells times 100, their outcomes swapped. Every fit stays the same, byte for byte."""
    rows, tables = fused.cohort(work, "survival")
    config = fused.config(survival_loss="cox")
    fused.trained(work, rows, tables, config)
    first = fused.training(work, rows, tables, config).folds[0]
    held = set(first.test)
    poisoned = {
        n: _changed(t, lambda values, who: np.where(np.isin(who, list(held))[:, None], values * 100, values))
        for n, t in tables.items()
    }
    swapped = [replace(r, time=r.time * 3 + 1, event=1 - r.event) if r.patient in held else r for r in rows]  # type: ignore[operator]
    made = fused.training(work, swapped, poisoned, config, "poisoned")
    made.folds = fused.training(work, rows, tables, config).folds
    from mhim.pipeline.resume import runner, stage
    from tests.pipeline.trained import in_turn

    assert not runner.run(stage.plan(made, made.items()), in_turn).failures
    for name in ("fusion.json", "fusion.safetensors", "model.safetensors"):
        one, two = (work.run(r) / "fold_0" / name for r in ("run", "poisoned"))
        assert one.read_bytes() == two.read_bytes(), name
    for part in ("tables/clinical", "tables/rna"):
        for name in ("table.json", "model.safetensors"):
            assert (work.run("run") / part / "fold_0" / name).read_bytes() == (
                work.run("poisoned") / part / "fold_0" / name
            ).read_bytes(), (part, name)
    val = [
        [r for r in csv.read(work.run(n) / "fold_0" / "predictions.csv") if r["side"] == "val"]
        for n in ("run", "poisoned")
    ]
    assert val[0] == val[1]


def test_one_patients_row_changes_no_other_patients_answer(work: layout.Work) -> None:
    rows, tables = fused.cohort(work)
    config = fused.config()
    fused.trained(work, rows, tables, config)
    fusion = fusion_bundle.read(work.run("run") / "fold_0")
    assert fusion is not None
    whole = {n: t.rows for n, t in tables.items()}
    names = tables["clinical"].patients
    logits = [np.array([0.1 * i, -0.2]) for i in range(len(names))]
    together = fusion.answers(logits, {n: r.of(names) for n, r in whole.items()})
    for i in (0, 7, 39):
        (alone,) = fusion.answers([logits[i]], {n: r.of([names[i]]) for n, r in whole.items()})
        assert (alone.logits == together[i].logits).all()
    without = fusion.answers(logits, {})
    assert [a.weights for a in without] == [{"slide": 1.0}] * len(names)
    differences = np.array([a.logits[1] - a.logits[0] for a in without])
    assert (np.argsort(differences) == np.argsort([x[1] - x[0] for x in logits])).all()


@pytest.mark.parametrize("fit", [late.fit, gate.fit])
def test_what_thresholds_rest_on_is_weighed_without_its_own_patients(fit: Callable[..., Late | Gate]) -> None:
    """Another outcome of an inner fold's patients changes no fused score of theirs."""
    rng = np.random.default_rng(0)
    outside = {m: rng.normal(size=(30, 2)) for m in ("slide", "rna")}
    outside["rna"][:4] = np.nan
    inner = [np.arange(i, 30, 3) for i in range(3)]
    target = (outside["slide"][:, 1] + rng.normal(size=30) > 0).astype(np.int64)
    before = crossed(fit, outside, target, "classes", inner, 2)
    for left in inner:
        other = target.copy()
        other[left] = 1 - other[left]
        after = crossed(fit, outside, other, "classes", inner, 2)
        np.testing.assert_array_equal(after[left], before[left])
        assert (np.delete(after, left, axis=0) != np.delete(before, left, axis=0)).any()


def test_who_has_only_what_the_other_folds_lack_gets_their_mean() -> None:
    rng = np.random.default_rng(1)
    outside = {m: rng.normal(size=(12, 1)) for m in ("slide", "rna")}
    inner = [np.arange(0, 6), np.arange(6, 12)]
    outside["rna"][6:] = np.nan  # nobody of the second fold has it
    outside["slide"][0] = np.nan
    made = crossed(late.fit, outside, np.arange(12.0), "number", inner, 0)
    assert made[0, 0] == pytest.approx(made[1:].mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"grid": {"lr": (0.1, 0.01)}}, "no train.grid"), ({"protocol": "paper"}, "protocol=honest")],
)
def test_settings_that_contradict_a_fusion_are_refused(work: layout.Work, changes: dict, message: str) -> None:
    rows, tables = fused.cohort(work)
    with pytest.raises(NotFused, match=message):
        fused.training(work, rows, tables, fused.config(**changes)).items()
    with pytest.raises(NotFused, match="needs a table"):
        fused.training(work, rows, {}, fused.config()).items()


def _changed(table, change: Callable[[np.ndarray, np.ndarray], np.ndarray]):  # type: ignore[no-untyped-def]
    rows: Rows = table.rows
    return replace(table, rows=replace(rows, values=change(rows.values, np.array(rows.patients))))


def test_pictures_and_report_of_the_modalities(work: layout.Work) -> None:
    rows, tables = fused.cohort(work, "survival")
    config = fused.config(survival_bins=2)
    fused.trained(work, rows, tables, config)
    scored(work, config)
    run = work.run("run")
    found = json.loads((run / "fusion.json").read_text())
    assert {p.stem for p in (run / "fusion").glob("*.svg")} == set(modalities.titles(found)) - {"groups_clinical"}
    shares = results.shares([run / "fold_0", run / "fold_1"])
    assert set(shares) == {r.patient for r in rows}
    lacking = set(tables["clinical"].patients) - set(tables["rna"].patients)
    for patient, share in shares.items():
        assert sum(share.weights.values()) == pytest.approx(1.0)
        assert (
            set(share.weights)
            == set(share.parts)
            == {"slide", "clinical", "rna"} - ({"rna"} if patient in lacking else set())
        )
    steps = csv.read(run / "fusion" / "kaplan_meier_rna.csv")
    first = {(s["model"], s["group"]): int(s["at_risk"]) for s in reversed(steps)}  # at the first time
    for model in ("fused", "rna"):
        assert first[model, "low"] + first[model, "high"] == len(rows) - len(lacking)  # only who has the modality
    text = report.write(work, run).path.read_text()
    assert "rna alone" in text
    assert "without clinical at test" in text
    assert text.count(f"<td>{rows[0].patient}</td>") == 2  # with its answer, and with its weights
    assert "Kaplan–Meier, fused and slide alone" in text
    (seen,) = runs.of_run(run)
    told = verdict.modalities(seen.shares[rows[0].patient], seen.task)
    assert told["unit"] == "log risk"
    assert {m["name"]: m["weight"] for m in told["modalities"]} == shares[rows[0].patient].weights
    assert verdict.modalities(None, seen.task) == {}
