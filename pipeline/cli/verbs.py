"""The verbs of the command line: tile, extract, train, score, run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mhim.pipeline.cli.labels import table_flags
from mhim.pipeline.cli.values import gpu_numbers, grid_of, mpps

if TYPE_CHECKING:
    pass
from mhim.pipeline.cli.options import (
    BackendName,
    ConfigFiles,
    DryRun,
    Encoder,
    Gpu,
    Items,
    Labels,
    ListAll,
    Model,
    Mpp,
    MppOfSlides,
    Name,
    Replace,
    Scheduler,
    Sets,
    Shard,
    Slides,
    Table,
    TilePx,
    Wait,
    Weights,
    WorkDir,
    Workers,
    app,
    session,
)


@app.command(rich_help_panel="Verbs", epilog="Example: pipeline tile slides/ --mpp 0.5 --tile-px 256")
@table_flags
def tile(
    slides: Slides,
    labels: Annotated[Path | None, typer.Option(help="table whose columns mpp and regions are obeyed")] = None,
    work: WorkDir = Path("work"),
    mpp: Mpp = None,
    tile_px: TilePx = None,
    segmenter: Annotated[
        str | None, typer.Option(help="stain, otsu, entropy, network, or your module (default: stain)")
    ] = None,
    min_tissue: Annotated[float | None, typer.Option(help="least tissue in a tile, fraction (default: 0.3)")] = None,
    overlap_um: Annotated[float | None, typer.Option(help="overlap of neighbouring tiles, µm")] = None,
    max_pen: Annotated[float | None, typer.Option(help="drop tiles with a larger fraction of pen ink")] = None,
    max_blur: Annotated[float | None, typer.Option(help="drop tiles with a larger fraction out of focus")] = None,
    save_tiles: Annotated[str | None, typer.Option(help="also write the tiles as jpg or png files")] = None,
    mpp_of_slides: MppOfSlides = None,
    assume_mpp_from_power: Annotated[
        bool | None, typer.Option("--assume-mpp-from-power", help="last resort: assume 10 / objective power")
    ] = None,
    config: ConfigFiles = [],  # noqa: B006  typer copies it
    set_: Sets = [],  # noqa: B006
    workers: Workers = None,
    backend: BackendName = None,
    scheduler: Scheduler = None,
    shard: Shard = None,
    items: Items = None,
    wait: Wait = None,
    replace: Replace = False,
    dry_run: DryRun = False,
    list_all: ListAll = False,
    *,
    table: Table,
) -> int:
    """Find the tissue of every slide and cut it into tiles of exact µm."""
    from mhim.pipeline.stages import verbs

    s = session(
        work, config, set_, replace=replace, dry_run=dry_run, list_all=list_all, shard=shard, only=items,
        tile__mpp=mpps(mpp), tile__tile_px=tile_px, tile__segmenter=segmenter, tile__min_tissue=min_tissue,
        tile__overlap_um=overlap_um, tile__max_pen=max_pen, tile__max_blur=max_blur, tile__save_tiles=save_tiles,
        tile__mpp_of_slides=mpp_of_slides, tile__assume_mpp_from_power=assume_mpp_from_power,
        cluster__workers=workers, cluster__backend=backend, cluster__backend_params__wait=wait,
        cluster__backend_params__scheduler=scheduler, **table,
    )  # fmt: skip
    return verbs.tile(s, slides, labels)


@app.command(rich_help_panel="Verbs", epilog="Example: pipeline extract --encoder texture")
def extract(
    work: WorkDir = Path("work"),
    encoder: Encoder = None,
    weights: Weights = None,
    gpu: Gpu = None,
    gpus: Annotated[str | None, typer.Option(help="GPU numbers as 0,1,2: one process each")] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="never open a network connection")] = None,
    allow_mismatch: Annotated[
        bool | None, typer.Option("--allow-mismatch", help="use tiles of another mpp or size than the encoder's")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="tiles per forward pass on a GPU")] = None,
    cache: Annotated[str | None, typer.Option(help="local folder where slides are staged ahead of use")] = None,
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    workers: Workers = None,
    backend: BackendName = None,
    scheduler: Scheduler = None,
    shard: Shard = None,
    items: Items = None,
    wait: Wait = None,
    replace: Replace = False,
    dry_run: DryRun = False,
    list_all: ListAll = False,
) -> int:
    """Turn every tile into a feature vector."""
    from mhim.pipeline.stages import verbs

    s = session(
        work, config, set_, replace=replace, dry_run=dry_run, list_all=list_all, shard=shard, only=items,
        extract__encoder=encoder, extract__weights=weights, extract__gpu=gpu, extract__offline=offline,
        extract__gpus=gpu_numbers(gpus),
        extract__allow_mismatch=allow_mismatch, extract__batch=batch, extract__cache_dir=cache,
        cluster__workers=workers, cluster__backend=backend, cluster__backend_params__wait=wait,
        cluster__backend_params__scheduler=scheduler,
    )  # fmt: skip
    return verbs.extract(s)


@app.command(rich_help_panel="Verbs", epilog="Example: pipeline train --labels labels.csv --model mhim")
@table_flags
def train(
    work: WorkDir = Path("work"),
    labels: Labels = None,
    model: Model = None,
    name: Name = None,
    encoder: Encoder = None,
    folds: Annotated[int | None, typer.Option(help="cross-validation folds (default: 5)")] = None,
    epochs: Annotated[int | None, typer.Option(help="most epochs (default: 50)")] = None,
    seeds: Annotated[int | None, typer.Option(help="trainings per fold (default: 1)")] = None,
    grid: Annotated[list[str], typer.Option(help="setting=value,value to try, chosen on validation; repeatable")] = [],  # noqa: B006
    protocol: Annotated[str | None, typer.Option(help="honest, or paper: selects on the test fold")] = None,
    gpu: Gpu = None,
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    workers: Workers = None,
    backend: BackendName = None,
    scheduler: Scheduler = None,
    shard: Shard = None,
    items: Items = None,
    wait: Wait = None,
    replace: Replace = False,
    dry_run: DryRun = False,
    list_all: ListAll = False,
    *,
    table: Table,
) -> int:
    """Train a MIL model by patient-grouped cross-validation (MHIM-MIL: its teacher first, on the same folds)."""
    from mhim.pipeline.stages import verbs

    s = session(
        work, config, set_, replace=replace, dry_run=dry_run, list_all=list_all, shard=shard, only=items,
        train__model=model, extract__encoder=encoder, train__folds=folds, train__epochs=epochs, train__seeds=seeds,
        train__grid=grid_of(grid), train__protocol=protocol, train__gpu=gpu,
        cluster__workers=workers, cluster__backend=backend, cluster__backend_params__wait=wait,
        cluster__backend_params__scheduler=scheduler, **table,
    )  # fmt: skip
    return verbs.train(s, labels, name)


@app.command(
    rich_help_panel="Verbs", epilog="Examples: pipeline score --heatmaps all; pipeline score --model mhim new_slide.svs"
)
@table_flags
def score(
    slides: Annotated[
        Path | None, typer.Argument(help="new slides (folder, file or CSV): tiled, extracted and scored by all folds")
    ] = None,
    work: WorkDir = Path("work"),
    name: Annotated[str | None, typer.Option("--name", "--model", help="run to score, by name or folder")] = None,
    features: Annotated[
        Path | None, typer.Option(help="folder of features of new slides, scored without labels by all folds")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="labels of new slides: internal against external")] = None,
    called: Annotated[
        str | None, typer.Option("--as", help="name of the new slides' results (default: their folder's)")
    ] = None,
    allow_known: Annotated[
        bool | None, typer.Option("--allow-known", help="score the run's own patients as new; noted in every output")
    ] = None,
    heatmaps: Annotated[
        str | None, typer.Option(help="none, attention, probability, contribution or all (default: attention)")
    ] = None,
    tiff: Annotated[bool | None, typer.Option("--tiff", help="also the heatmap as a pyramidal TIFF")] = None,
    geojson: Annotated[bool | None, typer.Option("--geojson", help="also the tiles for QuPath")] = None,
    top_tiles: Annotated[int | None, typer.Option(help="also a sheet of so many highest and lowest tiles")] = None,
    gpu: Gpu = None,
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    workers: Workers = None,
    backend: BackendName = None,
    scheduler: Scheduler = None,
    shard: Shard = None,
    items: Items = None,
    wait: Wait = None,
    replace: Replace = False,
    dry_run: DryRun = False,
    list_all: ListAll = False,
    *,
    table: Table,
) -> int:
    """Held-out predictions, metrics with intervals and heatmaps of a run; or predictions for new slides."""
    from mhim.configs import trust
    from mhim.pipeline.stages import verbs

    s = session(
        work, config, set_, replace=replace, dry_run=dry_run, list_all=list_all, shard=shard, only=items,
        train__gpu=gpu, cluster__workers=workers, cluster__backend=backend, cluster__backend_params__wait=wait,
        cluster__backend_params__scheduler=scheduler,
        score__heatmaps=heatmaps, score__tiff=tiff, score__geojson=geojson, score__top_tiles=top_tiles,
        score__allow_known=allow_known, **table,
    )  # fmt: skip
    if name and "." in name and not (Path(name).exists() or (work / "runs" / name).exists()):
        trust.allow(name)  # a module's name and no folder's: `--model my.module` finds the run `module`
    return verbs.score(s, name, features, slides, labels, called)


@app.command(rich_help_panel="Verbs", epilog="Example: pipeline run slides/ --labels labels.csv")
@table_flags
def run(
    slides: Slides,
    labels: Labels = None,
    work: WorkDir = Path("work"),
    mpp: Mpp = None,
    tile_px: TilePx = None,
    mpp_of_slides: MppOfSlides = None,
    encoder: Encoder = None,
    weights: Weights = None,
    gpu: Gpu = None,
    model: Model = None,
    name: Name = None,
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    workers: Workers = None,
    backend: BackendName = None,
    scheduler: Scheduler = None,
    wait: Wait = None,
    replace: Replace = False,
    *,
    table: Table,
) -> int:
    """All four verbs in order: slides in, scored models out."""
    from mhim.pipeline.stages import verbs

    s = session(
        work, config, set_, replace=replace,
        tile__mpp=mpps(mpp), tile__tile_px=tile_px, tile__mpp_of_slides=mpp_of_slides, extract__encoder=encoder,
        extract__weights=weights, extract__gpu=gpu, train__gpu=gpu, train__model=model,
        cluster__workers=workers, cluster__backend=backend, cluster__backend_params__wait=wait,
        cluster__backend_params__scheduler=scheduler, **table,
    )  # fmt: skip
    return verbs.run_all(s, slides, labels, name)
