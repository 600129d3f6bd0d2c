"""How a plug-in of one's own may be named where it is typed: a module, an object in one, or a file.

In: settings that were typed in this command, or stand in a file that it names. Out: the same with one form of each
name, `module` or `module.object`, which is what records hold. A file `folder/mine.py` is the module `mine` from here
on, wherever it lies, and the command may import it. Knows no kind of plug-in.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhim.configs import trust
from mhim.configs.lookup import LookupFailed

_FILE = re.compile(r"(?P<path>.*\.py)(?::(?P<object>\w+))?", re.DOTALL)
_OBJECT = re.compile(r"(?!timm:)(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<object>[A-Za-z_]\w*)")


def settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of typed settings with every plug-in under the name that records know. The files among them may be
    imported from here on. Raises LookupFailed for a file that cannot be one."""
    return {k: _settled(v, str(k)) for k, v in settings.items()}


def _settled(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return settled(value)
    if isinstance(value, (list, tuple)):
        return [_settled(v, key) for v in value]
    return typed(value) if key in trust.KEYS and isinstance(value, str) else value


def typed(text: str) -> str:
    """The name in records of a plug-in that a person called `text`; of one that is no file, nothing is allowed yet.

    Raises LookupFailed."""
    if found := _OBJECT.fullmatch(text):
        return f"{found['module']}.{found['object']}"
    found = _FILE.fullmatch(text)
    if found is None:
        return text
    file = Path(found["path"]).expanduser()
    name = _of_file(file)
    if found["object"]:
        name += f".{found['object']}"
        trust.allow(name)
    return name


def is_file(text: str) -> bool:
    """Whether a plug-in is called by its file."""
    return _FILE.fullmatch(text) is not None


def _of_file(file: Path) -> str:
    """The module that a file is, which may be imported from here on."""
    name = file.stem
    if not file.is_file():
        raise LookupFailed(f"there is no file {file}")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise LookupFailed(f"{file}: {name!r} cannot be the name of a module: letters, digits and _ only")
    known = dict(trust.current().files).get(name)
    if known is not None and not file.samefile(known):
        raise LookupFailed(f"{file} and {known} have one name, by which records call them: rename one")
    if name in sys.stdlib_module_names:
        raise LookupFailed(f"{file}: {name!r} is a module of Python itself: give the file another name")
    spec = importlib.util.find_spec(name)
    there = spec.origin if spec is not None else None
    if spec is not None and not (there and Path(there).is_file() and file.samefile(there)):
        raise LookupFailed(
            f"{file}: a module {name!r} is installed already ({there or 'a folder'}), and nothing stands before that: "
            "give the file another name"
        )
    trust.allow(name, file=file.absolute())
    return name
