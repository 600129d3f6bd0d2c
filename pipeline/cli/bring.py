"""Bringing in and taking out: features, bags, checkpoints and weights of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mhim.pipeline.cli.options import WorkDir, app
from mhim.pipeline.cli.settings import SettingsCommand, settings_flags

weights_app = typer.Typer(help="Weights of encoders.", no_args_is_help=True)


app.add_typer(weights_app, name="weights", rich_help_panel="Bring in")


@weights_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="an encoder of `pipeline encoders`, or timm:<model>")],
    to: Annotated[Path, typer.Option("--to", help="folder that `--weights` is given later")] = Path("weights"),
) -> int:
    """Fetch an encoder's weights from the hub on a machine with a network, for machines without."""
    from mhim.pipeline.exchange.encoder_list import fetch as run

    return run(name, to)


@app.command("import", rich_help_panel="Bring in")
def import_(
    source: Annotated[
        Path,
        typer.Argument(help="files of CLAM, TRIDENT, STAMP, AtlasPatch, slide2vec, .pt or .npy; or a CSV of bags"),
    ],
    work: WorkDir = Path("work"),
    encoder: Annotated[str, typer.Option(help="name under which the features are kept")] = "imported",
    slide_mpp: Annotated[
        float | None, typer.Option(help="µm per level-0 px of the slides, where coordinates are in µm (STAMP)")
    ] = None,
    inner: Annotated[str | None, typer.Option(help="which encoder of files that hold several (AtlasPatch)")] = None,
) -> int:
    """Take features of other programs, or bags from a table: `pipeline train --encoder NAME` then trains on them."""
    from mhim.pipeline.exchange import bag_table
    from mhim.pipeline.store import layout as store

    if source.suffix.lower() != ".csv":
        from mhim.pipeline.exchange import features_in

        names = [file.stem for file in features_in.files_in(source)]
        known = (
            features_in.mpp_of_slides(store.Work(work), names) if slide_mpp is None else dict.fromkeys(names, slide_mpp)
        )
        slides = features_in.import_folder(source, store.Work(work), encoder, known.get, inner)
        print(f"imported {len(slides)} slides; now: pipeline train --work {work} --encoder {encoder} --labels CSV")
        return 0

    labels = bag_table.import_bags(source, store.Work(work), encoder)
    print(f"imported; now: pipeline train --work {work} --encoder {encoder} --labels {labels}")
    return 0


@app.command(cls=SettingsCommand, rich_help_panel="Bring in")
@settings_flags("extract.encoder")
def export(
    out: Annotated[Path, typer.Argument(help="folder to write to")],
    work: WorkDir = Path("work"),
    layout: Annotated[str, typer.Option("--format", help="clam, trident, stamp, atlaspatch or slide2vec")] = "clam",
    *,
    given: dict[str, Any],
) -> int:
    """Write features in the layout of another program."""
    from mhim.configs import load
    from mhim.pipeline.cohort.labels.rows import some
    from mhim.pipeline.exchange import features_out
    from mhim.pipeline.store import layout as store

    damaged: list[str] = []
    empty: list[str] = []
    features = store.Work(work).features(load.resolve([], [], given).extract.encoder)
    slides = list(features_out.export(features, out, layout, damaged, empty))
    print(f"{len(slides)} slides written to {out}")
    if empty:
        print(f"no file for {len(empty)} slides without tiles: {some(empty)}")
    for line in damaged:
        print(f"left out: {line}")
    return 1 if damaged else 0


@app.command("import-model", rich_help_panel="Bring in")
def import_model(
    files: Annotated[list[Path], typer.Argument(help="checkpoints of the MHIM-MIL authors' program, one per fold")],
    encoder: Annotated[str, typer.Option(help="encoder of the features they were trained on")],
    mpp: Annotated[float, typer.Option(help="µm per tile pixel they were trained at")],
    classes: Annotated[str, typer.Option(help="class names in the order of the outputs: normal,tumour")] = "",
    edges: Annotated[str, typer.Option(help="survival: inner edges of the time bins: 12.5,24,40")] = "",
    task: Annotated[
        Path | None,
        typer.Option(help="any other outcome, or several: YAML or JSON file that states it, as `task` of a model.json"),
    ] = None,
    tile_px: Annotated[int | None, typer.Option(help="tile edge, pixels, if it is to be checked too")] = None,
    activation: Annotated[str, typer.Option(help="after the embedding: gelu (published settings) or relu")] = "gelu",
    name: Annotated[str, typer.Option(help="name of the run")] = "imported",
    work: WorkDir = Path("work"),
) -> int:
    """Take trained weights of the authors' program: afterwards `pipeline score --name NAME` scores new slides."""
    from mhim.pipeline.exchange import stated_task
    from mhim.pipeline.exchange.checkpoints import import_models
    from mhim.pipeline.stages.runs import named
    from mhim.pipeline.store import layout as store

    features = {"encoder": encoder, "mpp": mpp} | ({} if tile_px is None else {"tile_px": tile_px})
    name = named(name, "imported")
    names, cuts = ([x.strip() for x in text.split(",") if x.strip()] for text in (classes, edges))
    stated = None if task is None else stated_task.read(task)
    for line in import_models(files, store.Work(work).run(name), names, cuts, features, activation, stated):
        print(line)
    print(f"imported; now: pipeline score NEW_SLIDES --work {work} --name {name}")
    return 0
