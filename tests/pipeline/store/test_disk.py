"""A full disk, a used-up quota, a folder that may not be written: one line with the path; and going on afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhim.pipeline.resume.stage import Plan, Report
from mhim.pipeline.store import disk, layout
from mhim.pipeline.upkeep import pack
from tests.extract.slides import tissue_rgb, write_svs
from tests.pipeline.bags import make_features, tree, write_labels

Cli = Callable[..., tuple[int, str]]
MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    made = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("needs the right to mount: a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """Take all room but `leave` bytes."""
    filler = place / "filler"
    with open(filler, "wb", buffering=0) as f:
        f.write(b"x" * max(0, shutil.disk_usage(place).free - leave))
    return filler


def savefig(path: Path) -> None:
    from matplotlib.figure import Figure

    Figure().savefig(path.with_suffix(".png"))


def zarr_array(path: Path) -> None:
    import zarr

    zarr.create_array(str(path), shape=(MIB,), dtype="u1", compressors=None)[...] = 7


def safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.ones(MIB, np.uint8)}, path)


def hdf5(path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as h5:
        h5.create_dataset("a", data=np.ones(MIB, np.uint8))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "torch": lambda p: torch.save(torch.ones(MIB), p),
    "numpy": lambda p: np.save(p, np.ones(MIB, np.uint8)),
    "tofile": lambda p: np.ones(MIB, np.uint8).tofile(p),
    "bytes": lambda p: p.write_bytes(b"x" * MIB),
    "zarr": zarr_array,
    "safetensors": safetensors,
    "hdf5": hdf5,
    "savefig": savefig,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_writes_a_full_disk_is_known_for_what_it_is(writer: str, small: Path) -> None:
    fill(small)
    with pytest.raises(Exception) as caught:  # noqa: PT011  each library has its own
        WRITERS[writer](small / "out")
    found = disk.trouble(caught.value, small)
    assert found is not None, repr(caught.value)
    assert found.errno == errno.ENOSPC
    assert disk.told("x: ", found, small).startswith(f"x: cannot write to {small}")
    assert ": the disk is full." in disk.told("x: ", found, small)


def test_what_is_no_trouble_of_the_disk_is_none(tmp_path: Path) -> None:
    for error in (
        ValueError("bad"),
        RuntimeError("device"),
        OSError(errno.EIO, "Input/output error"),
        KeyError(28),
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/slide.svs"),
    ):
        assert disk.trouble(error, tmp_path) is None
    assert not list(tmp_path.iterdir())  # the look leaves nothing
    inside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a" / "b"))
    assert disk.trouble(inside, tmp_path) is inside
    try:
        try:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        except OSError as quota:
            raise RuntimeError("wrapped") from quota
    except RuntimeError as wrapped:
        found = disk.trouble(wrapped, tmp_path)
    assert found is not None
    assert "the disk quota is used up" in disk.told("", found, tmp_path)


def one_line(code: int, text: str, place: Path, what: str = "the disk is full") -> None:
    assert code == 1, text
    told = [line for line in text.splitlines() if "cannot write to" in line]
    assert len(told) == 1, text
    assert str(place) in told[0]
    assert what in told[0]
    assert "Traceback" not in text
    assert "fault of the program" not in text


def test_every_verb_ends_with_one_line_and_goes_on_when_there_is_room(small: Path, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    work = layout.Work(small / "w")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 8))
    calm = layout.Work(tmp_path / "calm")
    shutil.copytree(work.root, calm.root)
    one = ["--workers", 1]
    train = ["train", "--labels", labels, "--model", "abmil", "--folds", 2, "--epochs", 2, *one]
    steps = [
        train,
        ["score", "--name", "abmil", "--set", "score.heatmaps=none", "--set", "score.bootstrap=20", *one],
        ["report"],
        ["pack"],
        ["unpack"],
    ]
    for step in steps:
        for leave in (0, 20_000) if step[0] in ("train", "score", "report") else (0,):
            filler = fill(small, leave)
            one_line(*cli(*step, "--work", work.root), small)
            filler.unlink()
        assert cli(*step, "--work", work.root)[0] == 0
        assert cli(*step, "--work", calm.root)[0] == 0
    filler = fill(small, 5_000)
    for step in (
        ["export", small / "out", "--work", calm.root, "--encoder", "texture"],
        ["export", small / "out", "--work", calm.root, "--encoder", "texture", "--format", "trident"],
    ):
        one_line(*cli(*step), small)
    filler.unlink()
    private = [p for p in small.rglob("*") if p.name.startswith((".tmp", ".claims"))]
    assert not private
    same = {k: v for k, v in tree(work.runs).items() if not k.endswith((".jsonl", ".md", ".html", ".svg"))}
    assert same == {k: v for k, v in tree(calm.runs).items() if k in same}
    assert tree(work.root / "features") == tree(calm.root / "features")


def test_a_verb_that_stopped_is_told_once_and_the_next_does_not_begin(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slides").mkdir()
    write_svs(tmp_path / "slides" / "a.svs", tissue_rgb(512, 512, 1))
    (tmp_path / "labels.csv").write_text("slide,label\na.svs,x\n")
    begun: list[str] = []

    def stopped(plan: Plan, *args: Any, **more: Any) -> Report:
        begun.append(plan.stage.name)
        return Report(plan.stage.name, [], f"{plan.stage.name}: cannot write to {tmp_path}: the disk is full")

    monkeypatch.setattr("mhim.pipeline.resume.runner.run", stopped)
    code, text = cli("run", tmp_path / "slides", "--labels", tmp_path / "labels.csv", "--work", tmp_path / "w")
    one_line(code, text, tmp_path)
    assert begun == ["tile"]


def test_import_on_a_full_disk_is_one_line(small: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.ones((500, 200), np.float32))
    fill(small, 50_000)
    one_line(*cli("import", tmp_path / "in", "--work", small / "w", "--encoder", "mine"), small)
    assert not [p for p in small.rglob("*") if p.name.startswith(".tmp")]


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    work = layout.Work(tmp_path / "w")
    make_features(work, 8)
    line = [sys.executable, "-m", "mhim.pipeline", "pack", "--work", str(work.root)]
    ended = subprocess.run(
        line,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    one_line(ended.returncode, ended.stdout + ended.stderr, work.root, "ulimit -f")
    assert pack.pack(work).stores == 8


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS])
def test_a_quota_and_a_read_only_file_system_stop_a_stage(
    number: int, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = layout.Work(tmp_path / "w")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 8))
    real = Path.write_bytes

    def failing(path: Path, data: bytes) -> int:
        if ".partial" in path.parts or "fold_" in str(path) or path.name.endswith(".safetensors"):
            raise OSError(number, os.strerror(number))  # as a write says it: no name
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", failing)
    code, text = cli(
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
    one_line(code, text, work.root, disk.WHAT[number])
