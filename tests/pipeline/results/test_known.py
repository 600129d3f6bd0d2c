"""Patients, slides and features that a run knows are recognised under any name, and never counted as external."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.cohort.patients import Dataset, patient_of
from mhim.pipeline.results import known
from mhim.pipeline.stages import newcomers
from mhim.pipeline.store import layout, reading, writing
from mhim.pipeline.training import fold as training
from tests.pipeline.bags import make_features, sets, write_labels

Cli = Callable[..., tuple[int, str]]
QUICK = [
    *sets("train.folds=2", "train.val_fraction=0.4", "train.epochs=3", "train.lr=0.01", "score.bootstrap=20"),
    "--workers",
    "1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and scored run of 16 patients with two slides each."""
    from mhim.pipeline.cli.main import _main

    folder = tmp_path_factory.mktemp("known")
    work = layout.Work(folder / "work")
    labels = write_labels(folder / "labels.csv", make_features(work, 16, 2))
    shared = ["--work", str(work.root), *QUICK]
    assert _main(["train", *shared, "--labels", str(labels), "--model", "abmil"]) == 0
    assert _main(["score", *shared, "--name", "abmil", "--heatmaps", "none"]) == 0
    return work.run("abmil")


def score(cli: Cli, run: Path, features: Path, labels: Path, *more: str) -> str:
    code, text = cli(
        "score",
        "--work",
        run.parents[1],
        "--name",
        "abmil",
        "--features",
        features,
        "--labels",
        labels,
        "--heatmaps",
        "none",
        *QUICK,
        *more,
    )
    assert code == 0, text
    return " ".join(text.split())


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def renamed(run: Path, folder: Path, n: int = 4) -> tuple[Path, list[Row]]:
    """The features of the run's first n patients under other names, as another import would seal them."""
    mine, theirs = layout.Work(run.parents[1]), layout.Work(folder)
    rows = []
    for i in range(n):
        for j in range(2):
            old, new = f"s{i:02d}_{j}.svs", f"elsewhere_{i}_{j}.svs"
            attrs = reading.read_attrs(mine.feature_store("texture", old)) | {"fingerprint": f"other {i} {j}"}
            writer = writing.StoreWriter(theirs.feature_store("texture", new), attrs)
            for name in ("features", "coords"):
                writer.write(name, np.asarray(reading.read_array(mine.feature_store("texture", old), name)))
            rows.append(Row(len(rows) + 2, new, f"e{i}", ("no", "yes")[i % 2]))
    return theirs.features("texture"), rows


@pytest.mark.parametrize("how", ["bag", "mean"])
def test_features_under_other_names_are_scored_by_the_folds_that_held_them_out(
    run: Path, cli: Cli, tmp_path: Path, how: str
) -> None:
    features, rows = renamed(run, tmp_path / how)
    strangers = make_features(layout.Work(tmp_path / how), 4, 2, seed=5, prefix="x")
    labels = write_labels(tmp_path / "labels.csv", [*rows, *strangers])
    text = score(cli, run, features, labels, "--as", f"mixed-{how}", "--set", f"score.several_slides={how}")
    assert "known to the run" in text
    out = run / "new" / f"mixed-{how}"
    predictions = {r["patient"]: r for r in read(out / "predictions.csv")}
    assert sorted(p for p, r in predictions.items() if r["known"]) == ["e0", "e1", "e2", "e3"]
    assert predictions["e1"]["known"] == "p01 of the run (the same features), scored by the trainings that held it out"
    if how == "bag":  # then it is the very number that the run itself gave
        inside = {r["patient"]: r for r in read(run / "predictions.csv")}
        for i in range(4):
            assert float(predictions[f"e{i}"]["p_yes"]) == pytest.approx(float(inside[f"p{i:02d}"]["p_yes"]), rel=1e-6)
    found = json.loads((out / "metrics.json").read_text())
    assert (found["patients"], found["known"]["patients"]) == (4, 4)
    assert "known to the run" in found["warnings"][0]


def test_of_the_run_s_own_patients_alone_nothing_is_external(run: Path, cli: Cli) -> None:
    work = layout.Work(run.parents[1])
    text = score(cli, run, work.features("texture"), run.parents[2] / "labels.csv", "--as", "own")
    assert "of the run's own: 16" in text
    found = json.loads((run / "new" / "own" / "metrics.json").read_text())
    assert (found["patients"], found["external"]) == (0, {})
    inside = json.loads((run / "metrics.json").read_text())
    assert found["known"]["metrics"]["auc"]["value"] == pytest.approx(inside["test"]["auc"]["value"])


def test_allow_known_counts_them_and_says_so_in_every_output(run: Path, cli: Cli, tmp_path: Path) -> None:
    features, rows = renamed(run, tmp_path)
    text = score(cli, run, features, write_labels(tmp_path / "labels.csv", rows), "--as", "allowed", "--allow-known")
    assert "too good" in text
    found = json.loads((run / "new" / "allowed" / "metrics.json").read_text())
    assert found["patients"] == 4
    assert "too good" in found["warnings"][0]
    assert all("counted as new" in r["known"] for r in read(run / "new" / "allowed" / "predictions.csv"))


def test_a_run_without_record_knows_its_patients_all_the_same(run: Path, cli: Cli, tmp_path: Path) -> None:
    """Version 0.1 wrote no patients.csv: the folds' predictions and the features in the work folder tell."""
    work = tmp_path / "work"
    shutil.copytree(run.parents[1], work)
    old = layout.Work(work).run("abmil")
    (old / known.PATIENTS).unlink()
    features, rows = renamed(run, tmp_path / "elsewhere")
    score(cli, old, features, write_labels(tmp_path / "labels.csv", rows))
    assert all(r["known"] for r in read(old / "new" / "texture" / "predictions.csv"))


def test_the_record_is_the_label_table_of_the_training(run: Path, cli: Cli) -> None:
    rows = read(run / known.PATIENTS)
    assert [(r["slide"], r["patient"], r["label"]) for r in rows[:3]] == [
        ("s00_0.svs", "p00", "no"),
        ("s00_1.svs", "p00", "no"),
        ("s01_0.svs", "p01", "yes"),
    ]
    assert len({r["features"] for r in rows}) == 32


def data_of(folder: Path, names: dict[str, str], content: str) -> Dataset:
    """patient -> its one slide, whose file has the content `content`."""
    work = layout.Work(folder)
    rng = np.random.default_rng(7)
    for slide in names.values():
        writer = writing.StoreWriter(work.feature_store("e", slide), {"content": content, "fingerprint": "x"})
        writer.write("features", rng.normal(size=(5, 3)).astype(np.float16))
        writer.write("coords", np.zeros((5, 2), np.int32))
    stores = {s: work.feature_store("e", s) for s in names.values()}
    return Dataset(tuple(patient_of(p, [s], stores) for p, s in names.items()), (), {})


@pytest.mark.parametrize(
    ("names", "content", "why"),
    [
        ({"new": "other.svs"}, "same", "the same slide file"),
        ({"P1": "other.svs"}, "another", "the same patient id"),
        ({"1.svs": "1.svs"}, "", "the same slide id"),  # nothing tells that it is another
        ({"1.svs": "1.svs"}, "another", ""),  # its name is a coincidence
        ({"new": "other.svs"}, "another", ""),
        ({"P3": "P3"}, "another", "the same patient id"),  # whom the run had without slides
        ({"P2": "P2"}, "another", ""),  # a slide's name alone, and the run knows the slides of P2
    ],
)
def test_names_and_content(tmp_path: Path, names: dict[str, str], content: str, why: str) -> None:
    run = tmp_path / "work" / "runs" / "r"
    fold = run / "fold_0"
    fold.mkdir(parents=True)
    rows = ["slide,patient,label,content,features", "1.svs,P1,a,same,f00", "2.svs,P2,b,more,f01", ",P3,a,,"]
    (run / known.PATIENTS).write_text("\n".join(rows) + "\n")
    (fold / training.PREDICTIONS).write_text('side,patient,slides\ntest,P1,"[""1.svs""]"\ntest,P3,[]\n')
    found = known.recognise(run, [fold], data_of(tmp_path / "new", names, content))
    assert [one.why for one in found.values()] == ([why] if why else [])
    assert all(one.folders == (fold,) for one in found.values())


def test_who_was_always_trained_on_is_scored_by_none(tmp_path: Path) -> None:
    run = tmp_path / "work" / "runs" / "r"
    fold = run / "fold_0"
    fold.mkdir(parents=True)
    (run / known.PATIENTS).write_text("slide,patient,label,content,features\n1.svs,P1,a,,\n2.svs,P2,b,,\n")
    (fold / training.PREDICTIONS).write_text('side,patient,slides\ntest,P1,"[""1.svs""]"\n')
    (one,) = known.recognise(run, [fold], data_of(tmp_path / "new", {"P2": "z.svs"}, "")).values()
    assert one.folders == ()
    assert "every training of the run has seen" in known.note({"P2": one}, ["P2"], False)[1]


def test_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    new = tmp_path / "new"
    places = [tmp_path / f"hospital_{k}" / "slides" for k in (1, 2)]
    names = []
    for place in places:
        place.mkdir(parents=True)
        folder = newcomers.folder_of(new, place, None)
        newcomers.remember(folder, place)
        names.append(folder.name)
    assert names == ["slides", "hospital_2-slides"]
    assert newcomers.folder_of(new, places[1], None).name == "hospital_2-slides"  # the same place again
    (tmp_path / "link").symlink_to(tmp_path / "hospital_1")
    assert newcomers.folder_of(new, tmp_path / "link" / "slides", None).name == "slides"
    assert newcomers.folder_of(new, places[1], "second").name == "second"
    with pytest.raises(CohortError, match="--as"):
        newcomers.folder_of(new, places[1], "slides")
    with pytest.raises(CohortError, match="no name of a folder"):
        newcomers.folder_of(new, places[1], "../out")


def test_the_id_of_features_is_that_of_their_numbers(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float16)
    ids = []
    arrays = {"a": (x, 16384), "b": (x.astype(np.float32), 70), "c": (x[:299], 16384), "d": (-x, 16384)}
    for name, (array, rows) in arrays.items():
        writer = writing.StoreWriter(tmp_path / name, {})
        writer.write("features", array, rows)
        ids.append(known.features_id(tmp_path / name))
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: bytes(len(raw)), "cut short, or holds bytes that were never written"),
        (lambda raw: raw[: len(raw) // 3], "cut short"),
        (lambda raw: b"".join(raw.splitlines(keepends=True)[:9]), "it lacks 24 .* such as s04_0.svs"),
        (lambda raw: raw.splitlines(keepends=True)[0], "no rows"),
        (lambda raw: raw.replace(b"features", b"feat\xffres", 1), "cannot be read"),
        (lambda raw: raw.replace(b"features", b"feature5", 1), "not its columns"),
    ],
)
def test_a_damaged_record_makes_nobody_new(
    run: Path, tmp_path: Path, cli: Cli, damage: Callable[[bytes], bytes], says: str
) -> None:
    work = tmp_path / "work"
    shutil.copytree(run.parents[1], work)
    record = work / "runs" / "abmil" / known.PATIENTS
    whole = record.read_bytes()
    record.write_bytes(damage(whole))
    features, rows = renamed(run, tmp_path / "there")
    shared = ["--work", work, *QUICK]
    given = ["--features", features, "--labels", write_labels(tmp_path / "there.csv", rows)]
    code, text = cli("score", *shared, "--name", "abmil", *given, "--heatmaps", "none")
    assert code == 2, text
    assert re.search(rf"patients.csv is damaged: .*{says}", " ".join(text.split())), text
    code, text = cli("train", *shared, "--labels", run.parents[2] / "labels.csv", "--model", "abmil")
    assert code == 0, text
    assert "written anew" in " ".join(text.split()), text
    assert record.read_bytes() == whole
    assert known.damaged(record.parent, []) == ""


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_predictions_of_a_training_that_cannot_be_read_are_named(run: Path, tmp_path: Path, byte: bytes) -> None:
    fold = tmp_path / "fold_0"
    shutil.copytree(run / "fold_0", fold)
    file = fold / training.PREDICTIONS
    file.write_bytes(byte * file.stat().st_size)
    with pytest.raises(layout.StoreError, match=r"fold_0/predictions.csv is damaged: .*verify --repair"):
        training.read_predictions(fold)


def test_a_record_that_is_gone_is_told(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "abmil"
    shutil.copytree(run, there)
    assert known.unrecorded(there) == []
    (there / known.PATIENTS).unlink()
    assert "has lost its patients.csv" in known.unrecorded(there)[0]
    (there / "labels.yaml").unlink()  # version 0.1 kept neither
    assert known.unrecorded(there) == []
    assert known.damaged(there, []) == ""


def test_numbers_of_the_right_length_that_cannot_be_read_have_a_cure(run: Path, tmp_path: Path, cli: Cli) -> None:
    work = tmp_path / "work"
    shutil.copytree(run.parents[1], work)
    file = work / "runs" / "abmil" / "metrics.json"
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    again = ["score", "--work", work, *QUICK, "--name", "abmil", "--heatmaps", "none"]
    code, text = cli(*again)
    assert code == 2, text
    assert "metrics.json is damaged" in " ".join(text.split())
    assert "after `pipeline verify --repair`" in " ".join(text.split()), text
    assert cli("verify", "--work", work, "--repair")[0] == 1
    assert cli(*again)[0] == 0
    assert file.read_bytes() == whole
