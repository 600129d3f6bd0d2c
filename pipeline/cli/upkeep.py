"""The commands that look after a work folder: trying failures again, packing stores; and the options of all commands.
Same rules as `verbs.py`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from mhim.pipeline.cli.options import ConfigFiles, DryRun, Sets, WorkDir, app


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        with suppress(metadata.PackageNotFoundError):
            print(metadata.version("mhim-pipeline"))
            raise typer.Exit
        print("not installed: run from a folder of sources")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="print the program's version and end", callback=_version, is_eager=True)
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="events as JSON lines on standard error instead of progress bars")
    ] = False,
    allow_plugin: Annotated[
        list[str],
        typer.Option(
            "--allow-plugin",
            help="module of your own that names out of files (a run's settings, model.json) may mean; repeatable, at "
            "any place of any command. What --encoder, --segmenter or --model name is allowed without it",
        ),
    ] = [],  # noqa: B006  taken out of the command before, see `plugins_named`
) -> None:
    if log_json:
        from mhim.pipeline.resume import console
        from mhim.pipeline.resume.runlog import MIRROR

        os.environ[MIRROR] = "1"
        console.err.quiet = True


@app.command(rich_help_panel="Look after")
def retry(
    work: WorkDir = Path("work"),
    failed: Annotated[bool, typer.Option("--failed", help="only the items that failed")] = False,
    labels: Annotated[Path | None, typer.Option(help="labels of trainings, where they lie outside of --work")] = None,
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    dry_run: DryRun = False,
) -> int:
    """Make what failed again, with the settings of then; --config and --set count before those."""
    import sys

    from mhim.configs import load
    from mhim.configs.load import ConfigError
    from mhim.pipeline.cli.read import parsed
    from mhim.pipeline.stages import retry as again
    from mhim.pipeline.store.layout import Work

    if not failed:
        raise ConfigError("say --failed: to make what is missing, too, give the verb's command again")
    folder = Work(work)
    typed = load.typed(config, set_)  # what is typed here is allowed here
    load.validate(typed)
    codes = [0]
    found = again.commands(folder, parsed)
    for one in found:
        print(f"{len(one.keys)} failed: pipeline {one.line}", file=sys.stderr)
        if why := again.refused(one, folder, typed, labels):
            print(f"refused: {why}. Or type the command above yourself, if you know it", file=sys.stderr)
            codes.append(3)
        elif not dry_run:
            codes.append(again.make(one, folder, typed, labels))
    if not found:
        print("nothing failed", file=sys.stderr)
    return max(codes)


@app.command(rich_help_panel="Look after")
def pack(work: WorkDir = Path("work")) -> int:
    """Turn each finished tile and feature store into one read-only file; every command reads either form."""
    from mhim.pipeline.store.layout import Work
    from mhim.pipeline.upkeep.pack import pack as do

    return _tell("packed", do(Work(work)))


@app.command(rich_help_panel="Look after")
def unpack(work: WorkDir = Path("work")) -> int:
    """Turn packed stores back into folders."""
    from mhim.pipeline.store.layout import Work
    from mhim.pipeline.upkeep.pack import unpack as do

    return _tell("unpacked", do(Work(work)))


@app.command(rich_help_panel="Look after")
def verify(
    work: WorkDir = Path("work"),
    repair: Annotated[
        bool, typer.Option("--repair", help="move what is damaged to WORK/damaged, so that it is made anew")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="all of it, not on from where a stopped one was")] = False,
) -> int:
    """Compare every byte of the outputs with the sums that they carry, and name what is damaged."""
    from mhim.pipeline.store.layout import Work
    from mhim.pipeline.upkeep.verify import show

    return show(Work(work), repair, again)


def _tell(what: str, result: object) -> int:
    from mhim.pipeline.upkeep.pack import Packed

    assert isinstance(result, Packed)
    print(f"{what} {result.stores} stores: {result.files_before} files became {result.files_after}")
    if result.busy:
        print(f"{result.busy} are being made at this moment and were left; give the command again")
    for line in result.damaged:
        print(f"left as it is: {line}")
    return 1 if result.busy or result.damaged else 0
