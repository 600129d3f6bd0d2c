"""Pictures of what a model saw: stored tile scores drawn on the slide, for every model by the same code.

In: `scores/<slide id>.zarr` of a scored run, and the slide file. Out: per slide one folder below `heatmaps/` with PNG
overlays, and on request a pyramidal TIFF, GeoJSON tiles for QuPath and a contact sheet of tiles. Nothing is tiled or
encoded again. It knows no model: what a model cannot tell (class evidence) is left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import ScoreConfig
from mhim.extract.images import encoded
from mhim.extract.units import Mpp
from mhim.mil import captions, heatmap
from mhim.mil.heatmap import Frame
from mhim.mil.tasks import Several, Task
from mhim.pipeline.pictures import kinds
from mhim.pipeline.pictures.kinds.kind import Layer
from mhim.pipeline.store.attributes import Geometry

PICTURE_PX = 1600  # long side of an overlay


def layers(arrays: dict[str, np.ndarray], task: Task, which: str) -> list[Layer]:
    """The layers of one slide that `which` (a value of score.heatmaps) asks for and the model can give.

    arrays: attention (n,) and, if the model has it, evidence (n, C), as the store of scores holds them.
    attention: the tile's share in the answer. hardness, masked: what MHIM's teacher finds hard, and the share of its
    training in which the mask hides the tile. What follows from the evidence each kind of outcome says in `kinds/`.
    """
    made = [Layer("attention", arrays["attention"])] if which in ("attention", "all") else []
    if which == "all":
        made += [Layer(name, arrays[name], share=name == "masked") for name in ("hardness", "masked") if name in arrays]
    evidence = arrays.get("evidence")
    if evidence is None or which in ("none", "attention"):
        return made
    evidence = evidence.astype(np.float64)
    if not isinstance(task, Several):
        return made + kinds.of(task).layers(arrays["attention"], evidence, which)
    for name, one in task.targets:
        own = kinds.of(one).layers(arrays["attention"], evidence[:, task.slices[name]], which)
        made += [replace(layer, name=f"{layer.name}_of_{name}") for layer in own]
    return made


def low_resolution(slide: Any) -> tuple[np.ndarray, Frame]:
    """A picture of the slide's bounds whose long side is about PICTURE_PX, in square pixels, and where it lies."""
    from mhim.extract.slide.slide import squared

    x0, y0, w_l0, h_l0 = slide.bounds_l0
    mx, my = slide.slide_mpp
    rgb, mpp = squared(*slide.image_at(Mpp(max(w_l0 * mx, h_l0 * my) / PICTURE_PX)))
    return rgb, Frame((x0, y0), (mpp[0] / mx, mpp[1] / my), (rgb.shape[1], rgb.shape[0]), mpp[0])


def overlay(
    rgb: np.ndarray,
    frame: Frame,
    layer: Layer,
    arrays: dict[str, np.ndarray],
    tiles: Geometry,
    config: ScoreConfig,
    title: str,
) -> np.ndarray:
    """The layer on the picture with title, colour bar and scale bar: uint8 (h, w, 3)."""
    scale = layer.scaled(config.heatmap_scale)
    values = heatmap.raster(scale.values, arrays["coords"], tiles.tile_l0, frame)
    palette = heatmap.chosen(config.palette, layer.signed)
    laid = heatmap.laid_over(rgb, heatmap.colour(values, 0.5, palette))
    how = "of the training" if layer.share else config.heatmap_scale
    what = f"{title}: {layer.name.replace('_', ' ')} ({how})"
    return heatmap.legend(laid, frame.mpp, what, scale.low, scale.high, palette)


def write_tiff(path: Path, layer: Layer, arrays: dict[str, np.ndarray], tiles: Geometry, config: ScoreConfig) -> None:
    """The layer alone over the whole level-0 plane as a tiled RGB pyramid, an integer number of level-0 px per pixel.

    Its corner is the slide's, its resolution tags give the size: programs that overlay by µm place it right.
    """
    import cv2
    import tifffile

    down = max(1, round(min(tiles.tile_l0) / 8))
    w, h = (-(-s // down) for s in tiles.size_l0)
    mx, my = tiles.slide_mpp
    frame = Frame((0, 0), (down, down), (w, h), mx * down)
    scale = layer.scaled(config.heatmap_scale)
    laid = heatmap.raster(scale.values, arrays["coords"], tiles.tile_l0, frame)
    rgba = heatmap.colour(laid, name=heatmap.chosen(config.palette, layer.signed))
    rgb = np.where(rgba[..., 3:] > 0, rgba[..., :3], 255).astype(np.uint8)
    levels = [rgb]
    while max(levels[-1].shape[:2]) > 512:
        big = levels[-1]
        half = (-(-big.shape[1] // 2), -(-big.shape[0] // 2))
        levels.append(np.asarray(cv2.resize(big, half, interpolation=cv2.INTER_AREA), np.uint8))
    with tifffile.TiffWriter(path) as tif:
        for k, level in enumerate(levels):
            ratio = w / level.shape[1]
            tif.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                software=False,
                metadata=None,
                subfiletype=1 if k else 0,
                description=layer.name if k == 0 else None,
                resolution=(1e4 / (mx * down * ratio), 1e4 / (my * down * ratio)),
                resolutionunit="CENTIMETER",
            )


def geojson(every: list[Layer], coords_l0: np.ndarray, tiles: Geometry, slide: str) -> str:
    """The tiles as QuPath tile objects, as `pipeline qupath` writes them, their scores as measurements."""
    from mhim.extract.tiles.geojson import dumps, tile_features

    ranks = heatmap.scaled(every[0].scores, "percentile").values
    measured = {layer.name: layer.scores for layer in every} | {f"{every[0].name} percentile": 100.0 * ranks}
    origin = tiles.bounds_l0[:2]
    return dumps(tile_features(coords_l0, tiles.tile_l0, measured, origin, slide))


def contact_sheet(slide: Any, layer: Layer, coords_l0: np.ndarray, tiles: Geometry, k: int) -> np.ndarray:
    """The k highest and the k lowest tiles at the resolution the model saw: two rows, uint8 RGB."""
    order = np.argsort(-layer.scores, kind="stable")
    k = min(k, len(order))
    edge, gap, strip = tiles.tile_px, 6, 22
    sheet = np.full((2 * (edge + strip + gap), k * (edge + gap), 3), 255, np.uint8)
    for row, chosen in enumerate((order[:k], order[::-1][:k])):
        for column, i in enumerate(chosen.tolist()):
            x, y = coords_l0[i].tolist()
            top, left = row * (edge + strip + gap), column * (edge + gap)
            sheet[top : top + edge, left : left + edge] = slide.read_region(x, y, edge, tiles.mpp)
            text = f"{'highest' if row == 0 else 'lowest'} {column + 1}: {layer.scores[i]:.3g} at {x}, {y}"
            captions.write(sheet, text, left, top + edge + 15, 12)
    return sheet


def file_name(name: str) -> str:
    """A layer's name as a file name: class names are the user's and may hold anything."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def save_png(path: Path, rgb: np.ndarray) -> None:
    path.write_bytes(encoded(rgb, ".png"))


def save_jpeg(path: Path, rgb: np.ndarray) -> None:
    path.write_bytes(encoded(rgb, ".jpg", 88))
