"""The command line as a whole: runs a command, turns its end into one line and an exit code. Nothing heavy at import.

A flag that stands for a setting is a short form of `--set section.key=value`. Errors of the user end in one line and
exit code 2, refusals in 3, failed items in 1, an interruption in 130.
"""

from __future__ import annotations

import io
import sys
from itertools import pairwise

import typer

from mhim.pipeline.cli import bring, look, upkeep, verbs  # noqa: F401  each registers its commands, in this order
from mhim.pipeline.cli.options import UsageError, app
from mhim.pipeline.resume import ends


def main(argv: list[str] | None = None) -> None:
    """Entry point: run a verb, turn its errors into one line and its end into the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding cannot show stops nothing
            stream.reconfigure(errors="backslashreplace")
    ends.prepare(argv)
    sys.exit(ends.last_words(_main(argv)))


def _refuse_empty(args: list[str]) -> None:
    """No command means anything by an empty text: as a path it would be the working folder. Raises ConfigError."""
    for before, arg in pairwise(["", *args]):
        if arg == "" or (arg.startswith("--") and arg.endswith("=") and arg.count("=") == 1):
            from mhim.configs.load import ConfigError

            where = arg.rstrip("=") or (before if before.startswith("-") else "an argument")
            raise ConfigError(f"{where} is empty (a shell variable that is not set?): name it, or leave it out")


def _main(argv: list[str] | None) -> int:
    from mhim.configs.plugins_named import taken_out

    try:
        args = taken_out(sys.argv[1:] if argv is None else argv)
        _refuse_empty(args)
        code = int(app(args=args, standalone_mode=False) or 0)
        return ends.interrupted() if code == 130 else code  # typer turns Ctrl-C into this code and says nothing
    except (typer.Abort, KeyboardInterrupt):
        return ends.interrupted()
    except SystemExit as ended:  # SIGTERM, or a scheduler's warning, while a stage ran
        if ended.code == 143:
            print("told to end: what is finished is kept; the same command goes on from there", file=sys.stderr)
        raise
    except UsageError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except Exception as error:
        return ends.explain(error)
