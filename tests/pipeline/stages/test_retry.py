"""What failed, again: from stored settings, never from a line of text: nothing out of a foreign log is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mhim.pipeline.cli.read import parsed
from mhim.pipeline.stages import retry
from mhim.pipeline.store import layout, writing

Cli = Callable[..., tuple[int, str]]


def logged(root: Path, label: str, keys: tuple[str, ...] = ("a.svs",), **start: Any) -> layout.Work:
    """A work folder with one log in which `keys` of a stage failed."""
    work = layout.Work(root)
    work.root.mkdir(exist_ok=True)
    work.cohort.write_text("slide,path,mpp\n" + "".join(f"{key},/data/{key},0.5\n" for key in keys))
    lines = [{"event": "start", "t": "1", "folder": str(root.parent), **start}]
    lines += [{"event": "item", "stage": label, "key": key, "state": "failed", "t": "2"} for key in keys]
    writing.write_atomic(work.runs / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return work


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is started, whatever a log says."""
    import os
    import subprocess

    def never(*args: Any, **more: Any) -> None:
        raise AssertionError(f"started {args}")

    for place, name in ((subprocess, "run"), (subprocess, "Popen"), (os, "system"), (os, "execv")):
        monkeypatch.setattr(place, name, never)


MARK = "mark"
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "another program": ("tile", {"command": ["sh", "-c", f"touch {MARK}"]}),
    "another verb": ("tile", {"command": ["pipeline", "demo", "--to", MARK]}),
    "an option that is none": ("tile", {"command": ["pipeline", "tile", "slides", "--evil", MARK]}),
    "an own encoder": ("extract e", {"command": ["pipeline", "extract", "--encoder", "stranger_y.make"]}),
    "the standard library": (
        "extract e",
        {
            "command": [
                "pipeline",
                "extract",
                "--encoder",
                "subprocess.run",
                "--set",
                f"extract.encoder_params={{cmd: {MARK}}}",
            ]
        },
    ),
    "settings in a file": ("tile", {"command": ["pipeline", "tile", "slides", "--config", "../evil.yaml"]}),
    "allow-plugin": ("extract e", {"command": ["pipeline", "extract", "--allow-plugin", "stranger_y"]}),
    "a cache elsewhere": ("extract texture", {"command": ["pipeline", "extract", "--cache", "/home/x"]}),
    "weights elsewhere": ("extract uni", {"asked": {"extract": {"encoder": "uni", "weights": "../../w"}}}),
    "new slides": ("score R", {"asked": {}, "new": "1"}),
    "a stored encoder": ("extract e", {"asked": {"extract": {"encoder": "stranger_y.make"}}}),
    "a stored segmenter": ("tile", {"asked": {"tile": {"segmenter": "stranger_y.code"}}}),
    "a path among a plug-in's": (
        "tile",
        {"asked": {"tile": {"segmenter": "network", "segmenter_params": {"weights": "/etc/hostname"}}}},
    ),
    "slurm": ("tile", {"asked": {"cluster": {"backend": "slurm", "backend_params": {"setup": [f"touch {MARK}"]}}}}),
    "dask": ("tile", {"asked": {"cluster": {"backend": "dask", "backend_params": {"scheduler": "tcp://evil:1"}}}}),
    "a task of a batch job": ("tile", {"asked": {}, "SLURM_ARRAY_JOB_ID": "17"}),
    "labels elsewhere": ("train r", {"asked": {}, "labels": "/etc/passwd"}),
    "a map's labels elsewhere": ("map", {"asked": {}, "labels": "/etc/passwd"}),
    "a map by a run elsewhere": ("map", {"asked": {}, "run": "/etc"}),
    "a map by a folder of runs": ("map", {"asked": {}, "run": "w/runs/x/.."}),
    "a map elsewhere": ("gallery ../../x gallery", {"asked": {}}),
    "a run elsewhere": ("score ../../x", {"asked": {}}),
    "remote code": (
        "extract hibou-b",
        {"asked": {"extract": {"encoder": "hibou-b", "encoder_params": {"trust_remote_code": True}}}},
    ),
    "settings that are none": ("tile", {"asked": {"tile": {"no_such": 1}}}),
    "no settings": ("tile", {"asked": [1]}),
}


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("how", FOREIGN)
def test_a_foreign_log_runs_nothing(how: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_y").mkdir()
    for name in ("__init__", "code"):
        (tmp_path / "stranger_y" / f"{name}.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    label, start = FOREIGN[how]
    work = logged(tmp_path / "w", label, **start)
    if label.startswith("extract"):
        writer = writing.StoreWriter(work.tile_store("a.svs"), {"fingerprint": "0" * 16})
        del writer
    code, text = cli("retry", "--failed", "--work", work.root)
    assert code in (2, 3), text
    assert "fault of the program" not in text
    assert not (tmp_path / MARK).exists()


def test_settings_are_taken_out_of_a_line_of_version_0_1(tmp_path: Path) -> None:
    line = ["cli.py", "--log-json", "tile", "slides", "--work", "w", "--workers", "1", "--mpp", "1"]
    line += ["--set", "tile.tile_px=128"]
    (again,) = retry.commands(logged(tmp_path / "w", "tile", ("a.svs", "b.svs"), command=line), parsed)
    assert again.verb == "tile"
    assert again.keys == ("a.svs", "b.svs")
    assert again.settings == {"tile": {"mpp": [1.0], "tile_px": 128}, "cluster": {"workers": 1}}
    assert retry.refused(again, layout.Work(tmp_path / "w"), {}, None) == ""


def test_of_a_whole_run_only_the_verb_that_failed_is_given_again(tmp_path: Path) -> None:
    line = ["pipeline", "run", "slides", "--labels", "l.csv", "--model", "abmil"]
    (again,) = retry.commands(logged(tmp_path / "w", "train abmil", ("fold_1",), command=line), parsed)
    assert (again.verb, again.name, again.labels) == ("train", "abmil", "l.csv")
    work = layout.Work(tmp_path / "w")
    assert "type --labels l.csv" in retry.refused(again, work, {}, None)
    assert retry.refused(again, work, {}, Path("l.csv")) == ""


def test_what_is_typed_counts_before_the_log(tmp_path: Path) -> None:
    work = logged(tmp_path / "w", "extract uni", asked={"extract": {"encoder": "uni", "weights": "/data/w"}})
    (again,) = retry.commands(work, parsed)
    assert "type --set extract.weights=/data/w" in retry.refused(again, work, {}, None)
    assert retry.refused(again, work, {"extract": {"weights": "/data/w"}}, None) == ""
    slurm = logged(tmp_path / "v", "tile", asked={}, SLURM_ARRAY_JOB_ID="7")
    (again,) = retry.commands(slurm, parsed)
    assert "--config" in retry.refused(again, slurm, {}, None)
    assert retry.refused(again, slurm, {"cluster": {"backend": "slurm"}}, None) == ""


def test_how_the_table_of_labels_was_read_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mhim.pipeline.stages import verbs

    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(verbs, "train", lambda session, labels, name: told.append((session, labels, name)) or 0)
    read = {"label_column": "diagnosis", "slide_column": "file", "encoding": "latin-1"}
    work = logged(tmp_path / "w", "train r", ("fold_0",), asked={"labels": read, "train": {"folds": 3}})
    (again,) = retry.commands(work, parsed)
    assert retry.make(again, work, {"labels": {"encoding": "utf-8"}}, tmp_path / "labels.csv") == 0
    ((session, labels, name),) = told
    assert (labels, name) == (tmp_path / "labels.csv", "r")
    assert (session.config.labels.label_column, session.config.labels.slide_column) == ("diagnosis", "file")
    assert session.config.labels.encoding == "utf-8"  # typed
    assert session.config.train.folds == 3


def test_a_line_is_shown_without_what_moves_a_terminal(cli: Cli, tmp_path: Path) -> None:
    work = logged(tmp_path / "w", "tile", command=["x", "\x1b[2Jdemo", "a b"])
    code, text = cli("retry", "--failed", "--work", work.root)
    assert code == 3
    assert "\x1b[2J" not in text


def test_a_map_is_given_again_by_its_own_run_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mhim.pipeline.stages import map_verb

    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(map_verb, "make", lambda session, *given: told.append((session.only, *given)) or 0)
    start = {"asked": {}, "run": "w/runs/mhim", "labels": "w/labels.csv"}
    work = logged(tmp_path / "w", "map", ("one", "two"), **start)
    (work.runs / "mhim").mkdir()
    found = retry.commands(work, parsed)
    assert [again.name for again in found] == ["one", "two"], "each map is a command of its own"
    assert retry.refused(found[0], work, {}, None) == ""
    assert retry.make(found[0], work, {}, None) == 0
    cut = logged(tmp_path / "v", "gallery one gallery", asked={})
    (again,) = retry.commands(cut, parsed)
    assert retry.make(again, cut, {}, tmp_path / "of_trainings.csv") == 0
    assert told == [(None, tmp_path / "w" / "labels.csv", "one", "mhim"), (None, None, "one", None)]
