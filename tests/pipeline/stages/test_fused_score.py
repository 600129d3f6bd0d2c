"""Slides and tables from the command line: trained, scored, and scored for new patients with any of them absent."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.store import layout
from tests.pipeline.bags import make_features, sets, write_labels

Cli = Callable[..., tuple[int, str]]
QUICK = [
    *sets(
        "train.folds=2", "train.epochs=2", "train.lr=0.01", "train.fusion_folds=2", "train.standardize=true",
        "train.model_params={width: 8, attention_width: 8}", "score.bootstrap=20",
    ),
    "--workers", "1",
]  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write_table(path: Path, patients: list[str], seed: int = 0) -> Path:
    """Age and sex; who is odd is older."""
    rng = np.random.default_rng(seed)
    lines = ["patient,age,sex"]
    for i, p in enumerate(patients):
        lines.append(f"{p},{60 + 6 * (i % 2) + rng.normal():.1f},{'fm'[int(rng.integers(2))]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def given_table(name: str, path: Path) -> list[str]:
    return sets(f"train.tables={{{name}: {path}}}")


@pytest.fixture
def run(tmp_path: Path, cli: Cli) -> Path:
    work = layout.Work(tmp_path / "work")
    rows = make_features(work, 24)
    labels = write_labels(tmp_path / "labels.csv", rows)
    table = write_table(tmp_path / "clinical.csv", [r.patient for r in rows])
    given = ["--work", work.root, "--model", "abmil", "--name", "both", *QUICK]
    code, text = cli("train", *given, "--labels", labels, *given_table("clinical", table), *sets("train.fusion=late"))
    assert code == 0, text
    code, text = cli("score", "--work", work.root, "--name", "both", "--heatmaps", "none", *QUICK)
    assert code == 0, text
    assert "clinical alone" in text
    assert "without slide at test" in text
    return work.run("both")


def test_new_patients_are_scored_with_any_of_the_modalities_absent(run: Path, tmp_path: Path, cli: Cli) -> None:
    other = layout.Work(tmp_path / "other")
    made = make_features(other, 4, seed=5, prefix="x")
    labels = write_labels(tmp_path / "new.csv", made)
    here = [r.patient for r in made]
    table = write_table(tmp_path / "new_clinical.csv", [*here[:2], "bare1", "bare2"], seed=1)
    shared = ["--work", run.parent.parent, "--name", "both", "--heatmaps", "none", *QUICK]
    new = ["--features", other.root / "features" / "texture", "--labels", labels]
    code, text = cli("score", *shared, *new, *given_table("clinical", table), "--as", "with")
    assert code == 0, text
    assert "2 patients of the tables have no slide" in text
    rows = {r["patient"]: r for r in read(run / "new" / "with" / "predictions.csv")}
    assert {p: r["modalities"] for p, r in rows.items()} == {
        here[0]: "slide+clinical", here[1]: "slide+clinical", here[2]: "slide", here[3]: "slide",
        "bare1": "clinical", "bare2": "clinical",
    }  # fmt: skip
    code, text = cli("score", *shared, *new, "--as", "without")
    assert code == 0, text
    assert "table clinical is not given: answers rest on the others" in text
    without = {r["patient"]: r for r in read(run / "new" / "without" / "predictions.csv")}
    assert {r["modalities"] for r in without.values()} == {"slide"}
    # who is in no table has the same answer, whoever else is
    assert all(without[p]["p_yes"] == rows[p]["p_yes"] for p in here[2:])
    assert without[here[0]]["p_yes"] != rows[here[0]]["p_yes"]


def test_wrong_tables_are_told(run: Path, tmp_path: Path, cli: Cli) -> None:
    work, labels = run.parent.parent, tmp_path / "labels.csv"
    table = tmp_path / "clinical.csv"
    train = ["train", "--work", work, "--labels", labels, "--model", "abmil", "--name", "x", *QUICK]
    code, text = cli(*train, *given_table("clinical", table))
    assert code == 2
    assert "train.fusion is none" in " ".join(text.split())
    code, text = cli(*train, *sets("train.fusion=late"))
    assert code == 2
    assert "needs a patients' table" in " ".join(text.split())
    strangers = write_table(tmp_path / "strangers.csv", ["a", "b"])
    code, text = cli(*train, *sets("train.fusion=late"), *given_table("clinical", strangers))
    assert code == 2
    assert "it has a, b, they are p00, p01, p02 and 21 more" in " ".join(text.split())
    code, text = cli("score", "--work", work, "--name", "both", *QUICK, "--features", work / "features" / "texture",
                     *given_table("lab", table), "--as", "y")  # fmt: skip
    assert code == 2
    assert "the run was not trained with such a table; it knows: clinical" in " ".join(text.split())


def test_the_settings_of_a_fused_run_stand_in_its_configuration(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    assert "fusion: late" in text
    assert "fusion_folds: 2" in text
    assert json.loads((run / "fusion.json").read_text())["kind"] == "late"


def test_co_attention_from_the_command_line_and_for_new_patients(tmp_path: Path, cli: Cli) -> None:
    work, other = layout.Work(tmp_path / "work"), layout.Work(tmp_path / "other")
    rows, strangers = make_features(work, 24), make_features(other, 3, seed=5, prefix="x")
    labels = write_labels(tmp_path / "labels.csv", rows)
    table = given_table("clinical", write_table(tmp_path / "clinical.csv", [r.patient for r in rows]))
    short = [*QUICK, *sets("train.epochs=1", "train.fusion_params={width: 8, hidden: 8, layers: 0}")]
    given = ["--work", work.root, "--name", "both", *short]
    code, text = cli("train", *given, "--model", "abmil", "--labels", labels, *table, *sets("train.fusion=coattn"))
    assert code == 0, text
    code, text = cli("score", *given, "--heatmaps", "none")
    assert code == 0, text
    assert "without joint at test" in text
    here, their = [r.patient for r in strangers], write_labels(tmp_path / "their.csv", strangers)
    new = ["--labels", their, *given_table("clinical", write_table(tmp_path / "new.csv", [*here[:2], "bare"], seed=1))]
    code, text = cli("score", *given, "--heatmaps", "none", "--features", other.root / "features" / "texture", *new,
                     "--as", "new")  # fmt: skip
    assert code == 0, text
    found = {r["patient"]: r for r in read(work.run("both") / "new" / "new" / "predictions.csv")}
    assert {p: r["modalities"] for p, r in found.items()} == {
        here[0]: "slide+clinical", here[1]: "slide+clinical", here[2]: "slide", "bare": "clinical",
    }  # fmt: skip
    assert all(0 < float(r["p_yes"]) < 1 for r in found.values())
