"""The Train and Score stages on tiny feature stores: what a run holds, teachers, fallbacks, grids."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mhim.configs.load import ConfigError
from mhim.mil import train as loop
from mhim.pipeline.cli.values import grid_of
from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.results import predictions
from mhim.pipeline.resume import stage
from mhim.pipeline.stages import runs
from mhim.pipeline.store import layout, reading, seals
from mhim.pipeline.training import bundle, kept, plan
from mhim.pipeline.training import fold as training
from tests.pipeline.bags import WIDTH, make_features, tree
from tests.pipeline.trained import carried_out, mhim, scored, settings, trained


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


@pytest.mark.parametrize("student", ["abmil", "dsmil", "transmil"])
def test_mhim_trains_in_bfloat16_with_several_bags_a_step(student: str, work: layout.Work) -> None:
    config = settings(**mhim(student), amp=True, batch_bags=3, accumulate=2, epochs=2, max_tiles=6, balance="weights")
    report = trained(work, make_features(work, 10), config)
    assert not report.failures, report.failures
    with open(work.run("run") / "fold_0" / "history.csv", newline="") as f:
        assert all(np.isfinite(float(r["loss"])) for r in csv.DictReader(f))


def test_a_run_holds_what_the_readme_says(work: layout.Work) -> None:
    config = settings(**mhim())
    rows = make_features(work, slides_each=2)
    assert not trained(work, rows, config).failures
    found = scored(work, config)
    run = work.run("run")
    names = set(tree(run))
    for fold in ("fold_0", "fold_1"):
        for part in (fold, f"teacher/{fold}"):
            files = ("model.safetensors", "model.json", "predictions.csv", "history.csv")
            assert {f"{part}/{n}" for n in files} <= names
    assert {"config.yaml", "splits.csv", "predictions.csv", "metrics.json"} <= names
    assert found["patients"] == 12
    assert found["unit"] == "patient"
    assert {"auc", "auprc", "balanced_accuracy", "f1", "kappa", "brier", "ece"} <= found["test"].keys()
    assert any("one seed" in w for w in found["warnings"])
    hashes = {line.split(",")[-1] for line in (run / "splits.csv").read_text().splitlines()[1:]}
    assert hashes == {found["split_hash"]}
    for slide in (r.slide for r in rows):
        attention = reading.read_array(run / "scores" / f"{slide}.zarr", "attention")
        assert len(attention) == len(reading.read_array(work.feature_store("texture", slide), "coords"))
    text = "".join(b.decode(errors="ignore") for n, b in tree(run).items() if n.endswith((".json", ".csv", ".yaml")))
    assert str(work.root) not in text  # no path of this machine in a result
    header = (run / "predictions.csv").read_text().splitlines()[0]
    assert header.startswith("slide,patient,repeat,fold,seed,label,p_no,p_yes")


def test_every_patient_is_tested_once_by_a_model_that_never_saw_it(work: layout.Work) -> None:
    config = settings()
    trained(work, make_features(work), config)
    stage_ = runs.held_out(work, config, work.run("run"))
    assert len(stage_.models) == 12
    for patient, (folder,) in stage_.models.items():
        sides = [r["side"] for r in training.read_predictions(folder) if r["patient"] == patient]
        assert sides == ["test"]


def test_the_teacher_is_taken_from_a_plain_run_and_the_other_way_round(
    work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_features(work)
    trained(work, rows, settings(), "plain")
    calls = []
    whole = training.train_fold
    monkeypatch.setattr(training, "train_fold", lambda job, *a: calls.append(job.config.model) or whole(job, *a))
    report = trained(work, rows, settings(**mhim()), "mhim")
    assert calls == ["mhim", "mhim"]
    (note,) = next(o.notes for o in report.outcomes if o.key == "teacher/fold_0")
    assert note == "taken from the run plain, where it is the same training"
    for fold in ("fold_0", "fold_1"):
        one, two = work.run("plain") / fold, work.run("mhim") / "teacher" / fold
        assert tree(one) == tree(two)


def test_results_follow_a_fold_that_comes_later(work: layout.Work) -> None:
    config = settings()
    trained(work, make_features(work), config)
    whole = scored(work, config)
    (work.run("run") / "fold_1").rename(work.root / "aside")  # as if it had failed
    part = scored(work, config)
    assert len(part["per_fold"]) == len(whole["per_fold"]) - 1
    (work.root / "aside").rename(work.run("run") / "fold_1")
    assert scored(work, config) == whole


def test_what_is_only_being_made_is_no_twin(work: layout.Work) -> None:
    rows = make_features(work)
    trained(work, rows, settings(), "plain")
    hidden = work.run("other") / ".tmp" / "host-1-abcdef" / "out"
    hidden.parent.mkdir(parents=True)
    (work.run("plain") / "fold_0").rename(hidden)
    report = trained(work, rows, settings(), "plain")
    assert not next(o.notes for o in report.outcomes if o.key == "fold_0")


def test_a_teacher_equals_the_same_training_made_alone(work: layout.Work, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_features(work)
    monkeypatch.setattr(seals, "twin", lambda root, fingerprint, but: None)
    trained(work, rows, settings(), "plain")
    trained(work, rows, settings(**mhim()), "mhim")
    assert tree(work.run("plain") / "fold_0") == tree(work.run("mhim") / "teacher" / "fold_0")


def test_the_student_starts_from_its_teacher(work: layout.Work) -> None:
    rows = make_features(work)
    config = settings(**mhim(student_start="teacher"), lr=1e-12, weight_decay=0.0)  # a step that changes nothing
    trained(work, rows, config)
    plain = bundle.read(work.run("run") / "teacher" / "fold_0").weights
    for name, value in bundle.read(work.run("run") / "fold_0").weights.items():
        part, _, own = name.partition(".")
        if part in ("student", "teacher"):
            np.testing.assert_allclose(value, plain[own], atol=1e-6)


def test_where_masking_hurts_the_plain_model_takes_over_and_says_so(work: layout.Work) -> None:
    rows = make_features(work)
    config = settings(**mhim(student_start="fresh"), fallback=0.0, epochs=2)
    report = trained(work, rows, config)
    fallen = {o.key for o in report.outcomes if any("plain model is used" in n for n in o.notes)}
    assert fallen, "with no tolerance at all some fold must fall back"
    for key in fallen:
        mine, plain = (bundle.read(work.run("run") / p / key) for p in ("", "teacher"))
        assert mine.card.model == "abmil"
        assert mine.card.fallback.model == "mhim"
        assert all((mine.weights[k] == v).all() for k, v in plain.weights.items())
        assert mine.card.test == plain.card.test
        assert (mine.card.epoch, mine.card.epochs) == (plain.card.epoch, plain.card.epochs)
        told = [work.run("run") / p / key / "history.csv" for p in ("", "teacher")]
        assert told[0].read_bytes() == told[1].read_bytes()
    found = scored(work, config)
    assert any("fell back to the plain model" in w for w in found["warnings"])
    never = trained(work, rows, settings(**mhim(student_start="fresh"), fallback=None, epochs=2), "never")
    assert not any("plain model" in n for o in never.outcomes for n in o.notes)


def test_where_validation_prefers_the_plain_model_it_takes_over(work: layout.Work) -> None:
    rows = make_features(work, 24)
    poor = {
        **mhim(student_start="fresh", mask_ratio_h=0.8, share_max=1.0),
        "fallback": 1e9,
        "epochs": 8,
        "lr": 0.02,
        "val_fraction": 0.5,
    }
    for select, seeds in (("best", 3), ("last", 1)):
        report = trained(work, rows, settings(**poor, select=select, seeds=seeds), select)
        told = {o.key for o in report.outcomes if any("validation AUC" in n for n in o.notes)}
        assert bool(told) == (select == "best")
        for outcome in report.outcomes:
            if outcome.key.startswith("teacher"):
                continue
            mine, plain = (bundle.read(work.run(select) / p / outcome.key) for p in ("", "teacher"))
            if outcome.key in told:
                assert mine.card.fallback.model == "mhim"
                assert mine.card.test == plain.card.test
            elif select == "best":
                assert mine.card.validation["auc"] >= plain.card.validation["auc"]
    tie = {"auc": plain.card.validation["auc"]}
    assert kept.outdone(tie, plain, plain.task) is None
    assert kept.outdone({}, plain, plain.task) is None  # no validation part


def test_same_command_does_nothing_more_seeds_add_and_other_settings_are_refused(work: layout.Work) -> None:
    rows = make_features(work)
    trained(work, rows, settings())
    before = tree(work.runs)
    again = trained(work, rows, settings())
    assert {o.state for o in again.outcomes} == {stage.State.SKIPPED}
    more = trained(work, rows, settings(seeds=2))
    assert sorted(o.key for o in more.outcomes if o.state is stage.State.DONE) == ["fold_0_seed_1", "fold_1_seed_1"]
    assert {k: v for k, v in tree(work.runs).items() if k in before and k != "run/config.yaml"} == {
        k: v for k, v in before.items() if k != "run/config.yaml"
    }
    with pytest.raises(stage.Refused, match=r"train\.lr: 0\.01 there, 0\.02 now"):
        trained(work, rows, settings(lr=0.02))


def test_a_grid_is_chosen_on_validation_fold_by_fold(work: layout.Work) -> None:
    rows = make_features(work, 16)
    config = settings(seeds=2, grid={"attention_width": (4, 8), "lr": (0.01, 1e-7)}, epochs=6)
    assert not trained(work, rows, config).failures
    cells = sorted(p.name for p in (work.run("run") / "grid").iterdir())
    assert cells == [
        "attention_width-4_lr-0.01",
        "attention_width-4_lr-1e-07",
        "attention_width-8_lr-0.01",
        "attention_width-8_lr-1e-07",
    ]
    found = scored(work, config)
    assert len(found["per_fold"]) == 4  # two folds, two seeds, one cell each
    for fold in (0, 1):
        mean = {}
        for cell in cells:
            folders = (work.run("run") / "grid" / cell).glob(f"fold_{fold}*")
            mean[cell] = np.mean([bundle.read(p).card.validation["auc"] for p in folders])
        chosen = {f["cell"] for f in found["per_fold"] if f["fold"] == fold}
        assert len(chosen) == 1
        assert mean[chosen.pop()] == max(mean.values())
    assert len(predictions.cell_table(work.run("run"))) == 4


def test_mhim_cells_share_one_teacher_per_fold(work: layout.Work) -> None:
    config = settings(**mhim(), grid={"mask_ratio_h": (0.1, 0.3), "merge_k": (1, 2)}).train
    folds = cases.make_folds(cases.labelled(make_features(work), work.features("texture"), config), config)
    jobs = plan.jobs(config, folds)
    assert len(jobs) == 8
    assert len({(j.teacher.cell, j.teacher.name) for j in jobs if j.teacher}) == 2
    with pytest.raises(ConfigError, match=r"mask_ratio_h=0\.01"):
        grid_of(["mask_ratio_h"])
    found = grid_of(["merge_k=1,5 merge=mean,mca", "lr=0.1"])
    assert found == {"merge_k": [1, 5], "merge": ["mean", "mca"], "lr": [0.1]}


def test_the_paper_protocol_selects_on_test_and_says_so(work: layout.Work) -> None:
    rows = make_features(work)
    config = settings(protocol="paper")
    trained(work, rows, config)
    found = scored(work, config)
    assert any("optimistic" in w for w in found["warnings"])
    card = json.loads((work.run("run") / "fold_0" / "model.json").read_text())
    assert card["split"]["val"] == 0
    history = (work.run("run") / "fold_0" / "history.csv").read_text().splitlines()[1:]
    assert card["test"]["auc"] == pytest.approx(max(float(line.split(",")[-1]) for line in history))


def test_new_slides_are_scored_without_labels_and_strangers_refused(work: layout.Work, tmp_path: Path) -> None:
    config = settings()
    trained(work, make_features(work), config)
    other = layout.Work(tmp_path / "other")
    make_features(other, 3, seed=5, prefix="x")
    out = work.run("run") / "new" / "texture"
    stage_ = runs.new_slides(config, work, work.run("run"), other.features("texture"), out)
    assert not carried_out(stage_).failures
    rows = predictions.of_new_slides(stage_, config.score)
    assert [r["slide"] for r in rows] == ["xs00_0.svs", "xs01_0.svs", "xs02_0.svs"]
    assert all(r["p_no"] + r["p_yes"] == pytest.approx(1) for r in rows)
    seal = out / "scores" / "xs02_0.svs.zarr" / "zarr.json"  # of the trainings before, where scoring it again failed
    told = json.loads(seal.read_text())
    told["attributes"]["settings"]["input.models"] = ["before"]
    seal.write_text(json.dumps(told))
    assert predictions.of_new_slides(stage_, config.score) == rows[:2]
    for key, value in (("encoder", "uni2"), ("mpp", 0.25), ("weights_id", "w2"), ("tile_px", 512)):
        strange = layout.Work(tmp_path / key)
        make_features(strange, 2, **{key: value} if key != "encoder" else {"encoder": "texture"})
        facts = {**cases.unlabelled(strange.features("texture")).facts, key: value}
        with pytest.raises(bundle.BundleError, match=f"{key}: trained on .*given"):
            bundle.read(work.run("run") / "fold_0").check(facts)


def test_slides_unlike_the_training_slides_are_told(work: layout.Work, tmp_path: Path) -> None:
    config = settings()
    trained(work, make_features(work, 16), config)
    for shift, strange in ((0.0, False), (40.0, True)):
        other = layout.Work(tmp_path / str(shift))
        make_features(other, 3, seed=5, shift=shift, prefix="x")
        stage_ = runs.new_slides(
            config, work, work.run("run"), other.features("texture"), work.run("run") / "new" / str(shift)
        )
        report = carried_out(stage_)
        assert not report.failures
        assert [predictions.UNLIKE in o.notes for o in report.outcomes] == [strange] * 3
        assert [r["unlike"] > 1 for r in predictions.of_new_slides(stage_, config.score)] == [strange] * 3
    own = carried_out(runs.held_out(work, config, work.run("run")))
    assert not any(predictions.UNLIKE in o.notes for o in own.outcomes)


def test_a_bundle_is_read_back_exactly_and_holds_no_surprise(work: layout.Work) -> None:
    trained(work, make_features(work), settings(standardize=True))
    found = bundle.read(work.run("run") / "fold_0")
    assert found.scale is not None
    assert found.scale[0].shape == (WIDTH,)
    data = cases.unlabelled(work.features("texture"))
    known = {r["patient"]: r for r in training.read_predictions(work.run("run") / "fold_0") if r["side"] == "test"}
    model = found.model()
    for p in loop.predict(model, training.cases(data.patients, 0.5), found.task, found.scale):
        row = next((r for r in known.values() if json.loads(r["slides"]) == [p.case.patient]), None)
        if row is not None:
            np.testing.assert_allclose(p.logits, [float(row["logit_0"]), float(row["logit_1"])], rtol=1e-6)
    (work.run("run") / "fold_0" / "model.json").write_text("{")
    with pytest.raises(bundle.BundleError, match="damaged"):
        bundle.read(work.run("run") / "fold_0")


def test_standardising_by_the_rule_is_told_and_recorded(work: layout.Work) -> None:
    report = trained(work, make_features(work, shift=30.0), settings(standardize="auto"))
    found = bundle.read(work.run("run") / "fold_0")
    assert found.scale is not None
    assert found.card.standardized is not None
    assert found.card.standardized["rms"] > 20
    assert all("standardised: the features are of size" in note for o in report.outcomes for note in o.notes)
    assert any(o.notes for o in report.outcomes)


def test_large_features_are_told_unless_the_model_standardises_by_itself(work: layout.Work) -> None:
    rows = make_features(work, shift=30.0)
    raw = trained(work, rows, settings(epochs=1))
    assert all("were taken as they are" in note for o in raw.outcomes for note in o.notes)
    assert any(o.notes for o in raw.outcomes)
    control = trained(work, rows, settings(epochs=1, model="mean_linear", model_params={}), "control")
    assert not [note for o in control.outcomes for note in o.notes]


def test_the_share_that_mhim_learnt_stands_in_its_card(work: layout.Work) -> None:
    asked = mhim(mask="evidence", learn_left=True)
    report = trained(work, make_features(work, 16), settings(**asked, epochs=1, fallback=None))
    assert not report.failures, report.failures
    found = bundle.read(work.run("run") / "fold_0")
    assert found.card.calibrated == {"evidence_left": float(found.weights["left"])}
    assert bundle.card_of(work.run("run") / "teacher" / "fold_0").calibrated is None
