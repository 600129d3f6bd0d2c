"""The commands beside the verbs: looking, settings, the demo. Same rules as `verbs.py`: parse and call,
nothing heavy at import, the work itself in the module a command names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhim.pipeline.cli.options import ConfigFiles, Labels, Sets, WorkDir, app, session_flags
from mhim.pipeline.cli.settings import PATIENT_TABLES, TABLE, SettingsCommand, settings_flags

if TYPE_CHECKING:
    from mhim.pipeline.stages.session import Session


@app.command(rich_help_panel="Look")
def status(
    work: WorkDir = Path("work"),
    watch: Annotated[bool, typer.Option("--watch", help="show it again and again until Ctrl-C")] = False,
) -> int:
    """What is done, empty, failed, running or missing, per stage, and the reason of each failure."""
    from mhim.pipeline.upkeep import status
    from mhim.pipeline.upkeep import watch as watching

    return watching.watch(work) if watch else status.show(work)


@app.command(rich_help_panel="Look")
def qupath(
    work: WorkDir = Path("work"),
    out: Annotated[Path | None, typer.Option(help="folder of the files (default: <work>/qupath)")] = None,
    tiles: Annotated[bool, typer.Option("--tiles/--no-tiles", help="with the tiles and their measurements")] = True,
) -> int:
    """Export tissue and tiles as GeoJSON for QuPath; edited, it comes back through the manifest's column `regions`."""
    from mhim.pipeline.exchange.qupath import export
    from mhim.pipeline.store import layout as store

    return export(store.Work(work), out, tiles)


@app.command(cls=SettingsCommand, rich_help_panel="Look")
@settings_flags("tile.mpp", "tile.mpp_of_slides", "cluster.workers", PATIENT_TABLES, *TABLE)
def check(
    slides: Annotated[
        Path | None,
        typer.Argument(help="folder with slides, one slide, or a manifest CSV; may be left away with --table"),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="table whose rows are matched with the slides, mpp and regions obeyed")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the report: check.csv, check.html, tables.csv")] = Path("check"),
    config: ConfigFiles = [],  # noqa: B006  typer copies it
    set_: Sets = [],  # noqa: B006
    *,
    given: dict[str, Any],
) -> int:
    """Look at every slide before any work: readable? mpp? tissue? duplicates? how long? And at patients' tables: who is
    in which, leaks, units. Changes nothing but --out."""
    from mhim.configs import load
    from mhim.pipeline.cohort.check import check as run

    return run(slides, load.resolve(config, set_, given), out, labels)


@app.command(rich_help_panel="Look")
def config(
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    presets: Annotated[bool, typer.Option("--presets", help="list the presets instead")] = False,
) -> int:
    """Print all settings as commented YAML with what each may be, ready to edit and pass with --config."""
    from mhim.configs import load
    from mhim.pipeline.cli.settings import allowed

    print("\n".join(load.presets()) if presets else load.template(load.resolve(config, set_), allowed))
    return 0


@app.command(rich_help_panel="Look")
def encoders(
    name: Annotated[str | None, typer.Argument(help="all that is known of one encoder")] = None,
    weights: Annotated[Path | None, typer.Option(help="folder with weights, looked at besides the hub's cache")] = None,
) -> int:
    """List the encoders: width, tiles they want, licence, and whether their weights are on this machine."""
    from mhim.pipeline.exchange.encoder_list import show

    return show(weights, name)


@app.command(rich_help_panel="Look")
def models(
    name: Annotated[str | None, typer.Argument(help="all that is known of one model, with its settings")] = None,
    dim: Annotated[int, typer.Option(min=1, help="numbers per tile that the encoder gives")] = 1024,
) -> int:
    """List the MIL models: paper, number of weights, and multiply-adds for a bag of 1,000 tiles."""
    from mhim.pipeline.training.model_list import show

    return show(name, dim)


@app.command(rich_help_panel="Look")
def view(
    work: Annotated[Path, typer.Argument(help="work folder")] = Path("work"),
    port: Annotated[int, typer.Option(help="port; 0 takes a free one")] = 8765,
    host: Annotated[str, typer.Option(help="interface: 127.0.0.1 or ::1 is this machine only")] = "127.0.0.1",
    token: Annotated[
        str, typer.Option(help="the secret that the link holds (default: a new one)", envvar="PIPELINE_VIEW_TOKEN")
    ] = "",
    no_token: Annotated[
        bool, typer.Option("--no-token", help="ask for none: every user of this machine may look")
    ] = False,
) -> int:
    """Look at slides, tiles and heatmaps in the browser: open the link that it prints."""
    import secrets

    from mhim.pipeline.store.layout import Work
    from mhim.pipeline.viewer.data import Gallery
    from mhim.pipeline.viewer.listen import ViewerError, address
    from mhim.pipeline.viewer.server import make_server

    if no_token and token:
        raise ViewerError("--token and --no-token exclude each other (PIPELINE_VIEW_TOKEN counts as --token)")
    token = "" if no_token else token or secrets.token_urlsafe(24)
    gallery = Gallery(Work(work))
    for line in gallery.left_out:
        print(f"not shown: {line}")
    server = make_server(gallery, host, port, token)
    ask = f"/?token={token}" if token else "/"
    print(f"viewing {work} at http://{address(host, server.server_port)}{ask}   (Ctrl-C ends)", flush=True)
    try:
        gallery.read.warm()
        server.serve_forever()
    finally:
        server.server_close()
        gallery.read.close()
    return 0


@app.command(cls=SettingsCommand, rich_help_panel="Start here")
@settings_flags("cluster.workers")
def demo(
    folder: Annotated[Path, typer.Option("--to", help="folder for the demo's slides and outputs")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="a dozen small slides: shows that everything runs")] = False,
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    *,
    given: dict[str, Any],
) -> int:
    """Paint a synthetic cohort and run the whole main job on it: no network, no GPU, no weights; minutes."""
    from mhim.pipeline.demo.run import run

    return run(folder, quick, set_, config, given["cluster.workers"])


@app.command(rich_help_panel="Look")
def report(
    work: WorkDir = Path("work"),
    name: Annotated[str | None, typer.Option("--name", help="run, by name or folder (default: the only one)")] = None,
) -> int:
    """One self-contained HTML file of a scored run: cohort, exclusions, results, mistakes, settings."""
    from mhim.pipeline.pictures.report import write
    from mhim.pipeline.resume import console
    from mhim.pipeline.stages.runs import find
    from mhim.pipeline.store.layout import Work

    folder = Work(work)
    made = write(folder, find(folder, name, "mhim"))
    print(made.path)
    for line in made.wrong:
        console.err.print(console.escape(f"not in the report: {line}"))
    return 1 if made.wrong else 0


@app.command(cls=SettingsCommand, rich_help_panel="Verbs")
@session_flags(
    "train.task",
    "extract.encoder",
    "train.folds",
    "train.epochs",
    "train.seeds",
    "train.grid",
    "train.draws",
    "train.protocol",
    "train.gpu",
    *TABLE,
    shares=False,
)
def benchmark(
    labels: Labels = None,
    models: Annotated[
        str | None, typer.Option(help="rows of the table as mean,abmil,mhim_abmil (default: all of benchmark.models)")
    ] = None,
    name: Annotated[str | None, typer.Option(help="runs become NAME-MODEL, the table NAME.md and .csv")] = None,
    *,
    session: Session,
) -> int:
    """Train and score every model on the same splits, and tabulate mean ± sd: a paper's table in one command."""
    from mhim.pipeline.stages import benchmark

    return benchmark.run(session, labels, name, models.split(",") if models else [])


@app.command(rich_help_panel="Look")
def compare(
    one: Annotated[str, typer.Argument(help="a scored run, by name or folder")],
    two: Annotated[str, typer.Argument(help="another one, on the same splits")],
    target: Annotated[
        str | None, typer.Option("--target", help="of runs with several targets, which (default: each)")
    ] = None,
    work: WorkDir = Path("work"),
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
) -> int:
    """Say whether run TWO is better or worse than run ONE, or no different: paired bootstrap over the same patients."""
    from mhim.configs import load
    from mhim.pipeline.results import compare
    from mhim.pipeline.resume import console
    from mhim.pipeline.stages import runs
    from mhim.pipeline.store import layout as store

    settings = load.resolve(config, set_)
    folders = [runs.find(store.Work(work), name, settings.train.model) for name in (one, two)]
    pairs = compare.views_of(folders[0], folders[1], target)
    if len(pairs) > 1:
        compare.tell_together(folders[0], folders[1], settings.score, console.out)
    for sides in pairs:
        compare.tell(*sides, settings.score, console.out)
    return 0
