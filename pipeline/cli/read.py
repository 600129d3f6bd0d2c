"""A command line as settings, read and not carried out: for logs of version 0.1, which hold nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from mhim.pipeline.cli import verbs  # noqa: F401  registered on `app`
from mhim.pipeline.cli.options import UsageError, app
from mhim.pipeline.cli.settings import SettingsCommand


@dataclass
class Parsed:
    """A command line that was only read. config, sets, flags: as `configs.load.merged` takes them. params: every option
    by its name."""

    config: list[str]
    sets: list[str]
    flags: dict[str, Any]
    params: dict[str, Any]


def parsed(args: list[str]) -> Parsed:
    """A verb's command line, read by its own options and not carried out. Raises ConfigError."""
    from mhim.configs.load import ConfigError

    command = typer.main.get_command(app).commands[args[0]]  # type: ignore[attr-defined]
    assert isinstance(command, SettingsCommand)
    try:
        with command.make_context(args[0], args[1:]) as context:
            params = dict(context.params)
    except (UsageError, typer.Exit) as error:
        raise ConfigError(f"its command line is not one of this program's: {error}") from error
    return Parsed(list(params["config"] or []), list(params["set_"] or []), command.given(params), params)
