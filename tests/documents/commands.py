"""What the documents tell of the command line: its commands, and which flags stand for which setting.

In: the command line's app, as typer builds it. Out: a Markdown table, and flags by setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from mhim.pipeline.cli import main  # noqa: F401  registers every command
from mhim.pipeline.cli.options import app

START = ("demo", "run")  # what a stranger needs first stands first


def commands() -> str:
    """Every command with the first sentence of its help."""
    found = dict(_commands(typer.main.get_command(app)))
    names = sorted(found, key=lambda name: (name not in START, name))
    lines = ["| command | what it does |", "|---|---|"]
    for name in names:
        sentence = " ".join((found[name].help or "").split()).replace("|", "\\|")
        lines.append(f"| `pipeline {name}` | {sentence} |")
    return "\n".join(lines)


def flags() -> dict[str, str]:
    """`section.key` of a setting -> the flag that stands for it."""
    found: dict[str, str] = {}
    for _, command in _commands(typer.main.get_command(app)):
        for offered in getattr(command, "offered", ()):
            found |= dict.fromkeys(offered.settings, offered.flag)
    return found


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command
