"""From a configured name to the module of that file name: the plug-in mechanism of every folder.

In: a package such as `mil.models` and a name. Out: the imported module, or the names that exist (listed without
importing any). There is no registry: a new file is a new name. Knows nothing of what the modules do.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError


class LookupFailed(ValueError):
    """An unknown plug-in name or plug-in setting; the message lists what exists and what to do."""


def names(package: str) -> list[str]:
    """Sorted plug-in names of `package` (its modules that do not start with `_`), without importing them."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise LookupFailed(f"no package {package}")
    found = pkgutil.iter_modules(list(spec.submodule_search_locations))
    return sorted(m.name for m in found if not m.name.startswith("_"))


def find(package: str, name: str) -> ModuleType:
    """The module `name` of `package`; a dotted `name` is the user's own module.

    Raises LookupFailed with the list of existing names and the path of the file to add.
    """
    if "." in name:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise LookupFailed(f"cannot import {name!r}: {error}; is its folder on PYTHONPATH?") from error
    known = names(package)
    if name not in known:
        where = Path(*package.split(".")) / f"{name}.py"
        raise LookupFailed(f"unknown name {name!r}; there is: {', '.join(known)} (or add {where})")
    return importlib.import_module(f"{package}.{name}")


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
