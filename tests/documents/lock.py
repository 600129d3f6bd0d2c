"""Writes requirements.lock: the exact versions of an environment in which the tests passed.

    python -m tests.documents.lock

In: the dependencies of pyproject.toml with the extra `test`, and what is installed here. Out: a constraints file for
pip, in two parts: what the program needs, and what only its tests need. Local builds (`+cpu`) are written as their
release.
"""

from __future__ import annotations

import platform
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"


def wanted(extra: str = "") -> list[str]:
    """Requirements as pyproject.toml states them, with those of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else [])]


def closure(requirements: Sequence[str]) -> dict[str, str]:
    """Name -> installed version of the requirements and all that these require in turn, here."""
    todo = [Requirement(text) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    found: dict[str, str] = {}
    while todo:
        one = todo.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key in seen:
            continue
        seen.add(key)
        installed = metadata.distribution(one.name)
        found[key[0]] = installed.version.partition("+")[0]
        for text in installed.requires or []:
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in ("", *one.extras)):
                todo.append(further)
    return found


def text() -> str:
    """The lock file of this environment."""
    program = closure(wanted())
    tests = {name: version for name, version in closure(wanted("test")).items() if name not in program}
    lines = [
        "# The versions that the tests passed with: pip install -c requirements.lock .",
        f"# Written by `python -m tests.documents.lock` with Python {platform.python_version()} on {sys.platform}.",
        "",
        *(f"{name}=={version}" for name, version in sorted(program.items())),
        "",
        "# only for the tests (the extra `test`)",
        *(f"{name}=={version}" for name, version in sorted(tests.items())),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    LOCK.write_text(text())
    print(f"written: {LOCK.name}")
