"""A second scheduler is one file: reached by its name alone through `run`, `status` and `retry`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mhim.configs import trust
from mhim.pipeline import backends
from mhim.pipeline.backends import ArrayState, JobFolder, Step, Submitted
from mhim.pipeline.resume.stage import Stopped
from mhim.pipeline.store.layout import Work
from tests.extract.slides import tissue_rgb, write_svs

Cli = Callable[..., tuple[int, str]]
TOY = "tests.pipeline.backends.toy_scheduler"


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A good slide, a damaged one, and labels."""
    slides = tmp_path / "slides"
    slides.mkdir()
    write_svs(slides / "good.svs", tissue_rgb(512, 512, 1))
    (slides / "bad.svs").write_bytes((slides / "good.svs").read_bytes()[:2000])
    (tmp_path / "labels.csv").write_text("slide,label\ngood.svs,a\nbad.svs,b\n")
    return tmp_path


def submitted(cohort: Path, cli: Cli, *more: object) -> tuple[Path, str]:
    """All four verbs handed to the toy."""
    work = cohort / "work"
    run = ["run", cohort / "slides", "--labels", cohort / "labels.csv", "--work", work, "--backend", TOY, *more]
    code, text = cli(*run)
    assert code == 0, text
    return work, text


def test_run_status_and_retry_know_a_scheduler_by_its_name(cohort: Path, cli: Cli) -> None:
    work, text = submitted(cohort, cli, "--set", "cluster.backend_params.queue=long")
    for line in (
        "tile: job long-1 (1 task, 2 items)",
        "extract: job long-2 (1 task, 2 items)",
        "train: job long-3 (1 task, 5 items)",
        "score: job long-4 (1 task, 1 item)",
    ):
        assert line in text
    (card,) = work.glob("jobs/*/job.json")
    assert json.loads(card.read_text())["backend"] == TOY
    assert (work / "tiles" / "good.svs.zarr").is_dir()  # by the task, on "the node"

    code, text = cli("--allow-plugin", TOY, "status", "--work", work)
    assert code == 1
    assert "job long-1 tile: 0 running; 0 waiting; 1 ended, 1 of them not well" in text
    assert "job long-3 train: 0 running; 1 waiting (the one before); 0 ended" in text
    assert "failed bad.svs" in text

    code, text = cli("retry", "--failed", "--work", work)
    assert code == 3
    assert f"it ran on '{TOY}': say where it is to run" in text
    code, text = cli("retry", "--failed", "--work", work, "--set", f"cluster.backend={TOY}")
    assert code == 0
    assert "tile: job short-1 (1 task, 1 item)" in text
    assert len(list(work.glob("jobs/*/job.json"))) == 2


def test_a_record_names_no_code(cohort: Path, cli: Cli) -> None:
    """Whose job folder it is stands in a file: without a word of the person, it imports nothing, and status goes on."""
    work, _ = submitted(cohort, cli)
    code, text = cli("status", "--work", work)
    assert code == 1
    assert "job short-2 extract: 1 not ended; its scheduler cannot be asked:" in text
    assert f"--allow-plugin {TOY}" in text


def test_a_dry_run_submits_nothing(cohort: Path, cli: Cli) -> None:
    work = cohort / "work"
    dry = ["--labels", cohort / "labels.csv", "--work", work, "--backend", TOY, "--dry-run"]
    code, text = cli("run", cohort / "slides", *dry)
    assert code == 0
    assert "tile: 2 items" in text
    assert not work.exists()


def test_outputs_of_other_parameters_are_refused_before_anything_is_submitted(cohort: Path, cli: Cli) -> None:
    work, _ = submitted(cohort, cli)
    tile = ["tile", cohort / "slides", "--work", work, "--backend", TOY, "--tile-px", 128]
    code, text = cli(*tile)
    assert code == 3
    assert "tile.tile_px: 256 there, 128 now" in text
    assert len(list(work.glob("jobs/*"))) == 1
    shutil.rmtree(work / "tiles")
    assert cli(*tile)[0] == 0
    assert len(list(work.glob("jobs/*"))) == 2


def job(work: Work, **card: object) -> Path:
    """A job folder of two tasks, the first of which ended well."""
    folder = JobFolder.new(work)
    folder.remember(TOY, [Submitted("tile", "7", 2, 2, "")])
    raw = json.loads((folder.path / "job.json").read_text()) | card
    (folder.path / "job.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    (folder.path / "ends").write_text("tile 1 0 0 node 2026\n")
    return folder.path


def test_records_of_version_0_1_are_slurms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(Work(tmp_path), backend=None)
    asked: list[ArrayState] = []
    monkeypatch.setattr("mhim.pipeline.backends.slurm.look", lambda states: asked.extend(states) or "")
    assert backends.jobs(Work(tmp_path)) == asked
    assert [(state.ended, state.lost) for state in asked] == [({1: 0}, [2])]


def test_a_back_end_that_submits_nothing_is_told(tmp_path: Path) -> None:
    job(Work(tmp_path), backend="local")
    (state,) = backends.jobs(Work(tmp_path))
    assert state.unasked == "'local' submits nothing"
    assert (state.lost, state.over) == ([], False)


def test_jobs_are_followed_until_all_are_over(tmp_path: Path) -> None:
    trust.allow(TOY)
    work, lines = Work(tmp_path), list[str]()
    folder = job(work)
    assert backends.follow(work, folder, 0.01, lines.append) == 1  # the second task was lost
    assert lines == ["job 7 tile: 0 running; 0 waiting; 1 ended; 1 lost (cancelled, or their node died)"]
    (folder / "ends").write_text("tile 1 0 0 node 2026\ntile 2 0 0 node 2026\n")
    assert backends.follow(work, folder, 0.01, lines.append) == 0
    (folder / "refused").touch()
    assert backends.follow(work, folder, 0.01, lines.append) == 3


def test_jobs_of_a_scheduler_that_cannot_be_asked_are_not_followed(tmp_path: Path) -> None:
    folder = job(Work(tmp_path), backend="stranger_scheduler")
    with pytest.raises(Stopped, match="cannot be followed"):
        backends.follow(Work(tmp_path), folder, 0.01, print)


@pytest.mark.parametrize("text", ["{", '{"arrays": [{"verb": "tile"}]}', '{"arrays": 7}', "[]"])
def test_a_damaged_record_is_told_and_stops_no_other(tmp_path: Path, text: str) -> None:
    trust.allow(TOY)
    whole, damaged = job(Work(tmp_path)), job(Work(tmp_path))
    (damaged / "job.json").write_text(text)
    states = {state.folder: state for state in backends.jobs(Work(tmp_path))}
    assert states[whole].lost == [2]
    assert states[damaged].line().startswith(f"jobs/{damaged.name}: ")
    assert "job.json" in states[damaged].line()
    with pytest.raises(Stopped, match="cannot be followed"):
        backends.follow(Work(tmp_path), damaged, 0.01, print)


def test_what_a_step_reads_is_frozen(tmp_path: Path) -> None:
    from mhim.configs import load
    from mhim.configs.schema import Config

    folder = JobFolder.new(Work(tmp_path))
    folder.freeze(
        Step("tile", ["/slides"], 2, ["a", "b"]), Config.model_validate({"tile": {"tile_px": 300}}), workers=3
    )
    frozen = load.resolve([str(folder.path / "tile.yaml")])
    assert (frozen.tile.tile_px, frozen.cluster.workers, frozen.cluster.backend) == (300, 3, "local")
    assert (folder.path / "tile.items").read_text() == "a\nb\n"
    line = folder.arguments(Step("tile", ["/slides"], 2, ["a", "b"]), replace=True)
    assert line[:2] == ["tile", "/slides"]
    assert "--replace" in line
    assert "--items" not in folder.arguments(Step("train", [], 2))
