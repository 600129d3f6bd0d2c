"""The command blocks of the documents, and how one is run as a reader would.

In: a Markdown file. Out: its fenced blocks with language and marks. `sh` blocks are run line by line: `pipeline ...` by
the program's own entry in this process, all else by bash. `python` blocks are run, unless their first line is a comment
that names a file (`# mine.py`): then they are that file. `yaml` blocks must be valid settings, or (`# task.yaml`)
a stated task. `text` blocks hold no command. Marks stand in the line before a block: `<!-- not run: WHY -->`, or
`<!-- exit 3: WHY -->`, the code that its last line must end with.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]*)\s*$")
MARK = re.compile(r"^\s*<!-- (?:(?P<skip>not run)|exit (?P<code>\d+)): (?P<why>.+) -->\s*$")
FILE = re.compile(r"^# (?P<name>[\w/.-]+\.(?:py|yaml))\b")
LANGUAGES = ("sh", "python", "yaml", "text")
COMMANDS = ("pipeline", "pip", "python", "docker", "apptainer", "pytest")
# few trainings of few epochs on few bags: that a command runs, not what it finds
QUICK = {
    "train.epochs": "2",
    "train.folds": "2",
    "train.threads": "1",
    "score.bootstrap": "20",
    "score.heatmaps": "none",  # where the command itself asks for none
    "score.heatmap_limit": "1",
    "map.method": "pca",  # UMAP takes a minute to start
    "cluster.workers": "1",
}
SETTABLE = ("tile", "extract", "train", "score", "run", "map", "benchmark", "check")


@dataclass(frozen=True)
class Block:
    """One fenced block. skipped: why it is not run, or empty. code: what its last line must end with."""

    path: Path
    line: int
    language: str
    text: str
    skipped: str = ""
    code: int = 0

    @property
    def where(self) -> str:
        return f"{self.path.name}:{self.line}"


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    return list(_blocks(path))


def _blocks(path: Path) -> Iterator[Block]:
    lines = path.read_text().splitlines()
    number = 0
    while number < len(lines):
        opened = FENCE.match(lines[number])
        number += 1
        if opened is None:
            continue
        mark = MARK.match(lines[number - 2]) if number > 1 else None
        start, indent = number, len(opened["indent"])
        while number < len(lines) and lines[number].strip() != "```":
            number += 1
        text = "\n".join(line[indent:] for line in lines[start:number])
        yield Block(
            path,
            start,
            opened["language"],
            text,
            mark["why"] if mark and mark["skip"] else "",
            int(mark["code"]) if mark and mark["code"] else 0,
        )
        number += 1


def commands(text: str) -> list[str]:
    """The command lines of an `sh` block: comments off, lines that go on joined."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            found.append(line.strip())
    return found


def run(block: Block) -> None:
    """Run a block in the current folder. Raises AssertionError with the line that ended otherwise than it should."""
    named = FILE.match(block.text)
    if block.language in ("python", "yaml") and named:
        Path(named["name"]).write_text(block.text + "\n")
    if block.language == "python" and not named:
        exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
    elif block.language == "yaml" and named and named["name"] == "task.yaml":
        from mhim.pipeline.exchange import stated_task

        stated_task.read(Path(named["name"]))
    elif block.language == "yaml":
        _settings(block)
    elif block.language == "sh":
        lines = commands(block.text)
        for k, line in enumerate(lines):
            wanted = block.code if k == len(lines) - 1 else 0
            code = _command(line)
            assert code == wanted, f"{block.where}: `{line}` ended with {code}, not {wanted}"


def _settings(block: Block) -> None:
    import yaml

    from mhim.configs.load import validate

    validate(yaml.safe_load(block.text))


def _command(line: str) -> int:
    from mhim.pipeline.cli.main import _main

    words = shlex.split(line, comments=True)
    if words[0] != "pipeline" or {"&&", "|", ";"} & set(words):
        bin_ = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(["bash", "-c", line], env={**os.environ, "PATH": bin_}).returncode
    arguments, target = words[1:], None
    if ">" in arguments:
        at = arguments.index(">")
        arguments, target = arguments[:at], Path(arguments[at + 1])
    if arguments[0] in SETTABLE:
        quick = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
        arguments = [arguments[0], *quick, *arguments[1:]]
    if target is None:
        return _main(arguments)
    with target.open("w") as file, redirect_stdout(file):
        return _main(arguments)
