"""`train.choice`: which model of a fold is kept, by which evidence, and what the run says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhim.configs.load import ConfigError, validate
from mhim.configs.schema import TrainConfig
from mhim.mil import tasks
from mhim.mil.preference import Pair
from mhim.pipeline.cohort import patients
from mhim.pipeline.resume import stage
from mhim.pipeline.stages.train import Train
from mhim.pipeline.store import layout
from mhim.pipeline.training import bundle, choices, fold, kept
from tests.pipeline.bags import make_features, tree
from tests.pipeline.trained import kill_after, mhim, scored, settings, trained, until_done

TWO = tasks.classification(("no", "yes"), [0, 1])


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


def pair(simple: list[float], other: list[float]) -> Pair:
    logits = [np.stack([np.zeros(4), np.array(x)], axis=1) for x in (simple, other)]
    return Pair(TWO, np.array([1, 1, 0, 0]), logits[0], logits[1], np.arange(4))


BETTER = pair([3, 1, 2, 0], [4, 3, 2, 1])  # +0.25 +- 0.433, see tests/mil/test_preference.py


@pytest.mark.parametrize(
    ("of", "margin", "why"),
    [
        (BETTER, 1.0, "AUC +0.250 ± 0.433 (paired, 4 validation patients) against the plain model: too little to tell"),
        (BETTER, 0.5, None),
        (pair([4, 3, 2, 1], [3, 1, 2, 0]), 0.5, "AUC -0.250 ± 0.433 (paired, 4 validation patients)"),
        (pair([4, 3, 2, 1], [9, 8, 1, 0]), 0.0, "AUC +0.000 ± 0.000 (paired, 4 validation patients)"),  # a tie
    ],
)
def test_the_student_is_kept_only_where_it_is_better_by_the_margin(of: Pair, margin: float, why: str | None) -> None:
    config = TrainConfig(model="mhim", choice="margin", choice_margin=margin)
    found = kept.weighed([of], TWO, kept.VALIDATION, config)
    assert (found.why is None) == (why is None)
    assert found.record is not None
    assert found.record.standard_error is not None
    if why is not None:
        assert found.why is not None
        assert found.why.startswith(why)
        assert found.by == "validation"
    else:
        assert found.note == (
            "the student is kept: AUC +0.250 ± 0.433 (paired, 4 validation patients) against the plain model"
        )
    assert found.record.told == (abs(found.record.difference or 0) > margin * found.record.standard_error)
    nothing = kept.weighed([], TWO, kept.VALIDATION, config)
    assert nothing.why == (
        "0 validation patients define no difference of AUC to the plain model: too little to tell, so the simpler "
        "model is kept"
    )


def test_by_a_margin_the_plain_model_is_kept_and_the_run_says_by_which_evidence(work: layout.Work) -> None:
    rows = make_features(work, 24)
    told = settings(**mhim(), choice="margin", choice_margin=50.0, epochs=2)
    assert not trained(work, rows, told).failures
    card = bundle.card_of(work.run("run") / "fold_0")
    assert card.fallback is not None
    assert card.choice is not None
    assert (card.model, card.fallback.by) == ("abmil", "validation")
    assert (card.choice.rule, card.choice.by, card.choice.margin, card.choice.told) == ("margin", "validation", 50, 0)
    val = [fold.read_side(work.run("run") / p / "fold_0", "val") for p in ("", "teacher")]
    assert card.choice.patients == len(val[0]) == card.split.val
    assert val[0] == val[1]
    found = scored(work, told)
    assert found["choices"]["weighed"]["untold"] == 2
    assert found["per_fold"][0]["choice"] == card.choice.plain()
    lines = choices.lines(choices.count([bundle.card_of(f) for f in bundle.find(work.run("run"))]))
    assert "2 of 2 by validation; 0 of 2 kept their own model" in lines[0]
    assert "better by 50 paired standard errors" in lines[1]
    assert "too little to tell in 2 of 2 trainings, which kept the simpler model" in lines[1]


def test_a_student_that_is_better_by_the_margin_is_kept(work: layout.Work, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_features(work, 40)
    poor = mhim(student_start="fresh", mask_ratio_h=0.8, share_max=1.0)
    config = settings(**poor, choice="margin", choice_margin=0.0, fallback=1e9, epochs=1, val_fraction=0.5)
    assert not trained(work, rows, config).failures
    before = [bundle.card_of(f) for f in bundle.find(work.run("run"))]
    shutil.rmtree(work.runs)
    whole = fold.pair
    monkeypatch.setattr(fold, "pair", lambda task, plain, student: whole(task, student, plain))  # evidence turned round
    made = trained(work, rows, config)
    after = [bundle.card_of(f) for f in bundle.find(work.run("run"))]
    worse = 0
    for fallen, card in zip(before, after, strict=True):
        assert fallen.choice is not None
        assert card.choice is not None
        assert fallen.choice.difference is not None
        assert fallen.fallback is not None
        assert card.choice.difference == -fallen.choice.difference
        if fallen.choice.difference:  # else a tie, which is the plain model's both times
            assert fallen.fallback.why.endswith("against the plain model: masking hurts here")
            assert card.fallback is None
            assert card.model == "mhim"
            worse += 1
    assert worse
    assert sum("the student is kept: AUC +" in n for o in made.outcomes for n in o.notes) == worse


def test_small_validation_asks_inner_folds_and_a_kill_ends_in_the_same_bytes(
    work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_features(work, 24)
    config = settings(**mhim(student_start="fresh"), choice="inner", choice_folds=2, epochs=2)
    report_ = trained(work, rows, config)
    assert not report_.failures, report_.failures
    calm, run = tree(work.runs), work.run("run")
    card = bundle.card_of(run / "fold_0")
    assert card.choice is not None
    assert (card.choice.by, card.choice.folds, card.choice.of_folds) == ("inner", 2, 2)
    assert card.choice.patients == card.split.train + card.split.val == 12  # each of them, once
    # the difference by hand: AUC of each inner fold's pair of models on whom it held out
    value = 0.0
    for k in (0, 1):
        heads = []
        for place in (f"inner/fold_0/fold_{k}", f"teacher/inner/fold_0/fold_{k}"):
            own = bundle.card_of(run / place)
            assert own.fallback is None
            test = fold.read_side(run / place, "test")
            outer = {r["patient"] for r in fold.read_side(run / "fold_0", "test")}
            assert not outer & {r["patient"] for r in fold.read_predictions(run / place)}
            heads.append(fold.metrics_of(test, own.task.value, {})["auc"])
        value += len(test) * (heads[0] - heads[1]) / 12
    assert card.choice.difference == pytest.approx(value, abs=1e-12)
    line = choices.lines(choices.count([card]))[1]
    assert "on 12 patients held out in inner folds" in line
    again = trained(work, rows, config)
    assert {o.state for o in again.outcomes} == {stage.State.SKIPPED}
    shutil.rmtree(work.runs)
    kill_after(monkeypatch, [1, 1, 1, 1, 1, 1])
    resumed, stops = until_done(work, rows, config)
    assert stops >= 4
    assert not resumed.failures
    assert tree(work.runs) == calm


def test_enough_validation_asks_no_inner_folds_and_a_search_does(work: layout.Work) -> None:
    rows = make_features(work, 24)
    enough = settings(**mhim(), choice="inner", choice_patients=2, epochs=1)
    assert not trained(work, rows, enough, "enough").failures
    assert not (work.run("enough") / "inner").exists()
    found = bundle.card_of(work.run("enough") / "fold_0").choice
    assert found is not None
    assert (found.rule, found.by) == ("inner", "validation")
    search = settings(**mhim(), choice="inner", choice_folds=2, epochs=1, draws=2, seeds=2)
    assert not trained(work, rows, search, "search").failures
    for name in ("fold_0", "fold_0_seed_1"):
        found = bundle.card_of(work.run("search") / name).choice
        assert found is not None
        assert (found.by, found.patients) == ("inner", 12)


def test_only_what_the_choice_decides_has_it_in_its_fingerprint(work: layout.Work) -> None:
    """Plain models and students of `point` are those of before there was a choice."""
    rows = make_features(work)
    assert not trained(work, rows, settings(**mhim(), epochs=1)).failures
    before = tree(work.runs)
    assert b"choice" not in before["run/config.yaml"]
    assert b"choice" not in before["run/fold_0/model.json"]
    again = trained(work, rows, settings(**mhim(), epochs=1, choice_margin=3.0, choice_patients=5))
    assert {o.state for o in again.outcomes} == {stage.State.SKIPPED}
    with pytest.raises(stage.Refused, match=r"input\.choice"):
        trained(work, rows, settings(**mhim(), epochs=1, choice="margin"))
    plain = trained(work, rows, settings(epochs=1, choice="margin"), "plain")
    assert {o.state for o in plain.outcomes} == {stage.State.DONE}
    assert all("the same training" in o.notes[0] for o in plain.outcomes)  # taken from the teachers above
    margin = trained(work, rows, settings(**mhim(), epochs=1, choice="margin", choice_margin=2.0), "margin")
    assert not margin.failures
    assert b"choice_margin: 2.0" in tree(work.runs)["margin/config.yaml"]
    attrs = json.loads((work.run("margin") / "fold_0" / layout.SEAL).read_text())
    assert "margin" in json.dumps(attrs)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"choice": "inner", "fusion": "late"}, "choice=inner goes with no fusion"),
        ({"choice": "inner", "protocol": "paper"}, "choice=inner needs validation patients"),
        ({"choice": "margin", "protocol": "paper"}, "choice=margin needs validation patients"),
    ],
    ids=["fusion", "inner of paper", "margin of paper"],
)
def test_evidence_is_refused_where_there_is_none(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        validate({"train": wrong})


def test_where_no_fallback_is_allowed_nothing_is_weighed(work: layout.Work) -> None:
    rows = make_features(work)
    assert not trained(work, rows, settings(**mhim(), choice="inner", fallback=None, epochs=1)).failures
    cards = [bundle.card_of(f) for f in bundle.find(work.run("run"))]
    assert [c.choice for c in cards] == [None, None]
    assert not (work.run("run") / "inner").exists()
    (line,) = choices.lines(choices.count(cards))
    assert line.startswith("no fallback to the plain model was allowed (train.fallback)")


def test_few_validation_patients_that_decide_alone_are_told(work: layout.Work) -> None:
    rows = make_features(work, 12)

    def told(rows: Any = rows, work: layout.Work = work, **train: Any) -> list[str]:
        config = settings(**mhim() | train)
        data = patients.labelled(rows, work.features("texture"), config.train)
        return Train(work, config, "run", data, patients.make_folds(data, config.train)).told()

    assert told(draws=2) == told()
    assert told() == [
        "run: in a fold 2 validation patients choose between the model and its plain model, which are few: "
        "train.choice=inner asks the whole training part too, for about 5 times the trainings"
    ]
    several = layout.Work(work.root / "several")
    assert told(make_features(several, 12, slides_each=2), several, bag="slide") == told()  # patients, not slides
    silent = [{"choice": "margin"}, {"fallback": None}, {"select": "last"}, {"choice_patients": 2}]
    assert [told(**one) for one in (*silent, {"model": "abmil", "model_params": {}})] == [[]] * 5


def test_slides_as_bags_are_weighed_by_patient_and_patients_stay_whole_inside(work: layout.Work) -> None:
    rows = make_features(work, 16, slides_each=2)
    config = settings(**mhim(), choice="inner", choice_folds=2, bag="slide", epochs=1, fallback=1e9)
    assert not trained(work, rows, config).failures
    card = bundle.card_of(work.run("run") / "fold_0")
    assert card.choice is not None
    assert (card.choice.by, card.choice.patients) == ("inner", 8)
    assert card.split.train + card.split.val == 16  # slides
    sides = fold.read_predictions(work.run("run") / "inner" / "fold_0" / "fold_0")
    whose = {side: {r["patient"] for r in sides if r["side"] == side} for side in ("val", "test")}
    assert not whose["val"] & whose["test"]
