"""Who may import whom, and what the command line may load before a verb runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("configs", "extract", "mil", "pipeline")
ALLOWED = {
    "configs": {"configs"},
    "extract": {"configs", "extract"},
    "mil": {"configs", "mil"},
    "pipeline": {"configs", "extract", "mil", "pipeline"},
}
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of every import statement in a file, also those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_each_room_imports_only_rooms_it_may_know(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    forbidden = (imported(path) & set(ROOMS)) - ALLOWED[room]
    assert not forbidden, f"{room} must not know {forbidden}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_file_outgrows_one_responsibility(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_only_slide_py_imports_openslide() -> None:
    importers = {p.relative_to(ROOT).as_posix() for p in FILES if "openslide" in imported(p)}
    assert importers == {"extract/slide/source.py"}


def test_nothing_is_pickled_or_unpickled() -> None:
    """But for the items that a process hands to its own child through a pipe, as multiprocessing does: never a file."""
    for path in FILES:
        if path.relative_to(ROOT).as_posix() == "pipeline/backends/_child.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", f"{path}: pickle.{node.attr}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", f"{path}: torch.load without weights_only=True"


def test_the_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, mhim.pipeline.cli.main\n"
        "print([m for m in ('torch', 'timm', 'cv2', 'dask', 'skimage', 'zarr', 'sklearn', 'matplotlib', 'openslide')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_only_the_agreed_top_level_folders() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert {f for f in folders if not f.startswith(".")} <= {*ROOMS, "tests", "docker"}
