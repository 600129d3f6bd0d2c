"""Where a module that is not the program's lies, and the hash of its code: what identifies a user's own plug-in.

In: a module's dotted name, which the caller has found to be allowed. Out: its file, or a SHA-256 over that file and
every file of the same folder that it imports, found by reading the import statements. Runs nothing but the packages
above the module (their `__init__.py`), as an import would.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mhim.configs import trust


def reach(module: str) -> None:
    """Make a module of the working folder, or one that was named by its file, importable where no installed one has
    its name.

    The folder goes to the end of the path: nothing in it ever stands before the program or a library."""
    top = module.partition(".")[0]
    file = dict(trust.current().files).get(top)
    here = os.path.dirname(file) if file else os.getcwd()
    if top in sys.modules or here in sys.path:
        return
    importlib.invalidate_caches()
    if importlib.util.find_spec(top) is None and importlib.machinery.PathFinder.find_spec(top, [here]) is not None:
        sys.path.append(here)


def file_of(module: str) -> Path | None:
    """The file of a module, or None if there is no such module."""
    reach(module)
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def split(name: str) -> tuple[str, str]:
    """The module that a dotted name begins with, and what is left of the name; "" and the name if there is none.

    Imports the packages above the module, as an import would, and not the module itself."""
    parts = name.split(".")
    reach(name)
    for k in range(1, len(parts) + 1):
        try:
            spec = importlib.util.find_spec(".".join(parts[:k]))
        except (ModuleNotFoundError, ValueError):
            spec = None
        if spec is None:
            return ".".join(parts[: k - 1]), ".".join(parts[k - 1 :])
        if spec.submodule_search_locations is None:
            return ".".join(parts[:k]), ".".join(parts[k:])
    return name, ""


def code_hash(file: Path, module: str) -> str:
    """SHA-256 of a module's code, as hex. Of a module that imports none of its neighbours, that of its file."""
    files = _with_neighbours(file, module)
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    if len(digests) == 1:
        return digests[module]
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _with_neighbours(file: Path, module: str) -> dict[str, Path]:
    """The module, and those of its folder that it imports, directly or not: name -> file."""
    parts = module.split(".")
    root = file.parents[len(parts) - (file.name != "__init__.py")]
    found: dict[str, Path] = {module: file}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for other in _imported(found[name], name):
            if "-packages" in root.name and other.partition(".")[0] != parts[0]:
                continue  # among installed packages only its own counts; the others have versions
            path = _local(root, other)
            if path is not None and other not in found:
                found[other] = path
                waiting.append(other)
    return found


def _local(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _imported(file: Path, module: str) -> Iterator[str]:
    """Every module that a file may import by its import statements, and the packages above them."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # it cannot be imported either, which is told then
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)] if base else []
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: k + 1]) for k in range(len(parts)))
