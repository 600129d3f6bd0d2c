"""Settings from their sources, and back to commented YAML.

In: presets or YAML files, `key=value` overrides, named flags. Out: one validated `Config`. Order: default < preset or
file, in the order given < `--set` < flags. Unknown keys are refused by name. Knows the schema and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mhim.configs import named, texts, trust
from mhim.configs.errors import UserError
from mhim.configs.lookup import explain
from mhim.configs.schema import Config


class ConfigError(UserError, ValueError):
    """A setting, preset or settings file is wrong; the message names it."""

    whole = True


def presets() -> list[str]:
    """Names of the presets that ship with the program."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.yaml"))


def resolve(sources: Iterable[str], overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None) -> Config:
    """One validated Config.

    sources: names of presets or paths of YAML files. overrides: texts like `tile.mpp=0.5`, the value read as YAML.
    flags: dotted key -> value; None means not given. Raises ConfigError."""
    return validate(typed(sources, overrides, flags))


def typed(
    sources: Iterable[str], overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`merged` settings that were typed in this command, or stand in a file that was named there: the plug-ins that
    they name are allowed, and stand under the names that records know. Raises ConfigError or LookupFailed."""
    settings = named.settled(merged(sources, overrides, flags))
    trust.allow_typed(settings)
    if _remote_code(settings):
        trust.allow(remote_code=True)  # no file says so, see `_read`
    return settings


def merged(
    sources: Iterable[str], overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings of several sources as `resolve` takes them, one over the other, not validated. Allows no plug-in."""
    found: dict[str, Any] = {}
    for source in sources:
        merge(found, _read(source))
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--set {text!r}: write key=value, for example tile.mpp=0.5")
        _put(found, key.strip(), _yaml(value, f"--set {text!r}"))
    for key, value in (flags or {}).items():
        if value is not None:
            _put(found, key, value)
    return found


def validate(raw: Mapping[str, Any]) -> Config:
    """`raw` as a Config; a lone number is accepted where a list is meant (`tile.mpp`). Raises ConfigError."""
    tile = raw.get("tile")
    if isinstance(tile, dict) and isinstance(tile.get("mpp"), (int, float)):
        raw = {**raw, "tile": {**tile, "mpp": [tile["mpp"]]}}
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"settings: {explain(error)} (`pipeline config` shows all settings)") from error


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if not path.suffix and not path.is_file():  # a folder of that name, such as the demo's, is no settings file
        path = Path(__file__).parent / f"{source}.yaml"
        if not path.exists():
            raise ConfigError(
                f"no preset {source!r}; there is: {', '.join(presets())} (or give the path of a YAML file)"
            )
    try:
        raw = _yaml(path.read_text(), str(path))
    except FileNotFoundError as error:
        raise ConfigError(f"no settings file {path}") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `tile:` with settings below them")
    if _remote_code(raw):
        raise ConfigError(
            f"{path}: {trust.REMOTE_CODE} runs code that comes with the weights, and no file may ask for it; type it: "
            f"--set extract.encoder_params.{trust.REMOTE_CODE}=true"
        )
    return raw


def _yaml(text: str, called: str) -> Any:
    try:
        return texts.read_yaml(text, called)
    except texts.TextError as error:
        raise ConfigError(str(error)) from error


def _remote_code(raw: Any) -> bool:
    """Whether settings ask for code that comes with weights to be run."""
    if isinstance(raw, Mapping):
        return any((k == trust.REMOTE_CODE and bool(v)) or _remote_code(v) for k, v in raw.items())
    return isinstance(raw, (list, tuple)) and any(_remote_code(v) for v in raw)


def merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """`new` over `into`, section by section. The params of a plug-in belong to its name: another name drops them."""
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            here = into[key]
            for name, owned in (
                ("model", "model_params"),
                ("encoder", "encoder_params"),
                ("segmenter", "segmenter_params"),
            ):
                if name in value and name in here and value[name] != here[name]:
                    here.pop(owned, None)
            merge(here, value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _put(into: dict[str, Any], dotted: str, value: Any) -> None:
    nested: dict[str, Any] = {}
    level = nested
    *parents, last = dotted.split(".")
    for part in parents:
        level = level.setdefault(part, {})
    level[last] = value
    merge(into, nested)


def template(config: BaseModel, allowed: Callable[[str], str] = lambda setting: "") -> str:
    """`config` as YAML with every setting's description as a comment, ready to edit and pass with `--config`.

    allowed: what to add of `section.key`."""
    lines: list[str] = []
    for section in type(config).model_fields:
        part = getattr(config, section)
        lines += [f"# {type(part).__doc__}", f"{section}:"]
        for name, setting in type(part).model_fields.items():
            value = part.model_dump(mode="json")[name]
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
            lines.append(f"  {name}: {text}  # {setting.description}{allowed(f'{section}.{name}')}")
        lines.append("")
    return "\n".join(lines)
