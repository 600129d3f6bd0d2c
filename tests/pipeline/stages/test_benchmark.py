"""`pipeline benchmark`: every model on the same splits as one table; the presets of the paper's sets on stand-ins."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open

from mhim.configs import load
from mhim.configs.schema import Config
from mhim.pipeline.resume import console
from mhim.pipeline.stages import benchmark
from mhim.pipeline.store import layout
from tests.benchmarks import league, paper
from tests.pipeline.bags import make_features, sets, tree, write_labels

Cli = Callable[..., tuple[int, str]]
SMALL = [
    *sets("benchmark.params={width: 16, landmarks: 4, heads: 2}", "train.min_epochs=1", "score.bootstrap=20"),
    "--epochs",
    "2",
    "--folds",
    "2",
    "--workers",
    "1",
]


@pytest.fixture
def bench(cli: Cli, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """The command on twelve tiny patients in tmp_path/w."""
    work = layout.Work(tmp_path / "w")
    labels = write_labels(tmp_path / "labels.csv", make_features(work))

    def call(*args: object) -> tuple[int, str]:
        return cli("benchmark", "--work", work.root, "--labels", labels, *SMALL, *args)

    return call


def lines(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as f:
        return {r["model"]: r for r in csv.DictReader(f)}


def test_the_table_holds_every_model_and_a_second_call_changes_nothing(bench: Any, tmp_path: Path) -> None:
    models = "mean,transmil,abmil,mhim_abmil,mhim_v2_transmil"
    code, text = bench("--seeds", "2", "--models", models)
    assert code == 0, text
    table = lines(tmp_path / "w" / "runs" / "benchmark.csv")
    assert list(table) == models.split(",")
    runs = tmp_path / "w" / "runs"
    for name, row in table.items():
        found = json.loads((runs / name / "metrics.json").read_text())
        assert float(row["auc_mean"]) == found["over_folds"]["auc"]["mean"]
        assert row["trainings"] == "4"
    assert len({r["split"] for r in table.values()}) == 1
    assert (table["mhim_abmil"]["plain"], table["mhim_v2_transmil"]["plain"]) == ("abmil", "transmil")
    assert table["mhim_abmil"]["verdict"] in ("better", "worse", "no difference")
    assert table["mean"]["plain"] == ""
    # the teacher is the plain run of the same table
    teacher = runs / "mhim_abmil" / "teacher" / "fold_1_seed_1" / "model.safetensors"
    assert teacher.read_bytes() == (runs / "abmil" / "fold_1_seed_1" / "model.safetensors").read_bytes()
    card = json.loads((runs / "mhim_v2_transmil" / "fold_0" / "model.json").read_text())
    assert (card["model_params"]["share_max"], card["model_params"]["student_params"]["landmarks"]) == (1.0, 4)
    assert card["train"]["fallback"] is None
    assert "mean ± sd over trainings" in (runs / "benchmark.md").read_text()
    before = tree(tmp_path / "w" / "runs")
    (runs / "mean" / "patients.csv").write_bytes(bytes(100))  # which no training left to make would write anew
    code, text = bench("--seeds", "2", "--models", models)
    assert code == 0, text
    assert "patients.csv was damaged" in text
    after = tree(tmp_path / "w" / "runs")
    assert {k: v for k, v in after.items() if k in before} == before
    assert "0 to do" in text


def test_models_that_are_prepared_train_resume_and_score(bench: Any, tmp_path: Path) -> None:
    """Controls that are fitted before the first step, and a model of two stages, whose first is not its rival."""
    models = "mean_linear,mean_knn,ibmil,camil"
    code, text = bench("--models", models)
    assert code == 0, text
    runs = tmp_path / "w" / "runs"
    assert all(row["trainings"] == "2" for row in lines(runs / "benchmark.csv").values())
    assert (runs / "ibmil" / "teacher" / "fold_0" / "model.safetensors").exists()
    card = json.loads((runs / "ibmil" / "fold_0" / "model.json").read_text())
    assert "fallback" not in card
    with safe_open(runs / "ibmil" / "fold_0" / "model.safetensors", "np") as file:
        assert len(np.unique(file.get_tensor("confounders").round(5), axis=0)) > 1
    with safe_open(runs / "mean_knn" / "fold_0" / "model.safetensors", "np") as file:
        assert len(file.get_tensor("means")) == card["split"]["train"]
    code, text = bench("--models", models)
    assert code == 0, text
    assert "0 to do" in text


def test_a_row_that_was_begun_before_there_were_forms_goes_on_without(bench: Any, tmp_path: Path) -> None:
    own = sets("train.model_params={published_within: null}")
    code, text = bench("--models", "mhim", *own)
    assert code == 0, text
    run = tmp_path / "w" / "runs" / "mhim"
    shutil.rmtree(run / "fold_1")
    code, text = bench("--models", "mhim")
    assert code == 0, text
    assert "mhim goes on as it was begun: train.model_params.published_within is null" in text
    assert "1 done, 3 skipped" in text
    params = json.loads((run / "fold_1" / "manifest.json").read_text())["settings"]["train.model_params"]
    assert "published_within" not in params
    assert "published_within: null" in (run / "config.yaml").read_text()


def test_the_grid_reaches_the_models_that_have_it(bench: Any, tmp_path: Path) -> None:
    code, text = bench("--models", "abmil,mhim_abmil", "--grid", "mask_ratio_h=0.1,0.3", "--name", "g")
    assert code == 0, text
    runs = tmp_path / "w" / "runs"
    assert not (runs / "g-abmil" / "grid").exists()
    cells = sorted(p.name for p in (runs / "g-mhim_abmil" / "grid").iterdir())
    assert cells == ["mask_ratio_h-0.1", "mask_ratio_h-0.3"]
    assert "cell chosen on validation" in (runs / "g.md").read_text()


def test_wrong_names_and_other_settings_are_told_before_any_work(bench: Any, tmp_path: Path) -> None:
    code, text = bench("--models", "mean,nonesuch")
    assert code == 2
    assert "nonesuch" in text
    assert "mhim_abmil" in text
    code, text = bench("--models", "mean", "--grid", "mask_ratio_h=0.1,0.3")
    assert code == 2
    assert "mask_ratio_h" in text
    assert bench("--models", "mean,max")[0] == 0
    code, text = bench("--models", "abmil,max", "--set", "train.lr=0.5")
    assert code == 3
    assert "train.lr" in text
    assert not (tmp_path / "w" / "runs" / "abmil").exists()


def test_every_row_of_the_default_table_is_a_model_that_can_be_built() -> None:
    made = benchmark.rows(load.resolve(["digits_bags"]))
    assert len(made) == 33
    for name, settings in made.items():
        params = settings.model_params
        assert params.get("student_params", params).get("width", 128) == 128, name
        assert settings.epochs == 40


@pytest.mark.parametrize("preset", list(paper.SETS))
def test_a_preset_of_the_paper_trains_on_its_label_file(preset: str, cli: Cli, tmp_path: Path) -> None:
    labels = paper.make(tmp_path / "in", preset, share=0.0005, dim=24, patients=40)
    work = tmp_path / "w"
    code, text = cli("import", tmp_path / "in" / "features", "--encoder", "stand-in", "--work", work)
    assert code == 0, text
    items = tmp_path / "items"
    items.write_text("teacher/fold_0\nfold_0\n")
    small = [
        "--epochs",
        "1",
        "--set",
        "train.min_epochs=0",
        "--workers",
        "1",
        "--set",
        "train.model_params={student_params: {width: 16}}",
        "--set",
        "train.survival_bins=2",
    ]
    code, text = cli(
        "train",
        "--config",
        preset,
        "--encoder",
        "stand-in",
        "--labels",
        labels,
        "--work",
        work,
        "--items",
        items,
        *small,
    )
    assert code == 0, text
    run = work / "runs" / "mhim"
    card = json.loads((run / "fold_0" / "model.json").read_text())
    assert card["task"]["kind"] == ("nll" if "survival" in preset else "classification")
    with open(run / "splits.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    told = labels.read_text().splitlines()[1 if "survival" in preset else 0 :]
    assert {r["patient"] for r in rows} == {line.split(",")[1 if "survival" in preset else 0] for line in told}
    assert {r["fold"] for r in rows} == {"0", "1", "2", "3", "4"}


def test_a_published_id_takes_its_own_features_only(cli: Cli, tmp_path: Path) -> None:
    """slide_1 has no features; those of slide_10 begin with its name."""
    import torch

    (tmp_path / "f").mkdir()
    names = [f"slide_{i}" for i in range(10, 22)]
    for name in names:
        torch.save(torch.randn(4, 8), tmp_path / "f" / f"{name}.pt")
    assert cli("import", tmp_path / "f", "--work", tmp_path / "w")[0] == 0
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_1,0\n" + "".join(f"{n},{i % 2}\n" for i, n in enumerate(names)))
    code, text = cli(
        "train",
        "--work",
        tmp_path / "w",
        "--encoder",
        "imported",
        "--labels",
        labels,
        "--model",
        "mean",
        "--epochs",
        "1",
        "--set",
        "train.min_epochs=0",
        "--folds",
        "2",
        "--workers",
        "1",
    )
    assert code == 0, text
    assert "left out, 1 rows of the labels have no features: slide_1\n" in text
    split = (tmp_path / "w" / "runs" / "mean" / "splits.csv").read_text()
    assert ",slide_10," in split
    assert ",slide_1," not in split


def test_an_equal_search_for_every_row_ranks_and_differences_to_the_chosen_rows(bench: Any, tmp_path: Path) -> None:
    models = "mean_linear,abmil,mhim_abmil"
    code, text = bench("--models", models, "--draws", "2")
    assert code == 0, text
    table = lines(tmp_path / "w" / "runs" / "benchmark.csv")
    ranks = [float(table[row]["rank"]) for row in models.split(",")]
    assert sum(ranks) == 6.0
    values = {row: float(table[row]["auc_all"]) for row in table}
    for row, other in (("abmil", "mean_linear"), ("mean_linear", "abmil"), ("mhim_abmil", "mean_linear")):
        assert float(table[row][f"against_{other}"]) == pytest.approx(values[row] - values[other], abs=1e-12)
        assert float(table[row][f"against_{other}_low"]) <= float(table[row][f"against_{other}_high"])
    assert table["abmil"]["against_abmil"] == ""
    for row in table:
        assert {p.name for p in (tmp_path / "w" / "runs" / row / "draws").iterdir()} == {"0", "1"}
    told = (tmp_path / "w" / "runs" / "benchmark.md").read_text()
    assert "against mean_linear | rank |" in told
    assert "abmil: search of 2 settings per fold" in told
    code, text = bench("--models", models, "--draws", "2", "--set", "benchmark.against=[mhim_abmil]")
    assert code == 0, text  # held against another row, nothing trained anew
    table = lines(tmp_path / "w" / "runs" / "benchmark.csv")
    assert float(table["abmil"]["against_mhim_abmil"]) == pytest.approx(
        values["abmil"] - values["mhim_abmil"], abs=1e-12
    )
    assert "against_mean_linear" not in table["abmil"]


@pytest.mark.parametrize("quick", [True, False])
def test_every_row_of_the_league_gets_the_same_number_of_settings(quick: bool) -> None:
    config = Config.model_validate(league.settings(quick, students=True))
    found = benchmark.rows(config)
    assert {"abmil", "mean_linear", "mhim_acmil", "mhim_ilra"} < found.keys()
    assert {row.draws for row in found.values()} == {2 if quick else 3}
    assert all(row.removeprefix("mhim_") in found for row in found)


def test_no_number_of_the_table_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    header = ["model", "auc", "f1", "auc, inside trainings", "against abmil"]
    rows = [["mhim_abmil", "0.969 ± 0.059", "0.885 ± 0.130", "0.968 [0.905, 1.000]", "+0.028 [-0.008, +0.089]"]]

    def printed(**terminal: Any) -> str:
        file = io.StringIO()
        monkeypatch.setattr(console, "out", Console(file=file, color_system=None, **terminal))
        benchmark._print("b", header, rows, 2)
        return file.getvalue()

    whole = "│ " + " │ ".join(f"{cell:<{len(head)}}" for cell, head in zip(rows[0], header, strict=True)) + " │"
    for text in (printed(), printed(width=200, force_terminal=True)):
        assert whole in text
    narrow = printed(width=60, force_terminal=True)
    assert "…" not in narrow
    assert "0.968" in narrow
    assert "+0.089]" in narrow
    assert "0.885" not in narrow  # which stands in the file
    assert max(map(len, narrow.splitlines())) <= 60
