"""Which code that does not ship this command may import: what the person named in it, or installed as an entry point.

In: the names typed in a command (`--encoder`, `--model`, `--set`, a settings file given with `--config`,
`--allow-plugin`). Out: yes or no for a name, wherever that name comes from. Names out of files that travel (a run's
`config.yaml`, `model.json`, a log) are thus looked up among what ships and what was named, and never import anything
else. Closed by default: a program that uses these modules as a library calls `allow`. Knows no package's content.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

# package of plug-ins -> group of entry points in which an installed distribution offers more of them
GROUPS = {
    "mhim.extract.encoders": "mhim.encoders",
    "mhim.extract.tissue": "mhim.tissue",
    "mhim.mil.models": "mhim.models",
    "mhim.pipeline.backends": "mhim.backends",
}
REMOTE_CODE = "trust_remote_code"  # runs code that comes with weights: typed in the command itself, or not at all
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_PLAIN = re.compile(r"[A-Za-z_]\w*")
KEYS = ("encoder", "segmenter", "fallback_segmenter", "model", "student", "backend")  # settings that name a plug-in


@dataclass(frozen=True)
class Trust:
    """names: dotted names that may be imported, each with all below it. remote_code: code that comes with weights.
    files: module and file of each that was named by its file; the folder is searched behind all others."""

    names: frozenset[str] = frozenset()
    remote_code: bool = False
    files: frozenset[tuple[str, str]] = frozenset()


_now = Trust()


def current() -> Trust:
    """What this process may import now; handed to the processes it starts."""
    return _now


def adopt(trust: Trust) -> None:
    """Make `trust` this process's own: the empty one when a command begins, the parent's in its child."""
    global _now
    _now = trust


def allow(*names: str, remote_code: bool = False, file: Path | None = None) -> None:
    """Add names that a person has named in this command. file: where the one module of `names` lies."""
    files = {(names[0], str(file))} if file is not None else set()
    adopt(Trust(_now.names | set(names), _now.remote_code or remote_code, _now.files | files))


def allow_typed(settings: Mapping[str, Any]) -> None:
    """Add every name of a plug-in among settings that were typed in this command or stand in a file that it names."""
    allow(*_names(settings))


def allows(name: str) -> bool:
    """Whether code outside the program called `name` may be imported. Nothing of Python itself is ever a plug-in."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return False
    return any(name == n or name.startswith(f"{n}.") for n in (*_now.names, *_installed_values()))


@cache
def installed(package: str) -> dict[str, EntryPoint]:
    """Name -> entry point of the plug-ins of `package` that other distributions install."""
    return {e.name: e for e in entry_points(group=GROUPS.get(package, package))}


def _installed_values() -> list[str]:
    return [e.value.replace(":", ".") for package in GROUPS for e in installed(package).values()]


def _names(value: Any, key: str = "") -> Iterator[str]:
    """Dotted names anywhere, and plain ones where a setting names a plug-in."""
    if isinstance(value, Mapping):
        for inner, below in value.items():
            yield from _names(inner)
            yield from _names(below, str(inner))
    elif isinstance(value, (list, tuple)):
        for below in value:
            yield from _names(below, key)
    elif isinstance(value, str) and (_DOTTED.fullmatch(value) or (key in KEYS and _PLAIN.fullmatch(value))):
        yield value
