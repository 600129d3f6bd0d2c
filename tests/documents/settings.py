"""configs/README.md from the schema: every setting with default, allowed values and meaning. Knows no layout of files.

In: the settings' models, those of the plug-ins that ship, and the presets. Out: Markdown.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mhim import configs
from mhim.configs import lookup
from mhim.configs.load import presets
from mhim.configs.schema import Config, marked
from tests.documents.commands import flags

NAMED = {  # settings whose value is the name of a file of that package
    ("tile", "segmenter"): "mhim.extract.tissue",
    ("tile", "fallback_segmenter"): "mhim.extract.tissue",
    ("train", "model"): "mhim.mil.models",
    ("cluster", "backend"): "mhim.pipeline.backends",
}
PLUGINS = (
    ("Segmenters", "tile.segmenter_params", "mhim.extract.tissue"),
    ("Models", "train.model_params", "mhim.mil.models"),
    ("Fusions", "train.fusion_params", "mhim.mil.fusion"),
    ("Back ends", "cluster.backend_params", "mhim.pipeline.backends"),
)
SIGNS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
    annotated_types.MinLen: ("min_length", "at least"),
}
WORDS = {bool: "true, false", int: "whole number", float: "number", str: "text", type(None): "null"}


def page() -> str:
    """The whole document."""
    parts = [_intro()]
    for section, field in Config.model_fields.items():
        model = typing.cast(type[BaseModel], field.annotation)
        parts += [f"## {section}", _sentence(model), _table(model, section)]
    parts.append("## Settings of the plug-ins that ship")
    for title, setting, package in PLUGINS:
        parts += [f"### {title}", f"Below `{setting}`, for the plug-in that is named beside it."]
        for name in ["coattn"] if package == "mhim.mil.fusion" else lookup.names(package):
            params = lookup.find(package, name).Params
            if params.model_fields:
                parts += [f"**{name}**", _table(params, "")]
            else:
                parts.append(f"**{name}** has no settings.")
    parts += ["## Presets", _presets()]
    return "\n\n".join(parts) + "\n"


def _intro() -> str:
    sections = ", ".join(f"[{name}](#{name})" for name in Config.model_fields)
    return f"""# configs: every setting

Made from the schema (`schema.py`) by `python -m tests.documents.write`; a test holds it to that. Sections:
{sections};
[settings of the plug-ins that ship](#settings-of-the-plug-ins-that-ship); [presets](#presets).
Your own plug-ins: [PLUGINS.md](PLUGINS.md).

```sh
pipeline config > my.yaml                         # this page as a file: all settings with their meaning
pipeline config --config demo --set tile.mpp=0.25 # what a preset and an override make of it
pipeline config --presets                         # names of the presets
```

Order: default < preset or file (`--config`, repeatable, later ones win) < `--set section.key=value` < named flags such
as `--mpp`. An unknown key is refused by name. Outputs remember every setting that decides a result; settings marked
*speed* change how fast it comes, never the result, and may differ between runs. Those marked *later* are thresholds on
stored measurements: a change is applied without reading a slide. A flag beside a setting's name sets the same."""


def _table(model: type[BaseModel], section: str) -> str:
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    short = flags()
    fast, later = marked(model, "speed"), marked(model, "later")
    for name, field in model.model_fields.items():
        mark = " *(speed)*" if name in fast else " *(later)*" if name in later else ""
        package = NAMED.get((section, name))
        allowed = allowed_values(field)
        if package is not None:
            allowed = ", ".join(f"`{n}`" for n in lookup.names(package)) + ", or your own"
        if (section, name) == ("tile", "fallback_segmenter"):
            allowed += ", or empty"
        meaning = _cell(field.description or "")
        flag = short.get(f"{section}.{name}" if section else f"cluster.backend_params.{name}")
        typed = f"`{name}`" + (f" `{flag}`" if flag else "")
        lines.append(f"| {typed} | {_default(field, section, name)} | {allowed} | {meaning}{mark} |")
    return "\n".join(lines)


def allowed_values(field: FieldInfo) -> str:
    """What a setting takes, in words: each allowed value where they can be listed, else the kind and its bounds."""
    return ", ".join([_kind(field.annotation), *_bounds(field.metadata)])


def _kind(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is typing.Annotated:
        return " ".join([_kind(args[0]), *_bounds([c for a in args[1:] for c in getattr(a, "metadata", [a])])])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(a) for a in args)
    if origin in (tuple, list):
        return f"list of: {_kind(args[0])}"
    if origin is dict:
        return f"mapping of names to: {_kind(args[1])}" if args[1] is not Any else "mapping"
    if annotation is Any:
        return "any"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: Any) -> Iterator[str]:
    for constraint in metadata:
        if type(constraint) in SIGNS:
            name, sign = SIGNS[type(constraint)]
            unit = " value" if name == "min_length" else ""
            yield f"{sign} {getattr(constraint, name)}{unit}"


def _default(field: FieldInfo, section: str, name: str) -> str:
    value = field.get_default(call_default_factory=True)
    if (section, name) == ("benchmark", "models"):
        return "the table of [mil/README.md](../mil/README.md#the-papers-benchmarks)"
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"`{_cell(text.removesuffix(chr(10)).removesuffix(chr(10) + '...'))}`"


def _presets() -> str:
    lines = ["| preset | for |", "|---|---|"]
    for name in presets():
        comment = []
        for line in (Path(next(iter(configs.__path__))) / f"{name}.yaml").read_text().splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.removeprefix("#").strip())
        text = " ".join(comment).split(": ")[0] if name == "mhim" else " ".join(comment)
        lines.append(f"| [`{name}`]({name}.yaml) | {_cell(text.split('. ')[0].split(', so ')[0].rstrip('.'))} |")
    return "\n".join(lines)


def _sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
