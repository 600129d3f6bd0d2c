"""A wheel of this tree, installed beside strangers of the same names, in a folder that holds such names too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.conftest import once

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("configs", "extract", "mil", "pipeline")
STRANGERS = ("configs", "mil", "pipeline", "extract")
PUT_OFF = "raise SystemExit('a stranger of that name was imported')\n"
BUILD = ["README.md", "LICENSE", "pyproject.toml"]


def run(line: list[str | Path], folder: Path, **environment: str) -> tuple[int, str]:
    found = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")} | environment
    done = subprocess.run(
        [str(a) for a in line], cwd=folder, env=found, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built once of a copy: building leaves its traces in the tree."""

    def make(folder: Path) -> None:
        source = folder / "source"
        for room in ROOMS:
            shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
        for name in BUILD:
            shutil.copy(ROOT / name, source / name)
        # setuptools makes wheels by itself since 70.1; an older one is replaced by one from the network
        try:
            own = tuple(map(int, version("setuptools").split(".")[:2])) >= (70, 1)
        except PackageNotFoundError:
            own = False
        line = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source]
        code, text = run([*line, *(["--no-build-isolation"] if own else [])], folder)
        assert code == 0, text

    return next(once(tmp_path_factory, "wheel", make).glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, installed plainly, and with distributions that own the rooms' bare names."""
    home = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python"]
    code, text = run([*pip, "install", "-q", "--no-compile", "--no-deps", "--no-index", wheel], home)
    assert code == 0, text
    for name in STRANGERS:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(PUT_OFF)
        info = site / f"{name}-9.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}-9.0.dist-info/METADATA,,\n")
    # what the wheel depends on, behind it; not the tree, where that is installed editable
    pure = Path(sysconfig.get_paths()["purelib"])
    lines = [line for path in pure.glob("*.pth") for line in path.read_text().splitlines()]
    behind = [line for line in lines if line.startswith("/") and not (Path(line) / "mhim").exists()]
    (site / "others.pth").write_text("\n".join([str(pure), *behind]) + "\n")
    return home


@pytest.fixture
def folder(tmp_path: Path, demo_cohort: Path) -> Path:
    """A working folder with two slides, one of them broken, and packages and modules of the rooms' names."""
    (tmp_path / "slides").mkdir()
    for name in ("case_01.svs", "truncated.svs"):
        shutil.copy(demo_cohort / "slides" / name, tmp_path / "slides" / name)
    for name in STRANGERS[:2]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(PUT_OFF)
    for name in STRANGERS[2:]:
        (tmp_path / f"{name}.py").write_text(PUT_OFF)
    return tmp_path


def test_nothing_but_mhim_lands_and_nothing_is_left_out(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        names = {n for n in z.namelist() if not n.endswith("/")}
    info = {n for n in names if n.partition("/")[0].endswith(".dist-info")}
    here = {
        f"mhim/{p.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for p in (ROOT / room).rglob("*")
        if p.is_file() and p.suffix not in (".md", ".jpg", ".pyc") and not p.name.startswith(".")
    }
    assert names - info == here
    assert len({n.partition("/")[0] for n in info}) == 1


def test_the_environment_holds_its_own_copy(installed: Path, folder: Path) -> None:
    """Else the tests below would look at the tree."""
    code, text = run([installed / "bin" / "python", "-c", "import mhim.pipeline as p; print(p.__file__)"], folder)
    assert (code, str(installed) in text) == (0, True), text


def test_the_command_its_job_scripts_retry_and_the_library_run_among_strangers(installed: Path, folder: Path) -> None:
    pipeline = installed / "bin" / "pipeline"
    code, text = run([pipeline, "config", "--presets"], folder)
    assert (code, "mhim" in text) == (0, True), text

    # a scheduler that only takes note, then the script as it would start it
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (folder / "bin" / "sbatch").chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    few = ["--set", "cluster.backend_params.tasks=1", "--set", "tile.blur_probe_um=0"]
    code, text = run([pipeline, "tile", "slides", "--backend", "slurm", *few], folder, PATH=path)
    assert code == 0, text
    (script,) = (folder / "work" / "jobs").glob("*/tile.sh")
    code, text = run(["bash", script], folder, SLURM_ARRAY_TASK_ID="1")
    assert (code, (folder / "work" / "tiles" / "case_01.svs.zarr").is_dir()) == (1, True), text  # one slide is broken

    code, text = run([pipeline, "retry", "--failed", "--dry-run", "--set", "cluster.backend=local"], folder)
    assert (code, "1 failed: pipeline tile" in text) == (0, True), text

    # as a notebook imports it: the working folder is the first on the path
    code, text = run(
        [
            installed / "bin" / "python",
            "-c",
            "from mhim.pipeline import Work; print([s.id for s in Work('work').slides if s.tiled and len(s.coords)])",
        ],
        folder / ".",
    )
    assert "case_01.svs" in text, text
