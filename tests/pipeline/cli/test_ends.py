"""How commands end where nobody reads on, where a terminal knows few letters, and with odd values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mhim.pipeline.store import layout
from tests.pipeline.bags import make_features, tree, write_labels

Cli = Callable[..., tuple[int, str]]


def program(*args: object) -> list[str]:
    return [sys.executable, "-m", "mhim.pipeline", *map(str, args)]


def test_a_reader_that_goes_away_stops_no_work(tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "w")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 8))
    line = program(
        "train",
        "--labels",
        labels,
        "--model",
        "abmil",
        "--folds",
        2,
        "--epochs",
        2,
        "--workers",
        1,
        "--work",
        work.root,
    )
    reading, writing = os.pipe()
    os.close(reading)  # as if `| head` had ended already
    try:
        code = subprocess.run(line, stdout=writing, stderr=writing, timeout=120, check=False).returncode
    finally:
        os.close(writing)
    assert code == 0
    assert (work.run("abmil") / "fold_1" / "model.safetensors").exists()


@pytest.mark.parametrize("args", [["config"], ["--help"]])
def test_printing_to_a_closed_pipe_is_quiet(args: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(program(*args), stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            program("config"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: cannot write to standard output: the disk is full. What was finished is kept; make room or choose "
        "another --work folder, then run the same command again\n"
    )


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}], ids=str)
def test_terminals_and_languages_of_few_letters(env: dict[str, str]) -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIO", "PYTHONUTF8"))}
    ended = subprocess.run(program("config"), capture_output=True, timeout=60, check=False, env=plain | env)
    assert ended.returncode == 0, ended.stderr
    assert b"m per tile pixel" in ended.stdout  # its \u00b5 is shown somehow


def test_the_language_changes_no_byte(tmp_path: Path, cli: Cli) -> None:
    """A training of this process, in whichever language it is, and one in a process that knows ASCII only."""
    plain = {a: b for a, b in os.environ.items() if not a.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    found = []
    for place in ("here", "there"):
        work = layout.Work(tmp_path / place)
        rows = make_features(work, 8)
        labels = tmp_path / "labels.csv"
        labels.write_text(
            "slide,patient,label\n" + "".join(f"{r.slide},Ünal-{r.patient},{r.label} µ\n" for r in rows),
            encoding="utf-8",
        )
        quick = ["--model", "abmil", "--folds", 2, "--epochs", 1, "--workers", 1]
        line = ["train", "--labels", labels, *quick, "--work", work.root]
        if place == "here":
            assert cli(*line)[0] == 0
        else:
            env = plain | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
            assert subprocess.run(program(*line), capture_output=True, timeout=120, env=env).returncode == 0
        found.append({n: b for n, b in tree(work.runs).items() if not n.endswith((".jsonl", ".md"))})
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["../../out", "a/b", "", ".hidden", "a\nb", "/abs", "x" * 300, "con\0"])
def test_names_of_runs_that_cannot_be_folders_are_one_line(name: str, tmp_path: Path, cli: Cli) -> None:
    work = layout.Work(tmp_path / "deep" / "er" / "w")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 4))
    before = tree(tmp_path)
    code, text = cli(
        "train",
        "--labels",
        labels,
        f"--name={name}",
        "--work",
        work.root,
        "--folds",
        2,
        "--epochs",
        1,
        "--model",
        "abmil",
        "--workers",
        1,
    )
    assert code == 2
    assert "--name" in text
    assert len([line for line in text.splitlines() if line.startswith("error")]) == 1
    assert tree(tmp_path) == before
