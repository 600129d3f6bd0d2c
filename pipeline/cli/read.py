"""A command line as settings, read and not carried out: for logs of version 0.1, which hold nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mhim.pipeline.cli.options import Parsed


def parsed(args: list[str]) -> Parsed:
    """A verb's command line, read by its own options and not carried out. Raises ConfigError."""
    from mhim.configs.load import ConfigError
    from mhim.pipeline.cli import verbs  # noqa: F401  registered on `app`
    from mhim.pipeline.cli.options import Parsed, UsageError, app, reading

    command = typer.main.get_command(app).commands[args[0]]  # type: ignore[attr-defined]
    reading.append(True)
    try:
        with command.make_context(args[0], args[1:]) as context:
            try:
                command.invoke(context)
            except Parsed as found:
                found.params = dict(context.params)
                return found
    except (UsageError, typer.Exit) as error:
        raise ConfigError(f"its command line is not one of this program's: {error}") from error
    finally:
        reading.clear()
    raise ConfigError("its command line has no settings")
