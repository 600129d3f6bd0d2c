"""A search by random draws: every model the same number, chosen on validation, the test folds sealed until then."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mhim.configs import lookup
from mhim.configs.schema import TrainConfig
from mhim.mil import tuning
from mhim.mil.ranges import Choice, Span
from mhim.pipeline.cohort import patients
from mhim.pipeline.resume import runner, stage
from mhim.pipeline.stages.train import Train
from mhim.pipeline.store import layout
from mhim.pipeline.store.layout import StoreError
from mhim.pipeline.training import draws
from mhim.pipeline.training.card import Card
from tests.pipeline.bags import make_features, tree
from tests.pipeline.trained import SMALL, carried_out, in_turn, kill_after, scored, settings, trained

MODELS = lookup.names("mhim.mil.models")


@pytest.mark.parametrize("model", MODELS)
def test_every_range_is_of_a_setting_and_within_its_bounds(model: str) -> None:
    fields = lookup.find("mhim.mil.models", model).Params.model_fields
    own = set(tuning.ranges(model)) - set(tuning.COMMON)
    assert own <= set(fields), f"{model} declares ranges of {sorted(own - set(fields))}, which it has not"
    config = TrainConfig(model=model, model_params={"student": "dsmil"} if model == "mhim" else {})
    seen = []
    for k in range(1, 40):
        drawn = tuning.apply(config, k)
        lookup.params(lookup.find("mhim.mil.models", model), drawn.model_params)  # raises where a bound is broken
        seen.append(json.dumps([drawn.lr, drawn.model_params], sort_keys=True))
    assert len(set(seen)) == 39
    assert tuning.apply(config, 0) == config


def test_a_draw_is_of_its_number_and_the_settings_name_alone() -> None:
    one, two = (tuning.draw(TrainConfig(model=m), 3) for m in ("abmil", "gated_abmil"))
    assert one == two
    assert tuning.draw(TrainConfig(model="abmil"), 4) != one
    taught = tuning.draw(TrainConfig(model="mhim", model_params={"student": "abmil"}), 3)
    assert (taught.train, taught.student) == (one.train, one.params)
    assert (Span(1e-3, 10.0, log=True).at(0.5), Span(0.0, 8.0).at(0.25), Choice((1, 2, 3)).at(0.99)) == (0.1, 2.0, 3)


def card(value: float | None) -> Any:
    class Told:
        headline, validation = "auc", {"auc": value}

    return Told()


def test_the_best_on_validation_is_chosen_and_a_tie_goes_to_the_earlier() -> None:
    assert draws.choose([card(0.7), card(0.9), card(0.9)]).number == 1
    assert draws.choose([card(0.9), card(0.9)]).number == 0
    found = draws.choose([None, card(None), card(0.2)])
    assert (found.number, found.of, found.failed) == (2, 3, (0,))
    assert draws.choose([None, card(None)]).number == 1
    with pytest.raises(StoreError, match="no draw"):
        draws.choose([None, None])


@pytest.fixture
def cohort(tmp_path: Path) -> tuple[layout.Work, Any]:
    work = layout.Work(tmp_path / "w")
    return work, make_features(work)


def test_test_patients_cannot_be_read_before_the_choice(cohort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work, rows = cohort
    config = settings(draws=3, seeds=2)
    data = patients.labelled(rows, work.features("texture"), config.train)
    folds = patients.make_folds(data, config.train)
    # who looks at the features of a test patient of fold 0 before the choice fails
    hidden = {path for p in data.patients if p.id in folds[0].test for path in p.stores}
    read = patients.StoredBag._read

    def blind_read(path: Path) -> Any:
        if path in hidden:
            raise StoreError(f"{path} is sealed")
        return read(path)

    made = Train(work, config, "run", data, folds)
    items = [i for i in made.items() if i.output.name.startswith("fold_0")]
    search = [i for i in items if not i.data.part]
    assert len(search) == 3
    assert all(i.data.fold.test == () for i in search)
    monkeypatch.setattr(patients.StoredBag, "_read", staticmethod(blind_read))
    report = runner.run(stage.plan(made, search), in_turn)
    assert not report.failures, report.failures
    opened = [i for i in items if i.data.part]
    assert [i.key for i in opened] == ["fold_0", "fold_0_seed_1"]
    report = runner.run(stage.plan(made, opened), in_turn)
    assert len(report.failures) == 2
    before = {i.key: tree(i.output) for i in search}
    monkeypatch.undo()
    # with them there, the same search is opened: its trainings are not made again
    whole = carried_out(Train(work, config, "run", data, folds))
    assert not whole.failures, whole.failures
    assert {i.key: tree(i.output) for i in search} == before
    for item in search:
        with open(item.output / "predictions.csv", newline="") as f:
            assert {r["side"] for r in csv.DictReader(f)} == {"val"}
        told = json.loads((item.output / "model.json").read_text())
        assert (told["test"], told["split"]["test"]) == ({}, 0)


def test_a_search_is_scored_as_any_run_and_its_fold_is_the_chosen_draw(cohort: Any) -> None:
    work, rows = cohort
    config = settings(draws=3, seeds=2)
    report = trained(work, rows, config)
    assert not report.failures, report.failures
    run = work.run("run")
    for place in ("fold_0", "fold_1", "fold_0_seed_1"):
        told = Card.of(json.loads((run / place / "model.json").read_text()), place)
        assert told.drawn is not None
        of = run / "draws" / str(told.drawn.number)
        best = [json.loads((run / "draws" / str(k) / place[:6] / "model.json").read_text()) for k in range(3)]
        values = [c["validation"]["auc"] for c in best]
        assert told.drawn.number == values.index(max(values))
        assert (run / place / "model.safetensors").read_bytes() == (of / place / "model.safetensors").read_bytes()
        assert told.train["lr"] == tuning.apply(config.train, told.drawn.number).lr
        assert told.test["auc"] is not None
    found = scored(work, config)
    assert found["choices"]["draws"]["cells"] == 3
    assert sum(found["choices"]["draws"]["chosen"].values()) == 2
    assert "draws: 3" in (run / "config.yaml").read_text()
    # the default draw equals the training alone, but for what it may not see
    plain = settings(seeds=2)
    trained(work, rows, plain, "plain")
    alone = (work.run("plain") / "fold_0" / "model.safetensors").read_bytes()
    assert (run / "draws" / "0" / "fold_0" / "model.safetensors").read_bytes() == alone
    assert "draws" not in (work.run("plain") / "config.yaml").read_text()


def test_a_killed_search_goes_on_to_the_same_bytes(
    cohort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, rows = cohort
    config = settings(draws=2, model="mhim", model_params={"student": "abmil", "student_params": SMALL["abmil"]})
    trained(work, rows, config)
    whole = tree(work.run("run"))
    other = layout.Work(tmp_path / "v")  # where no twin of a training lies
    make_features(other)
    kill_after(monkeypatch, [1, 2, 99, 1, 3])
    ends = 0
    for _ in range(12):
        try:
            report = trained(other, rows, config)
            break
        except SystemExit:
            ends += 1
    assert ends == 4
    assert not report.failures, report.failures
    again = {k: v for k, v in tree(other.run("run")).items() if k.endswith(("csv", "safetensors", "model.json"))}
    assert again == {k: v for k, v in whole.items() if k in again}
    assert "fold_1/model.safetensors" in again


def test_a_draw_that_fails_is_counted_and_the_others_are_chosen_between(
    cohort: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, rows = cohort
    monkeypatch.setattr(tuning, "COMMON", {"lr": Choice((1e30,))})
    report = trained(work, rows, settings(draws=2))
    assert len(report.failures) == 2
    told = json.loads((work.run("run") / "fold_0" / "model.json").read_text())
    assert told["drawn"] == {"number": 0, "draws": 2, "failed": [1], "settings": {}}
    assert scored(work, settings(draws=2))["choices"]["failed"] == 2
