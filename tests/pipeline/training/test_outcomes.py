"""Levels, numbers and several targets, from rows of labels to trained folds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhim.configs.schema import Config, TrainConfig, fingerprint_fields
from mhim.mil.tasks import Regression, Several, TaskError
from mhim.pipeline.cohort import patients
from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.resume import fingerprints
from mhim.pipeline.resume.stage import Item, as_recorded
from mhim.pipeline.stages.train import Train
from mhim.pipeline.store import layout, writing
from mhim.pipeline.training import bundle
from mhim.pipeline.training import fold as training
from tests.pipeline.bags import make_features, tree
from tests.pipeline.trained import kill_after, mhim, settings, trained, until_done


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


def levels(rows: Sequence[Row]) -> list[Row]:
    return [replace(r, label=str(1 + i % 2 + (i % 4 == 3))) for i, r in enumerate(rows)]


def numbers(rows: Sequence[Row]) -> list[Row]:
    rng = np.random.default_rng(2)
    return [replace(r, label=f"{10 + 50 * (i % 2) + rng.normal(0, 4):.2f}") for i, r in enumerate(rows)]


def several(rows: Sequence[Row]) -> list[Row]:
    """Receptor, grade and a number, a third of the cells empty but never all; and times."""
    made = []
    for i, r in enumerate(rows):
        cells = [("er", ("neg", "pos")[i % 2]), ("grade", str(1 + (i // 2) % 3)), ("ki67", f"{5 + 40 * (i % 2) + i}")]
        known = tuple((k, None if (i + j) % 3 == 0 else v) for j, (k, v) in enumerate(cells))
        time, event = (None, None) if i % 4 == 0 else (3.0 + i, int(i % 3 > 0))
        made.append(replace(r, label=None, targets=known, time=time, event=event))
    return made


def labelled(*values: str) -> Any:
    return lambda rows: [replace(r, label=values[i % len(values)]) for i, r in enumerate(rows)]


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "corn": (levels, {"task": "ordinal", "ordinal": "corn"}),
    "cumulative": (levels, {"task": "ordinal", "balance": "sampling", "choice": "margin"}),
    "regression": (numbers, {"task": "regression", "choice": "margin"}),
    "huber": (numbers, {"task": "regression", "regression_loss": "huber"}),
    "several": (several, {"task": {"grade": "ordinal", "ki67": "regression"}, "survival_bins": 2}),
    "several_cox": (
        several,
        {"task": "grade=ordinal,ki67=regression", "survival_loss": "cox", "cox_bags": 4, "choice": "margin"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_outcome_is_trained_by_mhim_and_ends_in_the_same_bytes_when_interrupted(
    kind: str, work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, own = KINDS[kind]
    rows = change(make_features(work, 24))
    config = settings(**mhim(mask_ratio_h=0.2), **own, epochs=3)
    report = trained(work, rows, config)
    assert not report.failures, report.failures
    calm = tree(work.runs)
    for folder in sorted(work.run("run").glob("fold_*")):
        found = bundle.read(folder)
        table = training.read_predictions(folder)
        logits = training.logits_of(table)
        assert logits.shape == (len(table), found.task.n_out)
        test = [r for r in table if r["side"] == "test"]
        at = found.task.headline_of(found.task.truth(test), torch.from_numpy(training.logits_of(test)))
        told = found.card.test[found.card.headline]
        if found.task.kind != "ordinal":  # whose level is called after the temperature
            assert told is None or told == pytest.approx(at[found.task.headline])
        assert found.card.taught
        weighed = found.card.choice is not None
        assert weighed == ("choice" in own and (found.card.fallback is None or found.card.fallback.by != "alarm"))
        assert not weighed or found.card.choice.patients == found.card.split.val
    shutil.rmtree(work.runs)
    kill_after(monkeypatch, [1, 2, 1, 1, 2])
    report, stops = until_done(work, rows, config)
    assert stops >= 4
    assert not report.failures
    assert tree(work.runs) == calm


def test_a_number_is_standardised_on_its_training_part_and_its_interval_is_of_validation(work: layout.Work) -> None:
    rows = numbers(make_features(work, 40))
    value = {r.patient: float(r.label or "nan") for r in rows}
    assert not trained(work, rows, settings(task="regression", val_fraction=0.5, epochs=2)).failures
    folder = work.run("run") / "fold_0"
    found = bundle.read(folder)
    assert isinstance(found.task, Regression)
    table = training.read_predictions(folder)
    seen = {r["patient"] for r in table}
    own = [v for p, v in value.items() if p not in seen]
    assert (found.task.mean, found.task.sd) == (pytest.approx(np.mean(own)), pytest.approx(np.std(own)))
    val = [r for r in table if r["side"] == "val"]
    wrong = sorted(abs(float(r["target"]) - (float(r["logit_0"]) * found.task.sd + found.task.mean)) for r in val)
    assert len(val) == 10  # ceil(11 x 0.9) = 10; of 0.95, 11 would be needed
    assert found.card.interval == {"0.9": pytest.approx(wrong[-1]), "0.95": None}


def test_the_card_of_several_holds_what_a_run_of_each_alone_would_freeze(work: layout.Work) -> None:
    rows = several(make_features(work, 30))
    config = settings(task="grade=ordinal,ki67=regression", survival_bins=2, epochs=2, val_fraction=0.4)
    assert not trained(work, rows, config).failures
    found = bundle.read(work.run("run") / "fold_0")
    assert isinstance(found.task, Several)
    assert [(n, t.kind) for n, t in found.task.targets] == [
        ("er", "classification"), ("grade", "ordinal"), ("ki67", "regression"), ("survival", "nll"),
    ]  # fmt: skip
    assert found.card.targets is not None
    er, ki67 = found.card.targets["er"], found.card.targets["ki67"]
    assert er.temperature is not None
    assert er.threshold is not None
    assert set(er.test) >= {"auc", "auprc"}
    assert ki67.interval is not None
    assert found.card.targets["survival"].horizons is not None
    table = training.read_predictions(work.run("run") / "fold_0")
    known = {r["patient"]: r["target.er"] for r in table}
    truth = {r.patient: dict(r.targets)["er"] for r in rows}
    assert {p: {"": None, "0": "neg", "1": "pos"}[v] for p, v in known.items()} == {p: truth[p] for p in known}
    again = (work.run("run") / "patients.csv").read_text().splitlines()[0].split(",")
    assert {"er", "grade", "ki67", "time", "event"} <= set(again)
    val = [c.headline for c in [found.card]]
    assert val == ["headline"]


# ------------------------------------------------------------------------------------------ labels


def kinds_of(rows: Sequence[Row], work: layout.Work, **train: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    data = patients.labelled(rows, work.features("texture"), TrainConfig(**train))
    return [(o.name, o.kind, o.classes) for o in data.outcomes]


def test_what_is_safe_is_told_from_the_labels(work: layout.Work) -> None:
    rows = make_features(work, 6)
    assert kinds_of(rows, work) == [("", "classification", ("no", "yes"))]
    two = [replace(r, label=str(i % 2)) for i, r in enumerate(rows)]
    assert kinds_of(two, work) == [("", "classification", ("0", "1"))]
    words = [replace(r, label="abc"[i % 3]) for i, r in enumerate(rows)]
    assert kinds_of(words, work) == [("", "classification", ("a", "b", "c"))]
    three = levels(rows)
    with pytest.raises(CohortError, match=r"3 distinct numbers \(1.0, 2.0, 3.0\).*--task ordinal"):
        kinds_of(three, work)
    assert kinds_of(three, work, classes=("1", "2", "3")) == [("", "classification", ("1", "2", "3"))]
    assert kinds_of(three, work, task="ordinal") == [("", "ordinal", ("1", "2", "3"))]
    assert kinds_of(three, work, task="regression") == [("", "regression", ())]


@pytest.mark.parametrize(
    ("change", "train", "says"),
    [
        (labelled("low", "high"), {"task": "ordinal"}, "order of their own"),
        (labelled("1", "2", "oops"), {"task": "regression"}, "row 4, column label: 'oops' is not a number"),
        (labelled("1", "2", "inf"), {"task": "regression"}, "not finite"),
        (labelled("1", "1.0", "2"), {"task": "ordinal"}, "levels '1' and '1.0' are one number: write it in one way"),
        (labelled("3", "3.0"), {"task": "regression"}, "all 12 labelled slides are '3': there is nothing to learn"),
        (labelled("none", "mild"), {"task": "ordinal"}, r"as --set .train.classes=\[LOWEST, ..., HIGHEST"),
        (lambda r: r, {"task": "multilabel"}, "two or more columns"),
        (lambda r: r, {"task": "a=ordinal"}, "the labels are of one column"),
        (several, {"task": "multilabel"}, "column grade: 3 distinct values"),
        (several, {"task": "grad=ordinal"}, "'grad', which is none of the targets"),
        (several, {}, "column grade: 3 distinct numbers.*grade=ordinal"),
        (levels, {"task": "ordinal", "classes": ("1", "2")}, "label '3' is none of train.classes"),
    ],
)  # fmt: skip
def test_labels_that_are_no_such_outcome_are_refused(
    change: Any, train: dict[str, Any], says: str, work: layout.Work
) -> None:
    with pytest.raises(CohortError, match=says):
        kinds_of(change(make_features(work, 12)), work, **train)


@pytest.mark.parametrize("task", ["guess", "a=guess", "=ordinal", "a=ordinal,a=regression"])
def test_an_unknown_task_is_a_mistake_of_the_user(task: str) -> None:
    with pytest.raises(ValueError, match="task"):
        TrainConfig(task=task)


def test_a_target_that_is_constant_in_the_training_part_says_so(work: layout.Work) -> None:
    rows = make_features(work, 12)
    cells = [(("er", ("neg", "pos")[i % 2]), ("pd", ("5" if i % 3 else None) if i else "6")) for i in range(12)]
    same = [replace(r, label=None, targets=of) for r, of in zip(rows, cells, strict=True)]
    data = patients.labelled(same, work.features("texture"), TrainConfig(task="pd=regression"))
    with pytest.raises(TaskError, match=r"target pd: all .* training targets of this fold are 5"):
        training.make_task(data, TrainConfig(), [p for p in data.patients if p.id != rows[0].patient])


def test_settings_that_came_later_leave_old_fingerprints_alone() -> None:
    fields = fingerprint_fields(TrainConfig())
    assert not {"levels", "ordinal", "regression_loss"} & fields.keys()
    assert fingerprint_fields(TrainConfig(ordinal="corn"))["ordinal"] == "corn"


def test_folds_of_several_targets_are_alike_in_each(work: layout.Work) -> None:
    rng = np.random.default_rng(5)
    rows = make_features(work, 80)
    made = []
    for r in rows:
        cells = [(n, "np"[int(rng.random() < share)]) for n, share in (("a", 0.15), ("b", 0.5), ("c", 0.3))]
        known = tuple((n, None if rng.random() < 0.3 else v) for n, v in cells)
        made.append(replace(r, label=None, targets=known))
    config = TrainConfig(task="multilabel", folds=4)
    data = patients.labelled(made, work.features("texture"), config)
    folds = patients.make_folds(data, config)
    assert patients.make_folds(data, config) == folds
    assert sorted(p for f in folds for p in f.test) == sorted(p.id for p in data.patients)
    of = data.by_id()
    for k in range(3):
        for value in (0, 1):
            counts = [sum(of[p].target.values[k] == value for p in f.test) for f in folds]  # type: ignore[union-attr]
            assert max(counts) - min(counts) <= 2, (k, value, counts)
            assert all(any(of[p].target.values[k] == value for p in f.val) for f in folds)  # type: ignore[union-attr]
    sizes = [len(f.test) for f in folds]
    assert max(sizes) - min(sizes) <= 3


def test_folds_of_a_number_are_alike_in_it(work: layout.Work) -> None:
    rng = np.random.default_rng(6)
    rows = [replace(r, label=f"{rng.lognormal(2, 1):.3f}") for r in make_features(work, 60)]
    config = TrainConfig(task="regression", folds=3)
    data = patients.labelled(rows, work.features("texture"), config)
    of = data.by_id()
    fifths = np.quantile([p.target for p in data.patients], [0.2, 0.4, 0.6, 0.8])  # type: ignore[type-var]
    for fold in patients.make_folds(data, config):
        counts = np.bincount(np.searchsorted(fifths, [of[p].target for p in fold.test]), minlength=5)  # type: ignore[arg-type]
        assert counts.tolist() == [4, 4, 4, 4, 4]


def test_three_numbers_that_auto_once_took_for_classes_are_the_same_training_by_name() -> None:
    fields = {"train.task": "classification", "input.classes": ["1", "2", "3"]}
    assert fingerprints.as_once_called("train.task", "classification", "auto", fields) == "auto"
    assert fingerprints.as_once_called("train.task", "ordinal", "auto", fields) == "ordinal"
    assert fingerprints.as_once_called("train.task", "survival", "auto", {}) == "survival"


def test_how_levels_become_probabilities_is_always_recorded_and_older_trainings_say_it_by_their_card(
    work: layout.Work, tmp_path: Path
) -> None:
    def item(rows: Sequence[Row], **train: Any) -> tuple[Train, Item]:
        config = Config(train=settings(**train).train)
        data = patients.labelled(rows, work.features("texture"), config.train)
        stage = Train(work, config, "run", data, patients.make_folds(data, config.train))
        return stage, stage.items()[0]

    rows = make_features(work, 12)
    assert "ordinal" not in item(rows)[1].inputs
    stage, made = item(levels(rows), task="ordinal")
    assert made.inputs["ordinal"] == "cumulative"
    for link, same in (("corn", False), ("cumulative", True)):
        for task in (task_of(link), {"kind": "several", "targets": {"a": task_of(link), "b": {"kind": "regression"}}}):
            folder = tmp_path / link / str(task["kind"])
            folder.mkdir(parents=True)
            writing.write_atomic(folder / layout.CARD, json.dumps({"task": task}))
            old = replace(made, output=folder)
            record = {k: v for k, v in stage.fields(made).items() if k != "input.ordinal"}
            assert (as_recorded(stage, old, stage.fields(old), {"settings": record}) == record) == same, (link, task)
            told, asked = item(levels(rows), task="ordinal", ordinal="corn")
            fields = as_recorded(told, replace(asked, output=folder), told.fields(asked), {"settings": record})
            assert (fields == record) == (not same)


def task_of(link: str) -> dict[str, Any]:
    return {"kind": "ordinal", "classes": ["1", "2", "3"], "link": link, "weights": []}
