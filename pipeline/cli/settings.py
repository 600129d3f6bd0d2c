"""Flags that stand for settings: name, type, help and default of each come from the schema, and stand nowhere else.

In: the settings that a command offers, as `section.key`. Out: the same command with one flag for each; it gets what was
given as `{section.key: value}`. The schema is read when a command's own flags are first asked for: `pipeline --help`
needs none of them, and stays fast.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from mhim.pipeline.cli.values import files_of, grid_of, numbers_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_OFFERS = "offered_settings"  # attribute of a command's function: itself and its flags, also where typer wraps it
_PARAMS = "cluster.backend_params."  # settings that back ends define themselves
_NAMES_OF = {  # settings that name a plug-in, and the folder whose file names they may be
    "tile.segmenter": "mhim.extract.tissue",
    "train.model": "mhim.mil.models",
    "cluster.backend": "mhim.pipeline.backends",
}
TABLE = (
    *(f"labels.{name}_column" for name in ("slide", "patient", "label", "time", "event")),
    "labels.encoding",
    "labels.tcga_patients",
)
"""How a table of slides is read: the flags of every command that takes one."""


@dataclass(frozen=True)
class SettingFlag:
    """One flag. settings: the dotted names that it sets, the first of which describes it. name: where it is not the
    setting's own, as `--cache`."""

    settings: tuple[str, ...]
    name: str = ""

    @property
    def flag(self) -> str:
        """As it is typed: `--tile-px`."""
        return self.name or "--" + self.settings[0].rpartition(".")[2].replace("_", "-")

    @property
    def parameter(self) -> str:
        """Its name among the parameters of a command."""
        return self.settings[0].replace(".", "__")

    @property
    def described(self) -> Described:
        """What the schema, or a back end, says of it."""
        return describe(self.settings[0])

    def annotation(self) -> Any:
        """Its type and help as typer takes them: a value of that type, or None where it is not given."""
        about = self.described
        kind: Any = {"numbers": str, "grid": list[str], "files": list[str], "choice": str}.get(about.kind, about.type)
        shape = {
            "numbers": "NUMBER,...",
            "grid": "SETTING=VALUE,...",
            "files": "NAME=FILE",
            "choice": "|".join(about.choices),
        }.get(about.kind)
        plain = self.flag if kind is not bool else f"{self.flag}/--no-{self.flag.removeprefix('--')}"
        option = typer.Option(
            plain,
            help=f"{about.help}{'; repeatable' if about.kind in ('grid', 'files') else ''} (default: {about.default})",
            metavar=shape,
            autocompletion=about.completions if about.names else None,
            rich_help_panel=f"Settings of {self.settings[0].partition('.')[0]}",
        )
        return Annotated[kind | None, option]

    def value(self, given: Any) -> Any:
        """What was given as the setting's value; None where nothing was. Raises ConfigError."""
        if given is None or self.described.kind not in ("numbers", "grid", "files"):
            return given
        if self.described.kind == "grid":
            return grid_of(given)
        if self.described.kind == "files":
            return files_of(self.flag, given)
        return numbers_of(self.flag, given, self.described.type)


PATIENT_TABLES = SettingFlag(("train.tables",), "--table")
"""Patients' tables: `--table NAME=FILE`."""


@dataclass(frozen=True)
class Described:
    """A setting for a person. kind: plain (of `type`), choice, numbers (of `type`, apart by commas), grid or files.
    names: what a shell may complete."""

    kind: Literal["plain", "choice", "numbers", "grid", "files"]
    type: type
    help: str
    default: str
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def completions(self, incomplete: str) -> list[str]:
        return [name for name in self.names if name.startswith(incomplete)]


def describe(setting: str) -> Described:
    """What is known of `section.key`, or of `cluster.backend_params.key`. Raises KeyError where there is none."""
    from mhim.configs import lookup

    where = ""
    if setting.startswith(_PARAMS):
        field, backends = _of_backends(setting.removeprefix(_PARAMS))
        where = f" (back end {' or '.join(backends)})"
    else:
        field = _of_schema(setting)
    kind, type_, choices = _kind(field.annotation)
    names = choices
    text = (field.description or "") + where
    if setting in _NAMES_OF:
        names = tuple(lookup.names(_NAMES_OF[setting]))
        text += f"; there is: {', '.join(names)}"
    text += _bounds(field)
    return Described(kind, type_, text, shown(field.get_default(call_default_factory=True)), choices, names)


def allowed(setting: str) -> str:
    """What `section.key` may be, for a comment: ` [none | png | jpeg]`, ` [at least 1]`, ` [true | false]`; or ""."""
    from mhim.configs import lookup

    field = _of_schema(setting)
    kind, type_, choices = _kind(field.annotation)
    if setting in _NAMES_OF:
        choices = tuple(lookup.names(_NAMES_OF[setting]))
    words = ["true | false"] if kind == "plain" and type_ is bool else []
    words += [" | ".join(choices)] if choices else []
    words += [_bounds(field).removeprefix("; ")] if _bounds(field) else []
    return f" [{'; '.join(words)}]" if words else ""


def shown(value: Any) -> str:
    """A default as a person reads it."""
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return ",".join(map(shown, value))
    return str(value) or "empty"


def _of_schema(setting: str) -> FieldInfo:
    from mhim.configs.schema import Config

    section, _, key = setting.partition(".")
    model: Any = Config.model_fields[section].annotation
    field: FieldInfo = model.model_fields[key]
    return field


def _of_backends(key: str) -> tuple[FieldInfo, list[str]]:
    """The setting `key` of back ends that ship, and which of them have it."""
    from mhim.configs import lookup

    package = _NAMES_OF["cluster.backend"]
    fields = {name: lookup.find(package, name).Params.model_fields for name in lookup.names(package)}
    having = {name: of[key] for name, of in fields.items() if key in of}
    if not having:
        raise KeyError(f"no back end has a setting {key!r}")
    field: FieldInfo = next(iter(having.values()))
    return field, list(having)


def _kind(annotation: Any) -> tuple[Literal["plain", "choice", "numbers", "grid", "files"], type, tuple[str, ...]]:
    """How a setting of this type is typed, the type of its value or of each of its values, and what is allowed."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(inner for inner in get_args(annotation) if inner is not NoneType)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "choice", str, tuple(map(str, inner))
    if origin is tuple:
        return "numbers", get_args(inner[0])[0] if get_origin(inner[0]) is Annotated else inner[0], ()
    if origin is dict and inner == (str, str):
        return "files", str, ()
    return ("grid", str, ()) if origin is dict else ("plain", annotation, ())


def _bounds(field: FieldInfo) -> str:
    """The limits of a number in words, or nothing."""
    limits = {
        name: value
        for at in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if (value := getattr(at, name, None)) is not None
    }
    if limits.keys() == {"ge", "le"}:
        return f"; {limits['ge']} to {limits['le']}"
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    told = [f"{words[name]} {value}" for name, value in limits.items() if (name, value) != ("ge", 0)]
    return f"; {', '.join(told)}" if told else ""


class SettingsCommand(TyperCommand):
    """A command with flags of settings, made when they are first asked for: by its own help, call or completion."""

    @property
    def offered(self) -> tuple[SettingFlag, ...]:
        """Its flags that stand for settings."""
        flags: tuple[SettingFlag, ...] = getattr(self.callback, _OFFERS)[1]
        return flags

    @cached_property
    def _whole(self) -> Any:
        """The same command with those flags, as typer makes it."""
        own: Callable[..., int] = getattr(self.callback, _OFFERS)[0]

        @functools.wraps(own)
        def whole(**params: Any) -> int:
            return own(**params)

        show_as(whole, own, hidden="", **{flag.parameter: (flag.annotation(), None) for flag in self.offered})
        only = typer.Typer(add_completion=False)
        only.command()(whole)
        return typer.main.get_command(only)

    def get_params(self, ctx: Any) -> Any:
        help_ = super().get_params(ctx)[len(self.params) :]
        return [*self._whole.params, *help_]

    def invoke(self, ctx: Any) -> Any:
        return ctx.invoke(self._whole.callback, **ctx.params)

    def given(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """{section.key: value} of a command line that was read. Raises ConfigError."""
        return values_of(self.offered, params)


def values_of(offered: tuple[SettingFlag, ...], params: Mapping[str, Any]) -> dict[str, Any]:
    """{section.key: value} out of a command's parameters, None where a flag is not given. Raises ConfigError."""
    values = {flag: flag.value(params.get(flag.parameter)) for flag in offered}
    return {setting: value for flag, value in values.items() for setting in flag.settings}


def settings_flags(*offered: str | SettingFlag) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A command with a flag for each of these settings. It gets them as its keyword `given`, {section.key: value}, None
    where a flag is not given. Register it with `cls=SettingsCommand`."""
    flags = tuple(f if isinstance(f, SettingFlag) else SettingFlag((f,)) for f in offered)

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        names = {flag.parameter for flag in flags}

        @functools.wraps(command)
        def called(**params: Any) -> int:
            own = {name: value for name, value in params.items() if name not in names}
            return command(**own, given=values_of(flags, params))

        show_as(called, command, hidden="given")
        setattr(called, _OFFERS, (called, flags))
        return called

    return decorate


def show_as(called: Callable[..., int], command: Callable[..., int], hidden: str, **more: Any) -> None:
    """Let typer see in `called` the parameters of `command` without `hidden`, which is no flag, and `more`:
    name -> (annotation, default)."""
    hints = get_type_hints(command, localns={"Session": Any}, include_extras=True)
    hints.pop(hidden, None)
    hints |= {name: annotation for name, (annotation, _) in more.items()}
    own = [p for p in inspect.signature(command).parameters.values() if p.name != hidden]
    parameters = [p.replace(annotation=hints[p.name]) for p in own] + [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, (_, default) in more.items()
    ]
    called.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    called.__annotations__ = hints
