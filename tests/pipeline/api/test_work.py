"""The library gives the command line's numbers and bytes, and is typed as strictly as its users may be."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.configs.errors import UserError
from mhim.pipeline import Work
from mhim.pipeline.api import Bag, Run
from mhim.pipeline.store import layout, reading
from tests.pipeline.bags import make_features, tree, write_labels

Cli = Callable[..., tuple[int, str]]
ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {
    "train.folds": 2,
    "train.epochs": 2,
    "train.patience": 0,
    "train.model_params": {"width": 8, "attention_width": 8},
    "score.bootstrap": 5,
    "score.heatmaps": "none",
}
SET = [part for k, v in SETTINGS.items() for part in ("--set", f"{k}={json.dumps(v)}")]


def own_bags(n: int = 12) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Bags of the second kind have a shifted feature."""
    rng = np.random.default_rng(3)
    bags = {f"b{i:02d}": rng.normal(size=(5 + i % 3, 4)).astype(np.float32) for i in range(n)}
    labels = {name: ("no", "yes")[i % 2] for i, name in enumerate(bags)}
    for name, features in bags.items():
        features[:3, 0] += 3 * (labels[name] == "yes")
    return bags, labels


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, demo_cohort: Path, tiled_cohort: Path) -> Path:
    """A work folder with real slides, trained and scored by the command line. Not to be changed."""
    from mhim.pipeline.cli.main import _main

    work = tmp_path_factory.mktemp("api") / "work"
    shutil.copytree(tiled_cohort, work)
    labels = str(demo_cohort / "labels.csv")
    assert _main(["train", "--work", str(work), "--labels", labels, "--model", "abmil", "--workers", "1", *SET]) == 0
    assert _main(["score", "--work", str(work), "--name", "abmil", "--workers", "1", *SET]) == 0
    return work


def predictions(run: Path) -> dict[str, dict[str, str]]:
    with open(run / "predictions.csv", newline="") as file:
        return {row["patient"]: row for row in csv.DictReader(file)}


def test_slides_their_tiles_and_features_are_those_of_the_store(scored: Path) -> None:
    work = Work(scored)
    paths = layout.Work(scored)
    assert work.encoders == ["texture"]
    assert work.runs == ["abmil"]
    tiled = [s for s in work.slides if s.encoders]
    assert len(tiled) == 8
    without_features = {s.id for s in work.slides if s.tiled} - {s.id for s in tiled}
    assert without_features == {"no_tissue.svs"}  # an empty result; the broken slides have none
    slide = work.slide(tiled[0].id)
    features = slide.features()
    store = paths.feature_store("texture", slide.id)
    np.testing.assert_array_equal(features, reading.read_array(store, "features"))
    assert features.dtype == np.float16
    assert not features.flags.writeable
    base = features
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap) or "mmap" in type(base.base).__name__  # mapped, not read
    np.testing.assert_array_equal(slide.coords, reading.read_array(paths.tile_store(slide.id), "coords"))
    assert slide.attributes["tile_px"] == 256
    bag = slide.bag()
    np.testing.assert_array_equal(bag.coords, reading.read_array(store, "coords"))


def test_tiles_are_the_pixels_that_the_encoder_received(scored: Path) -> None:
    from mhim.configs.schema import ExtractConfig
    from mhim.extract.encoders import build

    slide = next(s for s in Work(scored).slides if s.encoders)
    several = np.concatenate(list(slide.tiles(rows=[3, 0, 5], batch=2)))
    assert (several.shape, several.dtype) == ((3, 256, 256, 3), np.uint8)
    np.testing.assert_array_equal(several[1], slide.tile(0))
    again = build(ExtractConfig()).encode(several).astype(np.float16)
    np.testing.assert_array_equal(again, slide.features()[[3, 0, 5]])


def test_patients_are_those_that_train_reads(scored: Path, demo_cohort: Path) -> None:
    patients = Work(scored).patients(demo_cohort / "labels.csv")
    with open(demo_cohort / "labels.csv", newline="") as file:
        known = {row["patient"]: row["label"] for row in csv.DictReader(file)}
    assert {p.id: p.label for p in patients} == {p.id: known[p.id] for p in patients}
    first = patients[0]
    rows = sum(len(s.features()) for s in first.slides)
    assert first.bag().features.shape == (rows, first.slides[0].features().shape[1])
    assert first.time is None
    assert len(Work(scored).patients()) == 8  # without a table each slide by itself


def test_predictions_are_those_that_score_writes(scored: Path) -> None:
    before = tree(scored)
    run = Work(scored).run()
    written = predictions(scored / "runs" / "abmil")
    held_out = {p.patient: p for p in run.held_out()}
    with pytest.warns(UserWarning, match="known to the run"):
        stored = {p.patient: p for p in run.predict_slides()}
    with pytest.warns(UserWarning, match="known to the run"):
        by_hand = run.predict({s.id: s.bag() for s in Work(scored).slides if s.encoders})
    assert held_out.keys() == stored.keys() == written.keys()
    for patient, row in written.items():
        for name in run.classes:
            assert held_out[patient].probabilities[name] == float(row[f"p_{name}"])
            assert stored[patient].probabilities[name] == pytest.approx(float(row[f"p_{name}"]), abs=1e-6)
        assert held_out[patient].decision == stored[patient].decision == row["decision"]
        assert stored[patient].known  # scored by the model that held it out, and said so
        slides = stored[patient].slides
        if len(slides) == 1:  # also arrays are recognised by what they hold
            assert by_hand[slides[0]].probabilities == stored[patient].probabilities
            assert by_hand[slides[0]].known
    slide = next(iter(written.values()))["slide"].split(";")[0]
    only = run.predict_slides([slide])
    assert [p.probabilities for p in only] == [p.probabilities for p in stored.values() if slide in p.slides]
    assert tree(scored) == before  # asking changes nothing


def test_strangers_are_scored_by_all_models_as_the_command_line_does(scored: Path, tmp_path: Path, cli: Cli) -> None:
    work = tmp_path / "work"
    shutil.copytree(scored, work)
    run = Work(work).run("abmil")
    source = next(s for s in Work(work).slides if s.encoders)
    features = np.asarray(source.features()).copy()[::-1] * np.float16(0.5)
    answer = run.predict({"new": Bag(features, np.asarray(source.coords), 512.0)})["new"]
    assert answer.known == ""
    assert answer.spread is not None
    from mhim.pipeline.api.bags import arrays_of
    from mhim.pipeline.exchange.bag_table import write_bag

    bag = arrays_of({"new": Bag(features, np.asarray(source.coords), 512.0)})["new"]
    attrs = {**json.loads((run.folds[0] / "model.json").read_text())["features"], **bag.sizes, "fingerprint": "f"}
    write_bag(bag, tmp_path / "features" / "new.zarr", tmp_path / "features", attrs)
    code, text = cli("score", "--work", work, "--name", "abmil", "--features", tmp_path / "features", *SET)
    assert code == 0, text
    row = predictions(work / "runs" / "abmil" / "new" / Path(tmp_path / "features").name)["new"]
    assert {k: float(row[f"p_{k}"]) for k in run.classes} == dict(answer.probabilities)
    assert float(row["spread"]) == answer.spread
    assert (float(row["unlike"]) if "unlike" in row else None) == answer.unlike


def test_the_heatmap_is_the_picture_that_score_draws(scored: Path, tmp_path: Path, cli: Cli) -> None:
    import cv2

    work = tmp_path / "work"
    shutil.copytree(scored, work)
    assert cli("score", "--work", work, "--name", "abmil", *SET, "--heatmaps", "all", "--workers", "1")[0] == 0
    run = Work(work).run("abmil")
    slide = sorted(p.name for p in (run.folder / "heatmaps").iterdir() if p.is_dir())[0]
    for layer in ("attention", f"contribution_{run.classes[1]}"):
        drawn = cv2.imread(str(run.folder / "heatmaps" / slide / f"{layer}.png"))[..., ::-1]
        np.testing.assert_array_equal(run.heatmap(slide, layer), drawn)
    stored = run.scores(slide)
    shutil.rmtree(run.folder / "scores")
    np.testing.assert_array_equal(run.heatmap(slide, layer, tmp_path / "own.png"), drawn)
    assert (tmp_path / "own.png").is_file()
    np.testing.assert_allclose(run.scores(slide).attention, stored.attention, atol=1e-7)
    with pytest.raises(layout.StoreError, match="there is: attention"):
        run.heatmap(slide, "heat")


def test_stored_scores_of_models_that_are_gone_are_not_shown(
    scored: Path, demo_cohort: Path, tmp_path: Path, cli: Cli
) -> None:
    """Trained again, not scored again: what lies in `scores/` is the answer of other models."""
    work = tmp_path / "work"
    shutil.copytree(scored, work)
    slide = sorted(p.name.removesuffix(".zarr") for p in (work / "runs" / "abmil" / "scores").iterdir())[0]
    before = Work(work).run("abmil").scores(slide).attention
    train = [
        "train",
        "--work",
        work,
        "--labels",
        demo_cohort / "labels.csv",
        "--model",
        "abmil",
        "--workers",
        "1",
        *SET,
    ]
    assert cli(*train, "--set", "train.lr=0.05", "--replace")[0] == 0
    now = Work(work).run("abmil").scores(slide).attention
    assert not np.allclose(now, before, atol=1e-6)
    assert cli("score", "--work", work, "--name", "abmil", "--workers", "1", *SET)[0] == 0
    np.testing.assert_allclose(Work(work).run("abmil").scores(slide).attention, now, atol=1e-7)


def test_training_leaves_the_bytes_of_the_command_line(tmp_path: Path, cli: Cli) -> None:
    bags, labels = own_bags()
    run = Work(tmp_path / "api").train(bags, labels, model="abmil", settings=SETTINGS)
    assert isinstance(run, Run)
    assert run.classes == ("no", "yes")
    header = ["label", "bag", *(f"f{i}" for i in range(4))]
    lines = [[labels[b], b, *(repr(float(v)) for v in row)] for b, x in bags.items() for row in x]
    table = tmp_path / "bags.csv"
    table.write_text("\n".join(",".join(line) for line in [header, *lines]) + "\n")
    work = tmp_path / "cli"
    assert cli("import", table, "--encoder", "own", "--work", work)[0] == 0
    code, text = cli("train", "--work", work, "--encoder", "own", "--model", "abmil", "--workers", "1", *SET)
    assert code == 0, text
    for fold in ("fold_0", "fold_1"):
        ours, theirs = (root / "runs" / "abmil" / fold for root in (tmp_path / "api", work))
        for name in ("model.safetensors", "model.json", "predictions.csv"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert tree(tmp_path / "api" / "features") == tree(work / "features")
    # what is there is not trained again, other settings are refused, and own bags are known again
    stamp = (tmp_path / "api/runs/abmil/fold_0/model.json").stat().st_mtime_ns
    again = Work(tmp_path / "api").train(bags, labels, model="abmil", settings=SETTINGS)
    assert (again.folder / "fold_0/model.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"train\.epochs"):
        Work(tmp_path / "api").train(bags, labels, model="abmil", settings={**SETTINGS, "train.epochs": 3})
    held_out = {p.patient: p.probabilities for p in run.held_out()}
    with pytest.warns(UserWarning, match="known to the run"):
        asked = run.predict(bags)
    for name in bags:
        assert asked[name].known
        assert asked[name].probabilities["yes"] == pytest.approx(held_out[name]["yes"], abs=1e-6)


def test_training_on_stored_features_takes_the_table(tmp_path: Path, cli: Cli) -> None:
    rows = make_features(layout.Work(tmp_path / "work"))
    labels = write_labels(tmp_path / "labels.csv", rows)
    run = Work(tmp_path / "work").train(labels=labels, model="abmil", name="mine", settings=SETTINGS)
    assert (run.name, len(run.folds), run.model) == ("mine", 2, "abmil")
    code, text = cli(
        "train", "--work", tmp_path / "work", "--labels", labels, "--model", "abmil", "--name", "mine", *SET
    )
    assert code == 0, text
    assert "2 done" in text or "nothing" in text or "already" in text


@pytest.mark.parametrize(
    ("bags", "labels", "says"),
    [
        ({}, {}, "there is no bag"),
        ({"a": np.zeros((2, 3)), "b": np.zeros((2, 4))}, {"a": "x", "b": "y"}, "bag b: features are 4 wide"),
        ({"a": np.zeros(3)}, {"a": "x"}, r"bag a: features are \(3,\)"),
        ({"a": np.full((1, 2), np.nan)}, {"a": "x"}, "bag a: .*NaN"),
        ({"../a": np.zeros((1, 2))}, {"../a": "x"}, "cannot be the name of a bag"),
        ({"a": np.zeros((1, 2))}, {"b": "x"}, "bag a .* only one of bags and labels"),
        ({"a": np.zeros((1, 2))}, None, "labels by name"),
        ({"a": Bag(np.zeros((2, 2)), np.zeros((3, 2), int))}, {"a": "x"}, "2 instances but coords"),
    ],
)
def test_what_is_no_bag_is_told_by_name(tmp_path: Path, bags: object, labels: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Work(tmp_path / "work").train(bags, labels)  # type: ignore[arg-type]
    assert not (tmp_path / "work").exists()


def test_what_is_not_there_is_told_with_what_is(scored: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no slide 'x' in .*; there is: "):
        Work(scored).slide("x")
    with pytest.raises(UserError, match="there is: abmil"):
        Work(scored).run("other")
    with pytest.raises(UserError, match="no features of 'uni2-h'; there is: texture"):
        next(s for s in Work(scored).slides if s.encoders).features("uni2-h")
    with pytest.raises(UserError, match="dim: trained on"):
        Work(scored).run().predict({"a": np.zeros((3, 7), np.float32)})
    assert Work(tmp_path / "none").slides == []
    assert Work(tmp_path / "none").runs == []
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Work(tmp_path / "file")


def test_anndata_has_features_places_and_facts(scored: Path) -> None:
    pytest.importorskip("anndata")
    slide = next(s for s in Work(scored).slides if s.encoders)
    made = slide.to_anndata()
    np.testing.assert_array_equal(made.X, slide.features().astype(np.float32))
    coords = np.asarray(slide.bag().coords)
    np.testing.assert_array_equal(made.obs[["x_l0", "y_l0"]].to_numpy(), coords)
    edge = np.asarray(slide.attributes["tile_l0"])
    np.testing.assert_array_equal(made.obsm["spatial"], coords + edge / 2)
    assert made.uns["mhim"]["encoder"] == "texture"
    assert made.uns["mhim"]["mpp"] == slide.attributes["mpp"]


def test_without_anndata_the_message_names_the_extra(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(UserError, match=r"pip install 'mhim-pipeline\[anndata\]'"):
        next(s for s in Work(scored).slides if s.encoders).to_anndata()


def test_the_name_is_there_and_nothing_heavy_until_it_is_used() -> None:
    code = (
        "import sys, mhim.pipeline\nassert 'Work' in mhim.pipeline.__all__\n"
        "assert not {'torch', 'numpy', 'zarr'} & set(sys.modules)\n"
        "from mhim.pipeline import Work\nassert Work.__module__ == 'mhim.pipeline.api.work'\n"
        "try:\n    mhim.pipeline.Nothing\nexcept AttributeError as e:\n    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "has no attribute 'Nothing'" in done.stdout


USER = '''
"""A user's own script."""

import numpy as np

from mhim.pipeline import Work
from mhim.pipeline.api import Bag, Patient, Prediction, Run, Slide


def main(names: list[str]) -> dict[str, float]:
    work = Work("work", allow=["my_module"])
    slides: list[Slide] = work.slides
    width: int = slides[0].features("texture").shape[1]
    table: list[Patient] = work.patients("labels.csv")
    ages = {p.id: p.time for p in table if p.event}
    bags = {name: np.zeros((3, width), dtype=np.float32) for name in names}
    run: Run = work.train(bags, {name: "a" for name in names}, model="abmil", settings={"train.epochs": 2})
    more: dict[str, Prediction] = run.predict({"x": Bag(bags[names[0]]), "y": bags[names[0]]})
    picture = work.run("mhim").heatmap(slides[0], "attention")
    print(ages, picture.shape[0] + 1, run.scores("a.svs").attention.mean(), next(slides[0].tiles()).dtype)
    return {name: p.probabilities["a"] for name, p in more.items()}
'''
WRONG = "\nWork(3)\nWork('w').run('a').predict([1])\nx: int = Work('w').slide('a').id\n"


def test_a_users_script_passes_mypy_strict_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    """Against the packages as they are installed, under mhim, with their types (`py.typed`)."""
    pytest.importorskip("mypy")
    links = tmp_path / "links" / "mhim"
    links.mkdir(parents=True)
    for room in ("configs", "extract", "mil", "pipeline"):
        (links / room).symlink_to(ROOT / room)
        assert (ROOT / room / "py.typed").is_file()
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(USER + WRONG)
    # nothing of these libraries is in what a user's script sees, and to read them takes most of the time
    unseen = ("torch", "torchvision", "timm", "matplotlib", "zarr", "dask", "cv2")
    passed_over = ",".join(f"{name}.*" for name in unseen)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{passed_over}]\nfollow_imports = skip\n")
    line = [sys.executable, "-m", "mypy", "--strict", "--config-file=mypy.ini", "--follow-imports=silent"]
    line += ["--ignore-missing-imports", f"--cache-dir={ROOT / '.mypy_cache' / 'user'}", "user.py", "wrong.py"]
    environment = {**os.environ, "MYPYPATH": str(links.parent)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    errors = [text for text in done.stdout.splitlines() if ": error:" in text]
    assert [e.split(":")[0] for e in errors] == ["wrong.py"] * 3, done.stdout + done.stderr
