"""A work folder that version 0.1.0 made (`made_by_0_1/README.md` says how) opens, is gone on with, and is scored."""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mhim.pipeline import Work
from tests.pipeline.bags import tree

Cli = Callable[..., tuple[int, str]]
SAME = [
    "--set", "train.folds=2", "--set", "train.epochs=2", "--set", "train.model_params={width: 8, attention_width: 8}",
    "--set", "train.fallback=0.3",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that holds `work` and `labels.csv`."""
    with tarfile.open(Path(__file__).with_name("made_by_0_1") / "work.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def predictions(work: Path) -> dict[str, tuple[str, str]]:
    with open(work / "runs" / "abmil" / "predictions.csv", newline="") as file:
        return {row["patient"]: (row["p_benign"], row["p_tumour"]) for row in csv.DictReader(file)}


def test_status_tells_what_is_done_and_what_failed_then(folder: Path, cli: Cli) -> None:
    before = tree(folder)
    code, text = cli("status", "--work", folder / "work")
    assert code == 1
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["tile", "8", "1", "2", "0", "0"] in rows, text  # done, empty, failed, running, missing
    assert ["train", "abmil", "2", "0", "0", "0", "0"] in rows, text
    for words in ("failed no_mpp.svs", "failed truncated.svs", "empty no_tissue.svs"):
        assert words in text
    code, text = cli("verify", "--work", folder / "work")
    assert code == 0
    assert "not checkable, made by a version that kept no sums" in text
    assert "0 damaged" in text
    assert tree(folder) == before


def test_what_is_trained_is_not_trained_again_and_other_settings_are_refused(folder: Path, cli: Cli) -> None:
    labels = folder / "labels.csv"
    train = ["train", "--work", folder / "work", "--labels", labels, "--model", "abmil", "--workers", "1"]
    models = tree(folder / "work" / "runs" / "abmil" / "fold_0")
    code, text = cli(*train, *SAME)
    assert (code, "0 to do, 2 done before" in text) == (0, True), text
    code, text = cli(*train, *SAME[:-2])
    assert code == 3
    assert "train.fallback: 0.3 there, 0.1 now" in text  # the setting whose default is another by now, by name
    assert "--replace" in text  # the way out
    assert "--name" in text
    assert tree(folder / "work" / "runs" / "abmil" / "fold_0") == models


def test_it_is_scored_and_reported_with_the_answers_of_then(folder: Path, cli: Cli) -> None:
    work = folder / "work"
    then = predictions(work)
    code, text = cli(
        "score", "--work", work, "--name", "abmil", "--workers", "1", "--set", "score.heatmaps=none",
        "--set", "score.bootstrap=5",
    )  # fmt: skip
    assert code == 0, text
    assert "6 held-out patients" in text
    assert predictions(work) == then  # to the last digit
    assert cli("report", "--work", work, "--name", "abmil")[0] == 0
    assert "P03" in (work / "runs" / "abmil" / "report.html").read_text()


def test_the_library_opens_it(folder: Path) -> None:
    before = tree(folder)
    work = Work(folder / "work")
    run = work.run()
    then = predictions(folder / "work")
    assert {p.patient: tuple(map(repr, p.probabilities.values())) for p in run.held_out()} == then
    slide = next(s for s in work.slides if s.encoders)
    assert slide.features().shape == (len(slide.coords), 124)
    with pytest.warns(UserWarning, match="known to the run"):
        answers = run.predict({slide.id: slide.bag()})
    (answer,) = answers.values()
    assert answer.known  # although that version kept no list of its patients
    assert tree(folder) == before
