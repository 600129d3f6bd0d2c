"""The app that commands are registered on, the options that several of them share, and the session that these make."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mhim.pipeline.cli.settings import SettingFlag, settings_flags, show_as
from mhim.pipeline.cli.values import share_of

# newer typers carry a click of their own, so `click.ClickException` is not what a mistyped command raises everywhere
UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


app = typer.Typer(
    name="pipeline",
    help="Whole-slide images in; trained, scored and explained MHIM-MIL models out. Start with `pipeline demo`. "
    "The verbs chain: tile -> extract -> train -> score. Killed at any moment, the same command goes on from there.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


WorkDir = Annotated[
    Path, typer.Option("--work", file_okay=False, help="folder of all outputs; the next verb finds them there")
]


ConfigFiles = Annotated[
    list[str], typer.Option("--config", "-c", help="YAML file or preset name; repeatable, later ones win")
]


Sets = Annotated[list[str], typer.Option("--set", help="one setting, e.g. --set tile.min_tissue=0.5; repeatable")]


Shard = Annotated[str | None, typer.Option(help="only every n-th item, as i/n with i from 1: share work by hand")]


Items = Annotated[Path | None, typer.Option(help="file with item keys, one a line: only these; --shard shares them")]


Replace = Annotated[bool, typer.Option("--replace", help="make outputs of other parameters anew instead of refusing")]


DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be done and why; do nothing")]


ListAll = Annotated[bool, typer.Option("--list", help="with --dry-run: each item by name, however many there are")]


Slides = Annotated[Path, typer.Argument(help="folder with slides (searched recursively), one slide, or a manifest CSV")]


Regions = Annotated[
    Path | None, typer.Option(help="folder of drawn regions, named by slide id, as `pipeline view` saves them")
]


Labels = Annotated[
    Path | None, typer.Option(help="table: slide, patient, label or time+event (default: labels.csv beside the slides)")
]


Name = Annotated[str | None, typer.Option(help="name of the run (default: the model's name)")]


GPU = SettingFlag(("extract.gpu", "train.gpu"))  # a command that does both has one flag for both
CLUSTER = (
    "cluster.workers",
    "cluster.backend",
    "cluster.backend_params.scheduler",
    "cluster.backend_params.wait",
)
_SHARED: dict[str, Any] = {
    "work": (WorkDir, Path("work")),
    "config": (ConfigFiles, []),
    "set_": (Sets, []),
    "replace": (Replace, False),
    "dry_run": (DryRun, False),
    "list_all": (ListAll, False),
}
_SHARES: dict[str, Any] = {"shard": (Shard, None), "items": (Items, None)}


def session_flags(
    *offered: str | SettingFlag, shares: bool = True
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A verb with the options of all verbs and a flag for each of these settings and of the cluster's. It gets them as
    its keyword `session`. shares: also the options that take a share of the items."""
    options = _SHARED | (_SHARES if shares else {})

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def called(given: dict[str, Any], **params: Any) -> int:
            from mhim.configs.load import resolve
            from mhim.pipeline.stages.session import Session
            from mhim.pipeline.store.layout import Work

            shared = {name: params.pop(name) for name in options}
            settings = resolve(shared["config"], shared["set_"], given)
            session = Session(
                Work(shared["work"]),
                settings,
                shared["replace"],
                shared["dry_run"],
                shared["list_all"],
                share_of(shared.get("shard")),
                shared.get("items"),
            )
            return command(**params, session=session)

        show_as(called, command, hidden="session", given=(Any, None), **options)
        return settings_flags(*offered, *CLUSTER)(called)

    return decorate
