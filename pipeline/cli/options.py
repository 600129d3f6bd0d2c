"""The options that several commands share, the app they are registered on, and the session that options make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mhim.pipeline.stages.session import Session


# newer typers carry a click of their own, so `click.ClickException` is not what a mistyped command raises everywhere
UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Parsed(Exception):
    """A command line that was only read. config, sets, flags: as `configs.load.merged` takes them. params: by name."""

    def __init__(self, config: list[str], sets: list[str], flags: dict[str, Any]) -> None:
        super().__init__("read")
        self.config, self.sets, self.flags = config, sets, flags
        self.params: dict[str, Any] = {}


reading: list[bool] = []  # not empty while `parsed` reads a command line


app = typer.Typer(
    name="pipeline",
    help="Whole-slide images in; trained, scored and explained MHIM-MIL models out. Start with `pipeline demo`. "
    "The verbs chain: tile -> extract -> train -> score. Killed at any moment, the same command goes on from there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


WorkDir = Annotated[Path, typer.Option("--work", help="folder of all outputs; the next verb finds them there")]


ConfigFiles = Annotated[
    list[str], typer.Option("--config", "-c", help="YAML file or preset name; repeatable, later ones win")
]


Sets = Annotated[list[str], typer.Option("--set", help="one setting, e.g. --set tile.min_tissue=0.5; repeatable")]


Workers = Annotated[int | None, typer.Option(help="parallel processes (default: one per core)")]


BackendName = Annotated[str | None, typer.Option("--backend", help="local, slurm or dask")]


Scheduler = Annotated[str | None, typer.Option(help="tcp://host:port of a running Dask cluster, for --backend dask")]


Shard = Annotated[str | None, typer.Option(help="only every n-th item, as i/n with i from 1: share work by hand")]


Items = Annotated[Path | None, typer.Option(help="file with item keys, one a line: only these; --shard shares them")]


Wait = Annotated[bool | None, typer.Option("--wait", help="with --backend slurm: follow the jobs until they end")]


Replace = Annotated[bool, typer.Option("--replace", help="make outputs of other parameters anew instead of refusing")]


DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be done and why; do nothing")]


ListAll = Annotated[bool, typer.Option("--list", help="with --dry-run: each item by name, however many there are")]


Slides = Annotated[Path, typer.Argument(help="folder with slides (searched recursively), one slide, or a manifest CSV")]


Labels = Annotated[
    Path | None, typer.Option(help="table: slide, patient, label or time+event (default: labels.csv beside the slides)")
]


Table = dict[str, Any]  # settings of the flags that `table_flags` adds


Mpp = Annotated[str | None, typer.Option(help="µm per tile px; several as 0.5,1,2 (default: 0.5)")]


TilePx = Annotated[int | None, typer.Option(help="tile edge in px at --mpp (default: 256)")]


MppOfSlides = Annotated[float | None, typer.Option(help="µm per px of level 0, for slides whose files do not tell")]


Encoder = Annotated[str | None, typer.Option(help="a listed name, timm:<model>, or module.function (default: texture)")]


Weights = Annotated[str | None, typer.Option(help="file or folder with the encoder's weights")]


Gpu = Annotated[bool | None, typer.Option("--gpu", help="use the GPU; stops if there is none")]


Model = Annotated[str | None, typer.Option(help="MIL model (default: mhim)")]


Name = Annotated[str | None, typer.Option(help="name of the run (default: the model's name)")]


def session(
    work: Path,
    config: list[str],
    sets: list[str],
    *,
    replace: bool = False,
    dry_run: bool = False,
    list_all: bool = False,
    shard: str | None = None,
    only: Path | None = None,
    **flags: Any,
) -> Session:
    """The verbs' common ground. `flags` are settings with `__` for the dot; None means not given."""
    from mhim.configs.load import ConfigError, resolve
    from mhim.pipeline.stages.session import Session
    from mhim.pipeline.store.layout import Work

    if reading:
        raise Parsed(config, sets, {k.replace("__", "."): v for k, v in flags.items()})
    resolved = resolve(config, sets, {k.replace("__", "."): v for k, v in flags.items()})
    pair = None
    if shard is not None:
        i, _, n = shard.partition("/")
        if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
            raise ConfigError(f"--shard {shard!r}: write i/n with 1 <= i <= n, for example 3/20")
        pair = (int(i), int(n))
    return Session(Work(work), resolved, replace, dry_run, list_all, pair, only)
