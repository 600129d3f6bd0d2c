"""What killed commands leave is removed by the next one, whichever it is; what lives stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.resume import leftovers
from mhim.pipeline.store import layout
from mhim.pipeline.store.owner import machine, owner
from tests.pipeline.bags import make_features, tree

DEAD = f"{machine()}-{2**22 + 1}"  # above the largest process number
ROOTS = (
    "",
    "tiles",
    "overlays",
    "tile_images",
    "features/uni",
    "runs",
    "runs/a",
    "runs/a/report",
    "runs/a/new/x",
    "runs/a/new/x/tiles",
    "runs/a/new/x/features/uni",
)


def test_every_place_is_swept_of_the_dead_and_of_nothing_else(tmp_path: Path) -> None:
    work = layout.Work(tmp_path)
    keep, go = [], []
    for root in ROOTS:
        for name, goes in (
            (f"{DEAD}-aa", True),
            (f"{owner()}-bb", False),
            ("elsewhere-1-cc", False),
            ("elsewhere-1-dd", True),
        ):
            for path in (tmp_path / root / f".tmp-{name}", tmp_path / root / ".tmp" / name):
                path.mkdir(parents=True)
                (path / "part").write_text("half")
                if goes and "elsewhere" in name:
                    os.utime(path, (time.time() - 2 * leftovers.FOREIGN_S,) * 2)
                (go if goes else keep).append(path)
    kept = tmp_path / "features" / "uni" / ".partial" / "slide" / "0123"
    kept.mkdir(parents=True)
    leftovers.sweep_work(work)
    assert not [p for p in go if p.exists()]
    assert all(p.exists() for p in (*keep, kept))


def test_a_private_place_is_gone_however_its_block_ends(tmp_path: Path) -> None:
    with leftovers.private(tmp_path / "root") as path, suppress(ValueError):
        path.mkdir()
        (path / "a").write_text("a")
        int("no number")
    assert not os.listdir(tmp_path / "root")
    with leftovers.private(tmp_path / "root") as path:
        path.write_text("a file")
        os.rename(path, tmp_path / "root" / "final")
    assert os.listdir(tmp_path / "root") == ["final"]


# The program is killed where the third file of its kind is flushed: half-made things lie there then.
KILLED = """
import os, sys
from mhim.pipeline.store import writing
real, left = writing.{name}, [2]
def ends(*args, **more):
    left[0] -= 1
    if left[0] < 0:
        os._exit(137)
    return real(*args, **more)
writing.{name} = ends
from mhim.pipeline.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("verb", ["pack", "unpack", "import", "export", "report"])
def test_a_killed_command_leaves_nothing_after_the_next(
    verb: str, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    work = layout.Work(tmp_path / "w")
    rows = make_features(work, 8)
    (tmp_path / "in").mkdir()
    for i in range(4):
        np.save(tmp_path / "in" / f"b{i}.npy", np.full((5, 3), i, np.float32))
    where: list[object] = ["--work", work.root]
    if verb == "unpack":
        assert cli("pack", *where)[0] == 0
    if verb == "report":
        labels = tmp_path / "labels.csv"
        labels.write_text("slide,patient,label\n" + "".join(f"{r.slide},{r.patient},{r.label}\n" for r in rows))
        assert (
            cli("train", "--labels", labels, "--model", "abmil", "--folds", 2, "--epochs", 1, "--workers", 1, *where)[0]
            == 0
        )
        assert cli("score", "--name", "abmil", "--set", "score.heatmaps=none", "--workers", 1, *where)[0] == 0
    line = {
        "pack": ["pack"],
        "unpack": ["unpack"],
        "import": ["import", tmp_path / "in", "--encoder", "mine"],
        "export": ["export", tmp_path / "out"],
        "report": ["report"],
    }[verb]
    if verb == "export":
        pytest.importorskip("h5py")
    program = KILLED.format(name="fsync")
    if verb == "report":
        program = program.replace("[2]", "[0]")
    ended = subprocess.run(
        [sys.executable, "-c", program, *map(str, line), *map(str, where)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 137, ended.stderr
    assert private(tmp_path), "the kill came too late to leave anything"
    assert cli(*line, *where)[0] == 0
    assert not private(tmp_path)
    if verb == "import":
        assert sum(n.endswith("features/zarr.json") for n in tree(work.features("mine"))) == 4


def test_killed_tile_images_leave_nothing_after_the_next(
    tmp_path: Path, demo_cohort: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    # tiles are made in a child: it and the command are killed together, at the fourth image, as a machine's end does it
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("""
import os, signal
import cv2
real, left = cv2.imencode, [3]
def ends(*args):
    left[0] -= args[0] == ".jpg" and len(args) > 2
    if left[0] < 0:
        os.killpg(0, signal.SIGKILL)
    return real(*args)
cv2.imencode = ends
""")
    line = [
        "tile",
        demo_cohort / "slides" / "case_01.svs",
        "--work",
        tmp_path / "w",
        "--workers",
        1,
        "--save-tiles",
        "jpg",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "mhim.pipeline", *map(str, line)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert any(".tmp" in p.parts for p in tmp_path.rglob("*.jpg"))
    code, text = cli(*line)
    assert code == 0, text
    assert not private(tmp_path)
    assert len(list((tmp_path / "w" / "tile_images" / "case_01.svs").glob("*.jpg"))) > 3
    assert os.listdir(tmp_path / "w" / "tile_images") == ["case_01.svs"]


def private(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.startswith((".tmp", ".claims", ".stale", ".clock"))]
