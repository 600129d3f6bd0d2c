"""The verbs of the command line: tile, extract, train, score, run, map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mhim.pipeline.cli.options import GPU, Labels, Name, Regions, Slides, app, session_flags
from mhim.pipeline.cli.settings import PATIENT_TABLES, TABLE, SettingFlag, SettingsCommand

if TYPE_CHECKING:
    from mhim.pipeline.stages.session import Session


@app.command(
    cls=SettingsCommand, rich_help_panel="Verbs", epilog="Example: pipeline tile slides/ --mpp 0.5 --tile-px 256"
)
@session_flags(
    "tile.mpp",
    "tile.tile_px",
    "tile.segmenter",
    "tile.min_tissue",
    "tile.overlap_um",
    "tile.max_pen",
    "tile.max_blur",
    "tile.save_tiles",
    "tile.mpp_of_slides",
    "tile.assume_mpp_from_power",
    *TABLE,
)
def tile(
    slides: Slides,
    labels: Annotated[Path | None, typer.Option(help="table whose columns mpp and regions are obeyed")] = None,
    regions: Regions = None,
    *,
    session: Session,
) -> int:
    """Find the tissue of every slide and cut it into tiles of exact µm."""
    from mhim.pipeline.stages import verbs

    return verbs.tile(session, slides, labels, regions)


@app.command(cls=SettingsCommand, rich_help_panel="Verbs", epilog="Example: pipeline extract --encoder texture")
@session_flags(
    "extract.encoder",
    "extract.weights",
    "extract.gpu",
    "extract.gpus",
    "extract.offline",
    "extract.allow_mismatch",
    "extract.batch",
    SettingFlag(("extract.cache_dir",), "--cache"),
)
def extract(*, session: Session) -> int:
    """Turn every tile into a feature vector."""
    from mhim.pipeline.stages import verbs

    return verbs.extract(session)


@app.command(
    cls=SettingsCommand, rich_help_panel="Verbs", epilog="Example: pipeline train --labels labels.csv --model mhim"
)
@session_flags(
    "train.model",
    "train.task",
    "extract.encoder",
    "train.folds",
    "train.epochs",
    "train.seeds",
    "train.grid",
    "train.draws",
    "train.protocol",
    "train.fusion",
    "train.gpu",
    PATIENT_TABLES,
    *TABLE,
)
def train(labels: Labels = None, name: Name = None, *, session: Session) -> int:
    """Train a MIL model by patient-grouped cross-validation (MHIM-MIL: its teacher first, on the same folds)."""
    from mhim.pipeline.stages import verbs

    return verbs.train(session, labels, name)


@app.command(
    cls=SettingsCommand,
    rich_help_panel="Verbs",
    epilog="Examples: pipeline score --heatmaps all; pipeline score --model mhim new_slide.svs",
)
@session_flags(
    "score.heatmaps",
    "score.tiff",
    "score.geojson",
    "score.top_tiles",
    "score.allow_known",
    "train.gpu",
    PATIENT_TABLES,
    *TABLE,
)
def score(
    slides: Annotated[
        Path | None, typer.Argument(help="new slides (folder, file or CSV): tiled, extracted and scored by all folds")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "--model", help="run to score, by name or folder")] = None,
    features: Annotated[
        Path | None, typer.Option(help="folder of features of new slides, scored without labels by all folds")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="labels of new slides: internal against external")] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="folder with the truth of tiles: <slide id>.geojson (regions) or .csv; maps are measured"),
    ] = None,
    called: Annotated[
        str | None, typer.Option("--as", help="name of the new slides' results (default: their folder's)")
    ] = None,
    *,
    session: Session,
) -> int:
    """Held-out predictions, metrics with intervals and heatmaps of a run; or predictions for new slides."""
    from mhim.configs import named, trust
    from mhim.pipeline.stages import verbs

    if name and named.is_file(name) and not Path(name).is_dir():
        name = named.typed(name)  # `--model ./mine.py` finds the run `mine`
    elif name and "." in name and not (Path(name).exists() or session.work.run(name).exists()):
        trust.allow(name)  # a module's name and no folder's: `--model my.module` finds the run `module`
    return verbs.score(session, name, features, slides, labels, called, truth)


@app.command(cls=SettingsCommand, rich_help_panel="Verbs", epilog="Example: pipeline run slides/ --labels labels.csv")
@session_flags(
    "tile.mpp",
    "tile.tile_px",
    "tile.mpp_of_slides",
    "extract.encoder",
    "extract.weights",
    GPU,
    "train.model",
    "train.fusion",
    PATIENT_TABLES,
    "train.task",
    *TABLE,
    shares=False,
)
def run(slides: Slides, labels: Labels = None, name: Name = None, regions: Regions = None, *, session: Session) -> int:
    """All four verbs in order: slides in, scored models out."""
    from mhim.pipeline.stages import verbs

    return verbs.run_all(session, slides, labels, name, regions)


@app.command("map", cls=SettingsCommand, rich_help_panel="Verbs", epilog="Example: pipeline map --run mhim")
@session_flags(
    "extract.encoder",
    "map.tiles",
    "map.method",
    "map.clusters",
    "map.gallery",
    *TABLE,
)
def map_(
    labels: Labels = None,
    name: Annotated[str | None, typer.Option("--name", help="name of the map (default: the encoder's)")] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="scored run whose held-out answers colour it (default: the only one)")
    ] = None,
    *,
    session: Session,
) -> int:
    """Tiles and patients as a map: PCA, UMAP, clusters with their share per class, the tiles that stand for each."""
    from mhim.pipeline.stages import map_verb

    return map_verb.make(session, labels, name, run)
