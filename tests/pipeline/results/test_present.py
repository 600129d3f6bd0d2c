"""What was made by trainings that are there no more is shown nowhere, and told; damage costs its own part of a page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.maps import shown
from mhim.pipeline.results import evidence, truth
from mhim.pipeline.results.present import SCORED_BY, Present
from mhim.pipeline.store import layout, seals, writing
from mhim.pipeline.store.layout import StoreError
from mhim.pipeline.upkeep import status
from mhim.pipeline.viewer import runs
from tests.pipeline.bags import make_features, sets, write_labels

Cli = Callable[..., tuple[int, str]]
SMALL = sets("train.folds=2", "train.epochs=2", 'train.model_params={"width": 8}', "score.bootstrap=0")
GONE = "s03_0.svs"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[layout.Work, Path]:
    folder = tmp_path_factory.mktemp("present")
    work = layout.Work(folder / "work")
    return work, write_labels(folder / "labels.csv", make_features(work, 12))


def test_results_of_trainings_that_are_gone_are_not_shown(cli: Cli, made: tuple[layout.Work, Path]) -> None:
    work, labels = made
    run, other = work.run("abmil"), layout.Work(work.root.parent / "other")
    of_other = write_labels(work.root.parent / "other.csv", make_features(other, 6, seed=5, prefix="x"))
    train = ("train", "--work", work.root, "--model", "abmil", *SMALL, "--workers", 1)
    quiet = ("--workers", 1, *sets("score.bootstrap=0", "score.heatmaps=none", "score.evidence=attention"))
    score = ("score", "--work", work.root, *quiet)
    new = (*score, "--features", other.features("texture"), "--as", "other", "--labels", of_other)
    drawn = ("map", "--work", work.root, "--run", "abmil", "--method", "pca", "--workers", 1)
    report = ("report", "--work", work.root)
    for command in ((*train, "--labels", labels), score, new, (*drawn, "--labels", labels), report):
        code, text = cli(*command)
        assert code == 0, text
    first = evidence.means(run)["maps"]["attention"]["patients"]
    assert first == 12
    assert runs.of_run(run)[0].present.scores(GONE) is not None
    assert shown.read(work, "texture")[0].card["attention"]

    # trained without one patient: results, map, and the numbers of another cohort are of trainings that are gone
    fewer = work.root.parent / "fewer.csv"
    fewer.write_text("".join(line for line in labels.read_text().splitlines(True) if GONE not in line))
    assert cli(*train, "--labels", fewer, "--replace")[0] == 0
    for command in (report, ("compare", "abmil", "abmil", "--work", work.root)):
        code, text = cli(*command)
        assert code == 2
        assert "abmil was trained again since" in text
    with pytest.raises(StoreError, match="trained again since"):
        runs.of_run(run)
    assert evidence.means(run)["maps"] == {}
    one, told = shown.read(work, "texture")
    assert not one.card["attention"]
    assert {c["kind"] for c in one.card["colours"]} == {"classes"}
    assert "what the run abmil said is of trainings that are there no more" in told
    code, text = cli("status", "--work", work.root)
    assert text.count("trained again since") == 2  # of the run, and of the other cohort

    # scored again: the slide that the run has no more keeps its old scores on the disk, and they are shown nowhere
    assert cli(*score)[0] == 0
    assert (run / "scores" / f"{GONE}.zarr").is_dir()
    assert Present(run).stale() == [GONE]
    assert Present(run).scores(GONE) is None
    assert evidence.means(run)["maps"]["attention"]["patients"] == first - 1
    told = cli("status", "--work", work.root)[1]
    assert f"score abmil: scores of 1 slide ({GONE}) are of trainings that are there no more" in told
    code, text = cli(*report)
    assert code == 1, "the other cohort was scored by the trainings before"
    assert "not in the report: the cohort other" in text
    page = (run / "report.html").read_text()
    assert f"scores of 1 slide ({GONE})" in page
    assert "Not on this page: the cohort other" in page
    assert '<h2 id="external">' not in page
    kept = (run / "new" / "other" / SCORED_BY).read_text()
    (run / "new" / "other" / SCORED_BY).unlink()  # as version 0.2 leaves it: then its scores tell
    with pytest.raises(StoreError, match="trained again since"):
        Present(run / "new" / "other").check()
    (run / "new" / "other" / SCORED_BY).write_text(kept)
    code, text = cli(*new)
    assert code == 0, text
    kept_scores = run / "scores" / "s00_0.svs.zarr"
    picture = run / "heatmaps" / "s00_0.svs"
    picture.mkdir(parents=True)
    writing.seal(picture, {"stage": "draw"})
    kept_scores.rename(work.root / "away")
    code, text = cli(*report)
    assert code == 0, text
    page = (run / "report.html").read_text()
    assert '<h2 id="external">' in page
    assert "pictures of 1 slide (s00_0.svs) are not shown: scores are not there" in page
    assert "No heatmaps were drawn" not in page
    (work.root / "away").rename(kept_scores)
    shutil.rmtree(picture)
    assert cli(*drawn, "--labels", labels)[0] == 0
    rows = shown.read(work, "texture")[0]
    assert rows.card["attention"]
    blank = next(k for k, r in enumerate(rows.slides) if r["slide"] == GONE)
    known = np.isfinite(rows.tiles["attention"])
    assert (known == (rows.tiles["slide"] != blank)).all()


def test_pictures_of_other_scores_are_none_of_the_slides(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for slide, models in (("a", ["now"]), ("b", ["before"]), ("c", ["now"])):
        attrs = {"fingerprint": f"scores of {slide}", "settings": {"input.models": models}}
        writing.StoreWriter(run / "scores" / f"{slide}.zarr", attrs).write("attention", np.ones(3, np.float32))
        of = "scores before" if slide == "c" else f"scores of {slide}"
        (run / "heatmaps" / slide).mkdir(parents=True)
        (run / "heatmaps" / slide / seals.SEAL).write_text(
            json.dumps({"fingerprint": "f", "settings": {"input.scores": of}})
        )
    fold = run / "fold_0"
    fold.mkdir()
    (fold / layout.CARD).write_text("{}")
    (fold / seals.SEAL).write_text(json.dumps({"fingerprint": "now"}))
    present = Present(run)
    assert present.pictures("a") == (run / "heatmaps" / "a", "")
    assert present.pictures("b") == (None, "scores are of trainings that are there no more")
    assert present.pictures("c") == (None, "drawn of other scores than there are now")
    assert present.pictures("d") == (None, ""), "there are none"
    shutil.rmtree(run / "scores" / "a.zarr")  # to save space
    assert present.pictures("a") == (None, "scores are not there")
    assert present.stale() == ["b"]
    assert present.stale(but={"b"}) == []


def test_what_cannot_tell_its_trainings_is_shown_and_a_damaged_note_of_them_costs_its_run_alone(tmp_path: Path) -> None:
    work = layout.Work(tmp_path)
    run = work.run("brought")
    (run / "new" / "other").mkdir(parents=True)
    assert not Present(run).are_gone({"before"}), "its trainings were deleted to save space"
    (run / layout.CARD).write_text("{}")  # a model without a seal: nobody can tell which it is
    assert not Present(run).are_gone({"before"})
    attrs = {"fingerprint": "f", "settings": {"input.models": ["before"]}}
    writing.StoreWriter(run / "new" / "other" / "scores" / "s.zarr", attrs).write("attention", np.ones(3, np.float32))
    assert status.old_results(work) == []
    (run / "new" / "other" / SCORED_BY).write_text("{")
    (told,) = status.old_results(work)
    assert told.startswith("score brought/new/other: ")
    assert SCORED_BY in told


DAMAGED = {  # file: what stands in it, and the part of the report that it costs
    "truth.json": (b'{"scores": ', "truth.json"),
    "splits.csv": (b"repeat\n0\n", "splits"),
    "config.yaml": (b"\xff", "config.yaml"),
    "fold_0/history.csv": (b"epoch,loss\n0,none\n", "training curves"),
    "new/other/metrics.json": (b"[]", "the cohort other"),
    "../second/metrics.json": (b"{}", "the run second"),
    "../../maps/texture/map.json": (b"{", "the map texture"),
    "fusion.json": (b"{", "modalities"),
}


@pytest.mark.parametrize(
    "damaged",
    [
        DAMAGED,  # at once: each costs its own part, or another's would be told too, or not be told
        {"truth.json": (b'{"scores": "%s", "maps": {"attention": 3}}', "truth.json")},
        {"evidence/s01_0.svs.zarr/zarr.json": (b"", "")},  # of a slide: told by the commands that make it
    ],
    ids=["all", "truth", "evidence"],
)
def test_a_damaged_file_costs_its_own_part_of_the_report(
    cli: Cli, made: tuple[layout.Work, Path], damaged: dict[str, tuple[bytes, str]]
) -> None:
    work, _ = made
    run = work.run("abmil")
    before = {run / name: (run / name).read_bytes() if (run / name).exists() else None for name in damaged}
    for name, (content, _) in damaged.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content.replace(b"%s", truth._scores_of(run).encode()))
    parts = {part for _, part in damaged.values() if part}
    try:
        code, text = cli("report", "--work", work.root, "--name", "abmil")
        assert code == (1 if parts else 0), text
        also = {"trainings", "do it again"} if damaged is DAMAGED else set()  # they read the same files of the folds
        assert set(re.findall(r"not in the report: ([^:,]+)", text)) == parts | also
        assert '<h2 id="patients">' in (run / "report.html").read_text()
    finally:
        for path, content in before.items():
            path.write_bytes(content) if content is not None else path.unlink()
