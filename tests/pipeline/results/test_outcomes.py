"""Every outcome through the commands: train, score, compare, new patients, report; cells missing, a target that cannot
be known in a fold, an interrupted command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhim.configs.schema import LabelsConfig
from mhim.pipeline import Work
from mhim.pipeline.cohort import patients
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.pictures import layers
from mhim.pipeline.results import estimand, predictions, views
from mhim.pipeline.store import layout
from mhim.pipeline.training import bundle
from tests.pipeline.bags import make_features, sets, tree

Cli = Callable[..., tuple[int, str]]
QUICK = [
    *sets("train.epochs=3", "train.folds=2", "train.lr=0.02", "score.bootstrap=20", "score.heatmaps=none"),
    *sets("train.patience=0", "train.min_epochs=0", "train.model=mean", "train.model_params={width: 8}"),
    *sets("train.survival_bins=2", "train.val_fraction=0.4"),
    "--workers",
    "1",
]
COLUMNS = ("er", "pr", "grade", "ki67")
KINDS = {
    "ordinal": ["labels.label_column=grade", "train.task=ordinal"],
    "regression": ["labels.label_column=ki67", "train.task=regression"],
    "multilabel": ["labels.label_column=er,pr", "train.task=multilabel"],
    "several": ["labels.label_column=er,grade,ki67", "train.task=grade=ordinal,ki67=regression"],
}


def labels(path: Path, work: layout.Work, patients: int, **more: Any) -> Path:
    """Features, and a table of their four columns in which a fifth of the cells are empty."""
    rng, lines = np.random.default_rng(3), [",".join(("slide", "patient", *COLUMNS))]
    for i, row in enumerate(make_features(work, patients, **more)):
        odd = i % 2
        cells = [("neg", "pos")[odd], ("neg", "pos")[i // 2 % 2], str(1 + odd + (i % 4 == 3))]
        cells.append(f"{10 + 40 * odd + rng.normal(0, 4):.2f}")
        cells = ["" if (i + j) % 5 == 0 else cell for j, cell in enumerate(cells)]
        lines.append(",".join([row.slide, row.patient, *cells]))
    path.write_text("\n".join(lines) + "\n")
    return path


def flat(text: str) -> str:
    """What was printed, without the breaks of its lines."""
    return " ".join(text.split())


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_knows_every_outcome(kind: str, cli: Cli, tmp_path: Path) -> None:
    work, other = layout.Work(tmp_path / "work"), layout.Work(tmp_path / "other")
    own, new = labels(tmp_path / "a.csv", work, 30), labels(tmp_path / "b.csv", other, 10, seed=5, prefix="x")
    shared = ["--work", work.root, *QUICK, *sets(*KINDS[kind])]
    for name, seeds in (("one", 1), ("two", 2)):
        code, text = cli("train", *shared, "--labels", own, "--name", name, *sets(f"train.seeds={seeds}"))
        assert code == 0, text
        code, text = cli("score", *shared, "--name", name)
        assert code == 0, text
    run = work.run("one")
    every = views.of(run)
    assert [v.target for v in every] == {"multilabel": ["er", "pr"], "several": ["er", "grade", "ki67"]}.get(kind, [""])
    for view in every:
        rows = estimand.read(view.folder / "predictions.csv")
        assert len({r["patient"] for r in rows}) == 24  # a fifth of the cells is empty
        found = json.loads((view.folder / "metrics.json").read_text())
        assert found["patients"] == 24
        assert found["test"][found["headline"]]["value"] is not None
        if view.target:
            whole = json.loads((run / "metrics.json").read_text())["test"]
            assert whole[f"{view.target}.{found['headline']}"] == found["test"][found["headline"]], "one interval"
    calm = tree(run)
    shutil.rmtree(run / views.FOLDER, ignore_errors=True)
    (run / "metrics.json").unlink()
    assert cli("score", *shared, "--name", "one")[0] == 0
    assert tree(run) == calm

    code, text = cli("compare", "one", "two", "--work", work.root, *sets("score.bootstrap=20"))
    assert code == 0, text
    assert text.count("minus one") == len(every) + (len(every) > 1)  # and all of them together
    code, text = cli("report", "--work", work.root, "--name", "one")
    assert code == 0, text
    page = (run / "report.html").read_text()
    assert all(f">{view.target}</h2>" in page for view in every if view.target)

    code, text = cli(
        "score", *shared, "--model", "one", "--features", other.features("texture"), "--labels", new, "--as", "b"
    )
    assert code == 0, text
    for view in views.of(run / "new" / "b"):
        assert len(estimand.read(view.folder / "predictions.csv")) == 10
        found = json.loads((view.folder / "metrics.json").read_text())
        assert found["patients"] == 8
        assert found["external"].keys() == found["internal"].keys()
        assert found["without_label"] == 2


def test_labels_of_new_patients_may_lack_targets_and_the_library_names_one(cli: Cli, tmp_path: Path) -> None:
    work, other = layout.Work(tmp_path / "work"), layout.Work(tmp_path / "other")
    own, new = labels(tmp_path / "a.csv", work, 30), labels(tmp_path / "b.csv", other, 10, seed=5, prefix="x")
    shared = ["--work", work.root, *QUICK]
    assert cli("train", *shared, *sets(*KINDS["several"]), "--labels", own, "--name", "one")[0] == 0
    assert cli("score", *shared, "--name", "one")[0] == 0
    given = ["--model", "one", "--features", other.features("texture"), "--labels", new, "--as", "b"]
    code, text = cli("score", *shared, *given, *sets("labels.label_column=er,pr"))
    assert code == 0, text
    assert "ki67: no row tells a number as label in the labels: predictions alone" in flat(text)
    assert "b.csv: pr not used: one has no such target" in flat(text)
    at = {v.target: v.folder for v in views.of(work.run("one") / "new" / "b")}
    assert (at["er"] / "metrics.json").exists()
    assert not (at["ki67"] / "metrics.json").exists()
    assert len(estimand.read(at["ki67"] / "predictions.csv")) == 10
    code, text = cli("score", *shared, *given, *sets("labels.label_column=er"))
    assert code == 0, text  # one of the targets, named
    assert json.loads((at["er"] / "metrics.json").read_text())["patients"] == 8
    shutil.rmtree(work.run("one") / "new")
    code, text = cli("score", *shared, *given)  # the run's own columns, unnamed
    assert code == 0, text
    for view in views.of(work.run("one") / "new" / "b"):
        assert json.loads((view.folder / "metrics.json").read_text())["patients"] == 8
    shutil.rmtree(work.run("one") / "new")
    cells = [line.split(",") for line in new.read_text().splitlines()]
    new.write_text("\n".join(",".join([*c[:2], c[2]]) for c in cells).replace("er\n", "label\n"))
    code, text = cli("score", *shared, *given)
    assert code == 2
    assert "one has the targets er, grade, ki67, and" in flat(text)
    assert not list(work.run("one").glob("new/*/scores")), "refused before any work"
    new.write_text("\n".join(",".join(c[:2]) for c in cells))
    code, text = cli("score", *shared, *given)
    assert code == 0, text
    assert "b.csv tells no label: there is nothing to compare with" in flat(text)
    assert not list(work.run("one").glob("new/**/metrics.json"))

    found = Work(work.root).run("one")
    assert found.targets == ("er", "grade", "ki67")
    (first, *_) = found.held_out("ki67")
    assert first.value == pytest.approx(first.row["predicted"])
    assert first.interval is not None
    assert first.interval[0] <= first.value <= first.interval[1]
    with pytest.raises(Exception, match="there is er, grade, ki67"):
        found.held_out()


def test_the_tiles_of_a_number_are_in_the_labels_unit_whatever_model_scored_them(cli: Cli, tmp_path: Path) -> None:
    """Each training has its own mean and sd: what one learnt must not be read by what another did."""
    work = layout.Work(tmp_path / "work")
    own = labels(tmp_path / "a.csv", work, 30)
    abmil = sets("train.model=abmil", "train.model_params={width: 8, attention_width: 8}")
    shared = ["--work", work.root, *QUICK, *abmil, *sets(*KINDS["regression"])]
    assert cli("train", *shared, "--labels", own, "--name", "one")[0] == 0
    models = [bundle.read(f) for f in predictions.folds_of(work.run("one"))]
    assert abs(models[0].task.sd - models[1].task.sd) > 0.01
    rows = label_table.read_rows(own, LabelsConfig(label_column="ki67"))
    (patient, *_) = patients.unlabelled(work.features("texture"), rows).patients
    values = []
    for some in (models[:1], models[1:], models):
        (arrays,) = predictions.slide_scores(patient, some).values()
        each = [m.task.value(torch.from_numpy(z)[None]).item() for m, z in zip(some, arrays["logits"], strict=True)]
        values.append(arrays["evidence"][:, 0])
        if len(some) == 1:  # the tiles' values, weighted by their attention, are the answer
            assert arrays["attention"] @ values[-1] == pytest.approx(each[0], rel=1e-4)
    assert values[2] == pytest.approx((values[0] + values[1]) / 2, rel=1e-5)
    drawn = layers.layers({**arrays, "evidence": values[1][:, None]}, models[0].task, "probability")
    assert drawn[0].scores == pytest.approx(values[1])


def test_a_number_of_new_patients_is_read_as_in_training(cli: Cli, tmp_path: Path) -> None:
    """Decimal commas of a table with semicolons; and a cell that is none is named as the file names its column."""
    work, other = layout.Work(tmp_path / "work"), layout.Work(tmp_path / "other")
    own, new = labels(tmp_path / "a.csv", work, 30), labels(tmp_path / "b.csv", other, 10, seed=5, prefix="x")
    shared = ["--work", work.root, *QUICK, *sets(*KINDS["regression"])]
    assert cli("train", *shared, "--labels", own, "--name", "one")[0] == 0
    given = [*shared, "--name", "one", "--features", other.features("texture"), "--labels", new, "--as", "b"]
    truths = []
    for text in (new.read_text(), new.read_text().replace(",", ";").replace(".", ",").replace(",svs", ".svs")):
        new.write_text(text)
        code, said = cli("score", *given)
        assert code == 0, said
        rows = estimand.read(work.run("one") / "new" / "b" / "predictions.csv")
        truths.append({r["patient"]: r["label"] for r in rows})
    assert truths[0] == truths[1]
    assert sum(v != "" for v in truths[0].values()) == 8
    new.write_text("slide,patient,ki67\nxs00_0.svs,xp00,1_000\n")
    code, said = cli("score", *given)
    assert code == 2
    assert "row 2, column ki67: '1_000' is not a number" in flat(said)
