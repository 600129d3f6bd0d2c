"""A command line as settings, read and not carried out: for logs of version 0.1, which hold nothing else."""

from __future__ import annotations

from typing import Any

import typer


class Parsed(Exception):
    """A command line that was only read. config, sets, flags: as `configs.load.merged` takes them. params: by name."""

    def __init__(self, config: list[str], sets: list[str], flags: dict[str, Any]) -> None:
        super().__init__("read")
        self.config, self.sets, self.flags = config, sets, flags
        self.params: dict[str, Any] = {}


reading: list[bool] = []  # not empty while `parsed` reads a command line


def parsed(args: list[str]) -> Parsed:
    """A verb's command line, read by its own options and not carried out. Raises ConfigError."""
    from mhim.configs.load import ConfigError
    from mhim.pipeline.cli.main import _UsageError
    from mhim.pipeline.cli.options import app

    command = typer.main.get_command(app).commands[args[0]]  # type: ignore[attr-defined]
    reading.append(True)
    try:
        with command.make_context(args[0], args[1:]) as context:
            try:
                command.invoke(context)
            except Parsed as found:
                found.params = dict(context.params)
                return found
    except (_UsageError, typer.Exit) as error:
        raise ConfigError(f"its command line is not one of this program's: {error}") from error
    finally:
        reading.clear()
    raise ConfigError("its command line has no settings")
