"""From a configured name to the module of that file name: the plug-in mechanism of every folder.

In: a package such as `mhim.mil.models` and a name. Out: the imported module, or the names that exist (listed without
importing any). There is no registry: a new file is a new name. What does not ship is imported only as `trust` allows.
Knows nothing of what the modules do.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from mhim.configs import source, trust
from mhim.configs.errors import UserError


class LookupFailed(UserError, ValueError):
    """An unknown plug-in name or plug-in setting; the message lists what exists and what to do."""

    whole = True


class NotTrusted(LookupFailed):
    """Code that is not the program's, and that nobody named in this command; the message says how to allow it."""


def names(package: str) -> list[str]:
    """Sorted plug-in names of `package` (its modules that do not start with `_`), without importing them."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise LookupFailed(f"no package {package}")
    found = pkgutil.iter_modules(list(spec.submodule_search_locations))
    return sorted(m.name for m in found if not m.name.startswith("_"))


def find(package: str, name: str) -> ModuleType:
    """The module `name` of `package`: one that ships, an installed plug-in, or the user's own module.

    Raises LookupFailed with the list of existing names and the path of the file to add, and NotTrusted for a module
    that nobody named in this command.
    """
    known = names(package)
    plain = _plain(package, name)
    if plain in known:
        return importlib.import_module(f"{package}.{plain}")
    if name in trust.installed(package):
        return own_module(trust.installed(package)[name].module)
    if "." in name or trust.allows(name):
        permitted(name)
        if "." in name or source.file_of(name) is not None:
            return own_module(name)
    where = Path(*package.split(".")[1:]) / f"{name}.py"
    own = "; a module of your own is allowed by typing its name here, or --allow-plugin NAME"
    raise LookupFailed(f"unknown name {name!r}; there is: {', '.join(known)} (or add {where}{own})")


def _plain(package: str, name: str) -> str:
    """A shipped plug-in's file name; records of version 0.1 call `mhim.mil.models.abmil` mil.models.abmil."""
    return name.removeprefix("mhim.").removeprefix(package.removeprefix("mhim.") + ".")


def permitted(name: str) -> None:
    """Raises NotTrusted unless the code called `name`, which does not ship, was named in this command or installed."""
    if trust.allows(name):
        return
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        raise NotTrusted(
            f"{name!r} is part of Python itself: nothing of it is run (--allow-plugin is for modules of your own)"
        )
    raise NotTrusted(
        f"{name!r} is not part of this program, and a name out of a file imports nothing. If you know and trust that "
        f"code, say so in this command: --allow-plugin {name}"
    )


def own_module(name: str) -> ModuleType:
    """The user's own module, which is allowed. One of the working folder is found, too. Raises LookupFailed."""
    source.reach(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LookupFailed(f"cannot import {name!r}: {error}; is its folder on PYTHONPATH?") from error
    except Exception as error:  # whatever a user's own code may raise
        raise LookupFailed(f"cannot import {name!r}: {type(error).__name__}: {error}") from error


def code_of(package: str, name: str) -> str | None:
    """Hash of the code of a plug-in that does not ship, as hex; None for one that ships, whose version counts."""
    if _plain(package, name) in names(package):
        return None
    module = find(package, name)
    file = Path(str(module.__file__))
    return source.code_hash(file, module.__name__)


def params(module: ModuleType, raw: dict[str, Any]) -> Any:
    """`raw` validated by the module's own `Params`; an unknown key is refused by name."""
    model: type[BaseModel] = module.Params
    try:
        return model(**raw)
    except ValidationError as error:
        raise LookupFailed(
            f"{module.__name__.rsplit('.', 1)[-1]}: {explain(error)}; it takes: {', '.join(model.model_fields)}"
        ) from error


def explain(error: ValidationError) -> str:
    """A pydantic error as one readable line that names each key."""
    parts = []
    for e in error.errors():
        key = ".".join(str(p) for p in e["loc"]) or "settings"
        text = "unknown key" if e["type"] == "extra_forbidden" else e["msg"].removeprefix("Value error, ")
        parts.append(f"{key}: {text}")
    return "; ".join(parts)
