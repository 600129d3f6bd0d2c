"""The four kinds of plug-in of a user's own through every verb, from a folder full of names that shadow the program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mhim.pipeline.store import layout, reading
from tests.pipeline.bags import sets

Cli = Callable[..., tuple[int, str]]

ENCODER = """
import numpy as np
from mhim.extract.encoders import Encoder

def mean_colour() -> Encoder:
    def encode(tiles):
        return tiles.astype(np.float32).mean((1, 2)) / 255
    return Encoder(name="what_it_calls_itself", encode=encode, dim=3, tile_px=None, mpp=None, weights_id="1")
"""
OWN = {
    "own_enc.py": ENCODER,
    "own_seg.py": "from mhim.extract.tissue.otsu import Params, segment\n",
    "own_mil.py": "from mhim.mil.models.mean import Params, build\n",
    "own_backend.py": "from mhim.pipeline.backends.local import Params, run\n",
}
ALL_FOUR = (  # one file, in a folder of its own
    ENCODER
    + """
import neighbour
from mhim.mil.models import mean
from mhim.pipeline.backends import local

class segmenter:
    segment = staticmethod(neighbour.segment)
    Params = neighbour.Params

class model:
    Params, build = mean.Params, mean.build

class backend:
    run = local.run
"""
)
NEIGHBOUR = "from mhim.extract.tissue.otsu import Params, segment\n"
SHADOWS = ("configs/__init__.py", "extract/__init__.py", "mil.py", "pipeline.py", "numpy.py", "torch.py", "typer.py")
KINDS = [
    "--encoder",
    "own_enc.mean_colour",
    "--model",
    "own_mil",
    "--set",
    "tile.segmenter=own_seg",
    "--backend",
    "own_backend",
]
SMALL = sets("train.folds=2", "train.epochs=1", "score.bootstrap=5", "score.heatmaps=none", "tile.blur_probe_um=0")
FEW = [*SMALL, "--workers", "1"]
SPREAD = [*SMALL, "--workers", "2"]  # each process more imports torch, so one command shows that they get the plug-ins


@pytest.fixture
def folder(tmp_path: Path, demo_cohort: Path) -> Path:
    """A working folder with slides, labels, own plug-ins, and files with the names of the program's packages."""
    (tmp_path / "slides").mkdir()
    for slide in sorted((demo_cohort / "slides").glob("case_*.svs")):
        os.link(slide, tmp_path / "slides" / slide.name)
    shutil.copy(demo_cohort / "labels.csv", tmp_path / "labels.csv")
    for name, text in OWN.items():
        (tmp_path / name).write_text(text)
    for name in SHADOWS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the working folder shadows the program')\n")
    return tmp_path


def call(folder: Path, *args: object) -> tuple[int, str]:
    """The program as its installed command starts it: the working folder is not on the path."""
    line = [sys.executable, "-P", "-m", "mhim.pipeline", *(str(a) for a in args)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


def test_all_four_kinds_go_through_every_verb_in_a_folder_of_shadows(folder: Path) -> None:
    code, text = call(folder, "run", "slides", "--labels", "labels.csv", *KINDS, *FEW)
    assert code == 0, text
    work = layout.Work(folder / "work")
    assert [p.name for p in (work.root / "features").iterdir()] == ["own_enc.mean_colour"]
    stored = next(iter(work.features("own_enc.mean_colour").glob("*.zarr")))
    attrs = reading.read_attrs(stored)
    assert (attrs["encoder"], attrs["encoder_name"]) == ("own_enc.mean_colour", "what_it_calls_itself")
    card = json.loads((work.run("own_mil") / "fold_0" / "model.json").read_text())
    assert card["features"]["encoder"] == "own_enc.mean_colour"
    assert (work.run("own_mil") / "metrics.json").is_file()

    # a later command names the model it trusts, or is refused before any work
    shutil.rmtree(work.run("own_mil") / "scores")
    code, text = call(folder, "score", "--name", "own_mil", *FEW)
    assert code == 2
    assert "own_mil" in text
    code, text = call(folder, "score", "--name", "own_mil", "--allow-plugin", "own_mil", *FEW)
    assert code == 0, text

    # changed code is another plug-in
    for name in ("own_seg.py", "own_mil.py"):
        (folder / name).write_text(OWN[name] + "# changed\n")
    assert call(folder, "tile", "slides", *KINDS[4:], *FEW)[0] == 3
    assert call(folder, "train", "--labels", "labels.csv", *KINDS[:4], *FEW)[0] == 3


def test_all_four_kinds_by_one_file_go_through_every_verb(folder: Path) -> None:
    (folder / "plug").mkdir()
    (folder / "plug" / "mine.py").write_text(ALL_FOUR)
    (folder / "plug" / "neighbour.py").write_text(NEIGHBOUR)
    (folder / "plug" / "numpy.py").write_text("raise SystemExit('a plug-in shadows a library')\n")
    tiling = ["--set", "tile.segmenter=plug/mine.py", "--backend", "plug/mine.py"]
    kinds = [*tiling, "--encoder", "./plug/mine.py:mean_colour", "--model", "./plug/mine.py"]
    code, text = call(folder, "run", "slides", "--labels", "labels.csv", *kinds, *FEW)
    assert code == 0, text
    work = layout.Work(folder / "work")
    assert [p.name for p in (work.root / "features").iterdir()] == ["mine.mean_colour"]
    card = json.loads((work.run("mine") / "fold_0" / "model.json").read_text())
    assert (card["model"], card["features"]["encoder"]) == ("mine", "mine.mean_colour")

    # by the module's name from the file's own folder it is the same, so nothing is made anew or refused
    there = ["--work", "../work", "--set", "tile.segmenter=mine", "--set", "cluster.backend=mine", *FEW]
    code, text = call(folder / "plug", "tile", "../slides", *there)
    assert (code, "8 skipped" in text) == (0, True), text  # and numpy.py of that folder is passed over

    # a received name wants the file, or is refused before any work
    shutil.rmtree(work.run("mine") / "scores")
    again = ["score", "--name", "mine"]
    assert call(folder, *again, *FEW)[0] == 2
    code, text = call(folder, *again, *SPREAD, "--allow-plugin", "plug/mine.py")
    assert code == 0, text
    assert (work.run("mine") / "scores").is_dir()

    # the code of the file, and of what it imports from its folder, is in the fingerprint
    (folder / "plug" / "neighbour.py").write_text(NEIGHBOUR + "# changed\n")
    assert call(folder, "tile", "slides", *tiling, *FEW)[0] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        ["--encoder", "own_enc.missing"],
        ["--encoder", "no_such.enc"],
        ["--model", "no_such_mil"],
        ["--model", "no_such.mil"],
        ["--set", "tile.segmenter=no_such_seg"],
        ["--set", "tile.segmenter=no.such_seg"],
        ["--set", "tile.fallback_segmenter=no.such_seg"],
        ["--backend", "no_such_backend"],
        ["--backend", "no.such"],
        *(
            [flag, f"{before}{name}"]
            for flag, before in (
                ("--encoder", ""),
                ("--model", ""),
                ("--set", "tile.segmenter="),
                ("--set", "tile.fallback_segmenter="),
                ("--set", "train.model_params.student="),
                ("--backend", ""),
            )
            for name in ("./no_such.py", "./own_enc.py:missing", "./numpy.py")
        ),
    ],
)
def test_a_misspelt_plug_in_is_one_usage_error_before_work(
    wrong: list[str], cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, text = cli("run", "slides", "--labels", "labels.csv", *FEW, *wrong)
    assert code == 2, text
    assert text.count("error:") == 1
    assert not (folder / "work" / "tiles").exists()


def test_python_m_is_rescued_from_the_folder_it_is_started_in(folder: Path) -> None:
    for name in ("numpy.py", "torch.py", "typer.py", "pipeline.py"):  # -m itself would find pipeline.py first
        (folder / name).unlink()
    line = [sys.executable, "-m", "mhim.pipeline", "config", "--presets"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "mhim" in done.stdout


def test_job_scripts_start_behind_the_folder_and_say_what_is_allowed(tmp_path: Path) -> None:
    from mhim.configs import trust
    from mhim.pipeline.backends import JobFolder, Step, slurm
    from mhim.pipeline.store.layout import Work

    files = frozenset({("own", "/plug/own.py")})
    trust.adopt(trust.Trust(frozenset({"own", "own.enc"}), remote_code=True, files=files))
    step = Step("extract", [], 3, ["a"])
    params = slurm.Params()
    script = slurm.job_script(step, JobFolder(tmp_path, Work(tmp_path)), params, params.of("extract"), 1)
    assert f"{sys.executable} -P -m mhim.pipeline extract" in script
    assert (
        "--allow-plugin /plug/own.py --allow-plugin own.enc --set extract.encoder_params.trust_remote_code=true"
        in script
    )
    boxed = slurm.Params(container="/images/x.sif")
    script = slurm.job_script(step, JobFolder(tmp_path, Work(tmp_path)), boxed, boxed.of("extract"), 1)
    assert "--bind /plug " in script  # the container sees the plug-in's folder
    from mhim.configs.lookup import LookupFailed

    odd = slurm.Params(partition="x\nrm -rf ~")
    with pytest.raises(LookupFailed, match="one line"):
        slurm.job_script(step, JobFolder(tmp_path, Work(tmp_path)), odd, odd.of("extract"), 1)
