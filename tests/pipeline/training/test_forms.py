"""MHIM tries its published form first, and keeps it where its student fits whole training bags."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhim.configs.schema import fingerprint_fields
from mhim.mil import tasks
from mhim.mil import train as loop
from mhim.mil.feed import Case
from mhim.mil.models import mhim as model
from mhim.mil.parts.mhim_settings import PUBLISHED, Params
from mhim.pipeline.resume.stage import Refused
from mhim.pipeline.store import layout
from mhim.pipeline.training import bundle, choices, experiment_log, fitting, kept
from tests.pipeline.bags import make_features, tree
from tests.pipeline.trained import kill_after, mhim, scored, settings, trained, until_done

UNFIT = "training loss 1 with whole bags, against 0 of the plain model"


def test_the_published_form_is_first_and_keeps_what_was_set_by_hand() -> None:
    first, last = model.forms(Params(mask_ratio_h=0.1, share_max=0.5))
    assert (first.name, last.name) == ("published", "guarded")
    assert (first.within, last.within) == (0.25, None)
    assert {first.params.mask_ratio_h, last.params.mask_ratio_h} == {0.1}
    assert {first.params.share_max, last.params.share_max} == {0.5}
    assert first.params.student_start == "fresh"
    assert last.params == Params(mask_ratio_h=0.1, share_max=0.5, published_within=None)
    whole = Params(**PUBLISHED)
    assert [f.name for f in model.forms(whole)] == ["guarded"], "both would be the same"
    assert [f.name for f in model.forms(Params(published_within=None))] == ["guarded"]


def test_without_the_published_form_the_fingerprint_is_that_of_runs_from_before_it() -> None:
    assert "published_within" not in fingerprint_fields(Params(published_within=None))
    assert fingerprint_fields(Params())["published_within"] == 0.25


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "w")


@pytest.fixture
def rows(work: layout.Work) -> Any:
    return make_features(work)


def only(work: layout.Work, name: str) -> bundle.Bundle:
    return bundle.read(work.run(name) / "fold_0")


def test_what_is_kept_is_the_same_training_as_that_form_alone(
    work: layout.Work, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = {"fallback": None, "epochs": 2}
    monkeypatch.setattr(kept, "unfit", lambda *args: None)
    told = trained(work, rows, settings(**mhim(published_within=1.0), **never), "bold")
    trained(work, rows, settings(**mhim(**PUBLISHED), **never), "published")
    bold, published = only(work, "bold"), only(work, "published")
    assert bold.card.form
    assert published.card.form is None
    assert (bold.card.form.kept, bold.card.form.tried) == ("published", [])
    assert bold.card.model_params == published.card.model_params
    assert all(np.array_equal(bold.weights[k], v) for k, v in published.weights.items())
    assert bold.card.test == published.card.test
    assert not any("form" in note for o in told.outcomes for note in o.notes)

    monkeypatch.setattr(kept, "unfit", lambda *args: UNFIT)
    told = trained(work, rows, settings(**mhim(published_within=0.0), **never), "careful")
    trained(work, rows, settings(**mhim(), **never), "guarded")
    careful, guarded = only(work, "careful"), only(work, "guarded")
    assert careful.card.form
    assert (careful.card.form.kept, careful.card.form.tried[0].form) == ("guarded", "published")
    assert all(np.array_equal(careful.weights[k], v) for k, v in guarded.weights.items())
    assert careful.card.model_params == guarded.card.model_params
    files = [work.run(name) / "fold_0" / "history.csv" for name in ("careful", "guarded")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert any("the published form is not kept: training loss 1" in note for o in told.outcomes for note in o.notes)
    counted = choices.count([careful.card])
    assert counted.forms == {"guarded": 1}
    assert any("guarded in 1 of 1 trainings" in line for line in choices.lines(counted))


def test_killed_anywhere_it_ends_in_the_same_bytes(
    work: layout.Work, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(**mhim(published_within=0.0), fallback=None, epochs=2)
    monkeypatch.setattr(kept, "unfit", lambda *args: UNFIT)
    assert not trained(work, rows, config).failures
    calm = tree(work.runs)
    shutil.rmtree(work.runs)
    monkeypatch.setattr(fitting, "CHECKPOINT_SHARE", 1e9)
    give_up, seen = fitting.give_up, list[list[str]]()

    def then_killed(partial: Path, tried: Any, name: str) -> None:
        give_up(partial, tried, name)
        seen.append([one["form"] for one in tried])
        raise SystemExit(143)

    monkeypatch.setattr(fitting, "give_up", then_killed)
    report, stops = until_done(work, rows, config)
    assert not report.failures
    assert stops == len(seen) == 2  # each of the two folds gave its first form up once, and never began it again
    assert tree(work.runs) == calm


@pytest.mark.parametrize("torn", ['[{"form"', "{}", "[1]", '[{"form": "guarded", "why": "it"}]'])
def test_what_was_tried_is_read_only_whole(tmp_path: Path, torn: str) -> None:
    fitting.give_up(tmp_path, [{"form": "published", "why": "it does not fit"}], "state.pt")
    assert fitting.tried(tmp_path, ["published"]) == [{"form": "published", "why": "it does not fit"}]
    (tmp_path / fitting.TRIED).write_text(torn)
    assert fitting.tried(tmp_path, ["published"]) == []


@pytest.mark.parametrize("lost", ["state.pt", fitting.TRIED])
def test_no_form_goes_on_from_the_checkpoint_of_another(
    work: layout.Work, rows: Any, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    config = settings(**mhim(published_within=0.0), fallback=None, epochs=2, folds=2)
    monkeypatch.setattr(kept, "unfit", lambda *args: UNFIT)
    assert not trained(work, rows, config).failures
    calm = tree(work.runs)
    shutil.rmtree(work.runs)
    monkeypatch.setattr(fitting, "CHECKPOINT_SHARE", 1e9)
    fitted, ended = fitting.fitted, list[str]()

    def damaged(network: Any, *args: Any) -> Any:
        """A death between two writes leaves the published form's checkpoint; a torn list the guarded one's."""
        found, partial = fitted(network, *args), args[5]
        start = getattr(getattr(network, "params", None), "student_start", None)
        if start is None:  # the plain model
            return found
        guarded = start == "teacher"
        if guarded and lost == fitting.TRIED and not ended:
            (partial / lost).write_text("torn")
        elif guarded or lost == fitting.TRIED or ended:
            return found
        else:
            fitting.give_up(partial, [{"form": "published", "why": UNFIT}], "none.pt")
        assert list(partial.glob("*.pt")), "a checkpoint is there"
        ended.append(lost)
        raise SystemExit(143)

    monkeypatch.setattr(fitting, "fitted", damaged)
    report, stops = until_done(work, rows, config)
    assert not report.failures
    assert stops == len(ended) == 1
    assert tree(work.runs) == calm


def test_every_form_has_an_experiment_log_of_its_own(
    work: layout.Work, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[int]] = {}

    def opened(kind: str, run: Path, training: str) -> Any:
        return nullcontext(lambda row: seen.setdefault(training, []).append(row["epoch"]))

    monkeypatch.setattr(experiment_log, "opened", opened)
    monkeypatch.setattr(kept, "unfit", lambda *args: UNFIT)
    assert not trained(work, rows, settings(**mhim(published_within=0.0), fallback=None, epochs=2)).failures
    assert seen["fold_0/published"] == seen["fold_0/guarded"] == seen["teacher/fold_0"] == [0, 1]
    assert "fold_0" not in seen, "steps of a service never go back"


def test_a_published_form_that_runs_away_gives_way(
    work: layout.Work, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fitting.fitted

    def away(network: Any, *args: Any) -> Any:
        if getattr(getattr(network, "params", None), "student_start", "") == "fresh":
            raise loop.TrainingDiverged("the loss is nan")
        return fitted(network, *args)

    monkeypatch.setattr(fitting, "fitted", away)
    report = trained(work, rows, settings(**mhim(published_within=1.0), fallback=None, epochs=2))
    assert not report.failures
    form = only(work, "run").card.form
    assert form
    assert (form.kept, form.tried[0].why) == ("guarded", "the loss is nan")


def test_a_form_that_fits_is_asked_by_its_own_limit_alone(
    work: layout.Work, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*args: Any) -> str:
        raise AssertionError("the alarm is asked of the last form")

    monkeypatch.setattr(kept, "alarm", asked)
    monkeypatch.setattr(kept, "unfit", lambda *args: None)
    report = trained(work, rows, settings(**mhim(published_within=1.0), fallback=0.0, epochs=2))
    assert not report.failures


@pytest.mark.parametrize(
    ("own", "plain", "within", "fits"),
    [
        (0.15, 0.0, 0.25, True),  # log 2 = .693 from nothing: .173 may be missing
        (0.18, 0.0, 0.25, False),
        (0.69, 0.6, 0.25, False),  # the plain model has learnt little, and the student nothing
        (0.62, 0.6, 0.25, True),
        (0.95, 0.9, 9.0, False),  # nothing was learnt that one could be short of
        (0.90, 0.9, 0.0, True),
    ],
)
def test_how_much_of_what_was_learnt_may_be_missing(
    own: float, plain: float, within: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_losses", lambda *args: (own, plain))
    of = [Case(str(k), (str(k),), k % 2, lambda: None, 1.0) for k in range(4)]
    task = tasks.classification(("a", "b"), [0, 1])
    why = kept.unfit(None, None, of, task, None, None, None, within)  # type: ignore[arg-type]
    assert (why is None) == fits
    if why:
        assert f"{own:.3f} with whole bags, against {plain:.3f} of the plain model, and 0.693 of no answer" in why


def test_a_run_begun_before_there_were_forms_goes_on_without(work: layout.Work, rows: Any) -> None:
    old = settings(**mhim(), epochs=2)
    trained(work, rows, old)
    shutil.rmtree(work.run("run") / "fold_1")
    calm = (work.run("run") / "fold_0" / "manifest.json").read_bytes()
    params = {k: v for k, v in old.train.model_params.items() if k != "published_within"}
    now = settings(model="mhim", model_params=params, epochs=2)
    report = trained(work, rows, now)
    assert not report.failures
    assert (work.run("run") / "fold_0" / "manifest.json").read_bytes() == calm
    made = json.loads((work.run("run") / "fold_1" / "manifest.json").read_text())
    assert "published_within" not in made["settings"]["train.model_params"]
    assert "published_within: null" in (work.run("run") / "config.yaml").read_text()
    # asked for by name, it is another training
    named = settings(**mhim(published_within=0.2), epochs=2)
    with pytest.raises(Refused, match="published_within"):
        trained(work, rows, named)


def test_so_does_one_of_which_nothing_was_finished(
    work: layout.Work, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = settings(**mhim(), epochs=2)
    assert not trained(work, rows, old).failures
    calm = tree(work.runs)
    shutil.rmtree(work.runs)
    kill_after(monkeypatch, [9, 9, 1])  # in the first student: both plain models are there
    with pytest.raises(SystemExit):
        trained(work, rows, old)
    params = {k: v for k, v in old.train.model_params.items() if k != "published_within"}
    assert not trained(work, rows, settings(model="mhim", model_params=params, epochs=2)).failures
    now = tree(work.runs)
    assert {k: v for k, v in now.items() if not k.endswith("config.yaml")} == {
        k: v for k, v in calm.items() if not k.endswith("config.yaml")
    }


def test_the_numbers_of_a_run_tell_its_forms(work: layout.Work, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "unfit", lambda *args: None)
    config = settings(**mhim(published_within=1.0), fallback=None, epochs=2)
    trained(work, rows, config)
    assert scored(work, config)["choices"]["forms"] == {"published": 2}
