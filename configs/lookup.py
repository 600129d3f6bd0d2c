"""From a configured name to the module of that file name: the plug-in mechanism of every folder.

In: a package such as `mhim.mil.models` and a name. Out: the imported module, or the names that exist (listed without
importing any). There is no registry: a new file is a new name. What does not ship is imported only as `trust` allows,
and follows one contract for all kinds (`KINDS`): an entry point, a module, or an object in one, so that one file may
hold several. A person may also name the file (`named`). Knows nothing of what the modules do.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from mhim.configs import source, trust
from mhim.configs.errors import UserError
from mhim.configs.schema import Settings

_BEFORE_0_2 = ("configs", "extract", "mil", "pipeline")  # the program's packages, as own plug-ins of then import them


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


@dataclass(frozen=True)
class Kind:
    """What a plug-in that does not ship must offer. called: the object in its file that is meant where none is named
    and the file itself does not offer it. offers: one of these functions; none where the object is called itself."""

    called: str
    offers: tuple[str, ...] = ()


# the one contract of own plug-ins: package of plug-ins -> kind
KINDS = {
    "mhim.extract.encoders": Kind("encoder"),
    "mhim.extract.tissue": Kind("segmenter", ("segment",)),
    "mhim.mil.models": Kind("model", ("build",)),
    "mhim.pipeline.backends": Kind("backend", ("run", "submit")),
}


@dataclass(frozen=True)
class Own:
    """A plug-in that does not ship and is allowed: `object` of `module`, "" where none is named. name: as called."""

    package: str
    name: str
    module: str
    object: str

    @property
    def file(self) -> Path:
        """The file of its code. Raises LookupFailed."""
        file = source.file_of(self.module)
        if file is None:
            raise LookupFailed(f"{self._what}: there is no file of module {self.module!r}")
        return file

    @property
    def code(self) -> str:
        """Hash of its code, as hex. Runs none of it."""
        return source.code_hash(self.file, self.module)

    def load(self) -> Any:
        """The object, or the module where that is the plug-in, found to offer what its kind must.

        Raises LookupFailed. What a module only imported from elsewhere is not its own: a name out of a file could
        otherwise call anything that an allowed module happens to know."""
        module, kind = own_module(self.module), KINDS[self.package]
        if self.object:
            found = getattr(module, self.object, None)
            home = str(getattr(found, "__module__", self.module)).partition(".")[0]
            if found is not None and home != self.module.partition(".")[0] and self._full not in trust.current().names:
                raise LookupFailed(
                    f"{self._what}: {self.object!r} is not of {self.module!r} but of {home!r}: name it there"
                )
        else:
            found = module if _offers(module, kind) else getattr(module, kind.called, None)
        if found is None:
            what = f"object {self.object!r}" if self.object else f"object called {kind.called!r}"
            also = "" if self.object or not kind.offers else f", and no function {' or '.join(map(repr, kind.offers))}"
            raise LookupFailed(f"{self._what}: module {self.module!r} has no {what}{also}")
        if not _offers(found, kind):
            lacks = " or ".join(map(repr, kind.offers)) if kind.offers else "a call: it is no function"
            raise LookupFailed(f"{self._what}: {self._full!r} does not offer {lacks}")
        return found

    @property
    def _full(self) -> str:
        return f"{self.module}.{self.object}" if self.object else self.module

    @property
    def _what(self) -> str:
        return f"{KINDS[self.package].called} {self.name!r}"


def _offers(thing: Any, kind: Kind) -> bool:
    if not kind.offers:
        return callable(thing)
    return any(callable(getattr(thing, name, None)) for name in kind.offers)


def own(package: str, name: str) -> Own | None:
    """The plug-in called `name` that does not ship: an installed one, or a module, or an object in one, that this
    command allows. None where the name can be none. Imports at most the packages above it.

    Raises NotTrusted for what nobody named in this command, LookupFailed where there is nothing of that name."""
    entry = trust.installed(package).get(name)
    if entry is not None:
        return Own(package, name, entry.module, entry.attr)
    if "." not in name and not trust.allows(name):
        return None
    permitted(name)
    try:
        module, rest = source.split(name)
    except Exception as error:  # whatever the packages above it may raise
        raise LookupFailed(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    if not module or "." in rest:
        if "." not in name:
            return None
        raise LookupFailed(
            f"{KINDS[package].called} {name!r}: there is no module {name.rpartition('.')[0]!r}; is its folder on "
            "PYTHONPATH? Or name its file: FOLDER/FILE.py"
        )
    return Own(package, name, module, rest)


def find(package: str, name: str) -> Any:
    """The plug-in `name`: the module of one that ships, else what the user's own names (`Own.load`).

    Raises LookupFailed with the list of existing names and the path of the file to add, and NotTrusted for a module
    that nobody named in this command.
    """
    plain = _plain(package, name)
    if plain in names(package):
        return importlib.import_module(f"{package}.{plain}")
    found = own(package, name)
    if found is None:
        raise _unknown(package, name)
    return found.load()


def _unknown(package: str, name: str) -> LookupFailed:
    where = Path(*package.split(".")[1:]) / f"{name}.py"
    one = "; one of your own is allowed by typing it here, as module, module.object or FILE.py, or by --allow-plugin"
    known = ", ".join(names(package))
    return LookupFailed(f"unknown {KINDS[package].called} {name!r}; there is: {known} (or add {where}{one})")


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
        f"code, say so in this command: --allow-plugin {name} (or its file, FOLDER/FILE.py)"
    )


def own_module(name: str) -> ModuleType:
    """The user's own module, which is allowed. One of the working folder is found, too. Raises LookupFailed."""
    source.reach(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        what = "is its folder on PYTHONPATH?"
        if error.name is not None and error.name.partition(".")[0] in _BEFORE_0_2:
            what = f"this program's modules begin with mhim since version 0.2.0: write mhim.{error.name} there"
        raise LookupFailed(f"cannot import {name!r}: {error}; {what}") from error
    except Exception as error:  # whatever a user's own code may raise
        raise LookupFailed(f"cannot import {name!r}: {type(error).__name__}: {error}") from error


def code_of(package: str, name: str) -> str | None:
    """Hash of the code of a plug-in that does not ship, as hex; None for one that ships, whose version counts."""
    if _plain(package, name) in names(package):
        return None
    found = own(package, name)
    if found is None:
        raise _unknown(package, name)
    return found.code


class NoParams(Settings):
    """Of a plug-in that takes no settings."""


def params(module: Any, raw: dict[str, Any]) -> Any:
    """`raw` validated by the plug-in's own `Params`, if it has any; an unknown key is refused by name."""
    model: type[BaseModel] = getattr(module, "Params", NoParams)
    try:
        return model(**raw)
    except ValidationError as error:
        name = str(getattr(module, "__name__", type(module).__name__))
        raise LookupFailed(
            f"{name.rsplit('.', 1)[-1]}: {explain(error)}; it takes: {', '.join(model.model_fields) or 'no settings'}"
        ) from error


def explain(error: ValidationError) -> str:
    """A pydantic error as one readable line that names each key."""
    parts = []
    for e in error.errors():
        key = ".".join(str(p) for p in e["loc"]) or "settings"
        text = "unknown key" if e["type"] == "extra_forbidden" else e["msg"].removeprefix("Value error, ")
        parts.append(f"{key}: {text}")
    return "; ".join(parts)
