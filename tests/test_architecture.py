"""Who may import whom, and what the command line may load before a verb runs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
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
            found |= {_top(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(_top(node.module))
    return found


def _top(module: str) -> str:
    """`mhim.extract.slide` is of the room extract; `numpy.linalg` of numpy."""
    parts = module.split(".")
    return parts[1] if parts[0] == "mhim" and len(parts) > 1 else parts[0]


MODULES = {"mhim." + ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}


def known_modules(path: Path) -> set[str]:
    """The project's own modules that a file imports, also inside functions; not those that only type checkers read."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("mhim."):
                names = {f"{child.module}.{alias.name}" for alias in child.names}
                found.update(n if n in MODULES else str(child.module) for n in names)
            walk(child)

    walk(ast.parse(path.read_text()))
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups that reach each other by `arrows`."""
    reach = {a: set(bs) for a, bs in arrows.items()}
    for middle in reach:  # Warshall
        for a, bs in reach.items():
            if middle in bs:
                reach[a] = bs | reach[middle]
    mutual = {a: sorted(b for b in bs if a in reach.get(b, ())) for a, bs in reach.items()}
    return sorted({tuple(m) for m in mutual.values() if m})  # type: ignore[return-value]


def test_no_file_and_no_room_is_in_an_import_circle() -> None:
    """Imports inside functions count: a circle that is put off is still one."""
    files = {name: known_modules(path) - {name} for name, path in MODULES.items()}
    assert circles(files) == []

    def room(name: str) -> str:
        return ".".join(name.split(".")[:3])

    rooms: dict[str, set[str]] = {}
    for name, others in files.items():
        rooms.setdefault(room(name), set()).update(room(o) for o in others if room(o) != room(name))
    assert circles(rooms) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]


def test_no_private_name_is_used_across_rooms() -> None:
    """A room is a folder: what begins with `_` in one (a file, or a name in a file) is its own business."""
    used = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mhim."):
                for alias in node.names:
                    parts = f"{node.module}.{alias.name}".split(".")
                    first = next((i for i, p in enumerate(parts) if p.startswith("_")), None)
                    if first is None:
                        continue
                    owner = ".".join(parts[:first])  # a folder, or a file of one
                    folder = (
                        owner.rpartition(".")[0] if owner in MODULES and MODULES[owner].stem != "__init__" else owner
                    )
                    if not f"{name}.".startswith(f"{folder}."):
                        used.append(f"{path.relative_to(ROOT)}: {'.'.join(parts)}")
    assert used == []


def test_every_package_is_installed_under_mhim() -> None:
    """The list in pyproject.toml has every folder with code, and nothing else lands in site-packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {"mhim." + ".".join(p.parent.relative_to(ROOT).parts) for p in FILES if p.name == "__init__.py"}
    assert set(project["tool"]["setuptools"]["packages"]) == packages


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_each_room_imports_only_rooms_it_may_know(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    forbidden = (imported(path) & set(ROOMS)) - ALLOWED[room]
    assert not forbidden, f"{room} must not know {forbidden}"


def test_no_file_outgrows_one_responsibility() -> None:
    long = {path: len(path.read_text().splitlines()) for path in (*FILES, *(ROOT / "tests").rglob("*.py"))}
    assert {path.relative_to(ROOT).as_posix(): n for path, n in long.items() if n > 400} == {}


def test_only_one_room_imports_openslide() -> None:
    importers = {p.relative_to(ROOT).as_posix() for p in FILES if "openslide" in imported(p)}
    assert importers == {"extract/slide/slide.py", "extract/slide/source.py"}


def test_nothing_is_pickled_or_unpickled() -> None:
    """But for the items that a process hands to its own child through a pipe, as multiprocessing does: never a file."""
    for path in FILES:
        if path.relative_to(ROOT).as_posix() == "pipeline/resume/child.py":
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
