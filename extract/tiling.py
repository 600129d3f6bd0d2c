"""One slide -> its tiles: tissue, grid, artefact fractions, overlay.

In: a path and the validated settings. Out: a `Tiled` value of arrays and plain attributes; writes no file of the
store. Knows nothing of cohorts, resumption or file layouts. The same slide and settings give the same bytes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from configs import lookup
from configs.schema import TileConfig
from extract import SlideError, overlay
from extract.slide import ReadPlan, Slide, open_slide
from extract.tiles import box_means, positions
from extract.tissue._clean import clean

# The tissue image is held to so many px (a few bytes each while segmenting): a slide of any size stays under 200 MB.
MAX_IMAGE_PX = 12_000_000

cv2.setNumThreads(1)  # slides run in parallel processes; threads inside each only fight for the cores


@dataclass(frozen=True)
class Tiled:
    """The tiles of one slide.

    arrays: `coords` int32 (N, 2), level-0 px of the top-left corners, x then y, row by row; `tissue` float32 (N,),
        fraction of each tile that is tissue; `mask` uint8 (H, ceil(W / 8)), the tissue mask, 8 px a byte
        (`unpack_mask`). With further magnifications the same arrays under the name plus `_mpp<value>`, and `parent`
        int32 (N,): row of the tile of the next coarser magnification that holds this tile's centre, -1 for none.
    attrs: plain JSON values: resolution, geometry and how the tiles were made. No path, host or time.
    overlay: uint8 (h, w, 3) or None. empty: why there is no tile, or None. notes: warnings. reads: how a tile is read.
    """

    arrays: dict[str, np.ndarray]
    attrs: dict[str, Any]
    overlay: np.ndarray | None
    empty: str | None
    notes: tuple[str, ...] = ()
    reads: str = ""


@dataclass(frozen=True)
class _Tissue:
    """A mask on the low-resolution image; mpp: µm per px of it, (x, y)."""

    rgb: np.ndarray
    mask: np.ndarray
    mpp: tuple[float, float]
    segmenter: str
    notes: list[str] = field(default_factory=list)


def tile_slide(
    path: Path,
    config: TileConfig,
    mpp: float | None = None,
    regions: Path | None = None,
    tiles_out: Path | None = None,
) -> Tiled:
    """Segment and tile one slide.

    mpp: the manifest's µm per px for it. regions: a QuPath GeoJSON that edits the tissue. tiles_out: folder for the
    tile images when `config.save_tiles` asks for them. Raises SlideError (unreadable, no mpp, too coarse).
    """
    with open_slide(path, mpp, config) as slide:
        plans = {m: _checked_plan(slide, m, config) for m in config.mpp}
        tissue = _find_tissue(slide, config)
        notes = [*slide.notes, *tissue.notes]
        arrays: dict[str, np.ndarray] = {"mask": np.packbits(tissue.mask, axis=1)}
        for m in config.mpp:
            arrays.update({name + _suffix(m, config): a for name, a in _grid(slide, tissue, m, config).items()})
        _add_parents(arrays, slide, config)
        main, plan = config.mpp[0], plans[config.mpp[0]]
        attrs = _attrs(slide, tissue, main, plan, config)
        empty = None
        if not len(arrays["coords"]):
            empty = _why_empty(slide, tissue, config)
        picture = None
        if config.overlay:
            bx, by = slide.bounds_l0[:2]
            per_px = np.array([m / s for m, s in zip(tissue.mpp, slide.slide_mpp, strict=True)])  # level-0 px
            corners = (arrays["coords"] - np.array([bx, by])) / per_px
            w, h = (np.array(tile_size_l0(slide, main, config)) / per_px).tolist()
            picture = overlay.draw(tissue.rgb, tissue.mask, corners, (w, h))
        reads = f"{main:g} µm/px: {plan}"
        return Tiled(arrays, attrs, picture, empty, tuple(notes), reads)


def tile_size_l0(slide: Slide, mpp: float, config: TileConfig) -> tuple[float, float]:
    """Exact size of a tile in level-0 px, (w, h)."""
    mx, my = slide.slide_mpp
    return config.tile_px * mpp / mx, config.tile_px * mpp / my


def unpack_mask(packed: np.ndarray, width: int) -> np.ndarray:
    """The stored `mask` -> bool (H, width)."""
    return np.unpackbits(packed, axis=1, count=width).astype(bool)


def _checked_plan(slide: Slide, mpp: float, config: TileConfig) -> ReadPlan:
    plan = slide.plan_read(mpp, config.tile_px)
    if plan.resize > config.max_upsample:
        raise SlideError(
            f"{slide.path.name}: its finest level has {max(slide.slide_mpp):.4g} µm/px ({slide.mpp_source}), so tiles "
            f"of {mpp:g} µm/px would be enlarged {plan.resize:.2f} times (tile.max_upsample is "
            f"{config.max_upsample:g}): ask for a coarser --mpp, leave the slide out, or raise the limit"
        )
    if config.overlap_um >= config.tile_px * mpp:
        tile_um = config.tile_px * mpp
        raise SlideError(f"tile.overlap_um = {config.overlap_um:g} is not smaller than a tile of {tile_um:g} µm")
    return plan


def _find_tissue(slide: Slide, config: TileConfig) -> _Tissue:
    """Segment at `segment_mpp`; try the second segmenter where the first finds nothing."""
    mx, my = slide.slide_mpp
    _, _, w, h = slide.bounds_l0
    seen_mpp = max(config.segment_mpp, math.sqrt(w * mx * h * my / MAX_IMAGE_PX))
    rgb, image_mpp = slide.image_at(seen_mpp)
    notes = []
    if seen_mpp > config.segment_mpp:
        notes.append(f"a very large slide: tissue is found at {seen_mpp:.3g}, not at {config.segment_mpp:g} µm/px")
    scale = math.sqrt(image_mpp[0] * image_mpp[1])
    sigma = config.smooth_um / scale
    smooth = cv2.GaussianBlur(rgb, (0, 0), sigma) if sigma > 0.3 else rgb
    mask = np.zeros(rgb.shape[:2], bool)
    name = config.segmenter
    names = dict.fromkeys(n for n in (config.segmenter, config.fallback_segmenter) if n)
    for name in names:
        module = lookup.find("extract.tissue", name)
        raw = config.segmenter_params if name == config.segmenter else {}
        mask = module.segment(smooth, scale, lookup.params(module, raw))
        mask = clean(mask, scale, config.close_um, config.min_piece_um2, config.min_hole_um2)
        if mask.any():
            break
    if name != config.segmenter:
        found = "found some" if mask.any() else "found none either"
        notes.append(f"segmenter {config.segmenter} found no tissue; {name} {found}")
    return _Tissue(rgb, mask, image_mpp, name, notes)


def _grid(slide: Slide, tissue: _Tissue, mpp: float, config: TileConfig) -> dict[str, np.ndarray]:
    """`coords` and `tissue` of the tiles of one magnification with at least `min_tissue`."""
    (x, y), size = _axes(slide, mpp, config)
    bx, by = slide.bounds_l0[:2]
    per_px = [m / s for m, s in zip(tissue.mpp, slide.slide_mpp, strict=True)]  # level-0 px per mask px
    share = box_means(
        tissue.mask, (x - bx) / per_px[0], (y - by) / per_px[1], (size[0] / per_px[0], size[1] / per_px[1])
    )  # (Ny, Nx)
    # Rounding of the sums must not lose a tile that lies exactly on the threshold; and no tissue is never a tile.
    row, col = np.nonzero((share >= config.min_tissue - 1e-6) & (share > 0))
    coords = np.stack([x[col], y[row]], axis=1).astype(np.int32)
    return {"coords": coords, "tissue": share[row, col]}


def _axes(slide: Slide, mpp: float, config: TileConfig) -> tuple[tuple[np.ndarray, np.ndarray], tuple[float, float]]:
    """Corners along x and y, and the tile's size, all in level-0 px."""
    size = tile_size_l0(slide, mpp, config)
    x0, y0, w, h = slide.bounds_l0
    step = [s - config.overlap_um / m for s, m in zip(size, slide.slide_mpp, strict=True)]
    return (positions(x0, w, size[0], step[0]), positions(y0, h, size[1], step[1])), size


def _add_parents(arrays: dict[str, np.ndarray], slide: Slide, config: TileConfig) -> None:
    """`parent` for every magnification but the coarsest."""
    by_size = sorted(config.mpp)
    for fine, coarse in itertools.pairwise(by_size):
        (x, y), coarse_size = _axes(slide, coarse, config)
        index = np.full((len(y), len(x)), -1, np.int32)
        kept = arrays["coords" + _suffix(coarse, config)]
        index[np.searchsorted(y, kept[:, 1]), np.searchsorted(x, kept[:, 0])] = np.arange(len(kept))
        centre = arrays["coords" + _suffix(fine, config)] + np.array(tile_size_l0(slide, fine, config)) / 2
        column, inside_x = _holder(x, coarse_size[0], centre[:, 0])
        row, inside_y = _holder(y, coarse_size[1], centre[:, 1])
        parent = np.full(len(centre), -1, np.int32)
        inside = inside_x & inside_y
        parent[inside] = index[row[inside], column[inside]]
        arrays["parent" + _suffix(fine, config)] = parent


def _holder(corners: np.ndarray, size: float, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: index of the interval [corner, corner + size) with the nearest centre, and whether it holds."""
    if not len(corners):
        return np.zeros(len(centre), np.int64), np.zeros(len(centre), bool)
    middle = corners + size / 2
    right = np.clip(np.searchsorted(middle, centre), 0, len(middle) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(centre - middle[left] <= middle[right] - centre, left, right)
    return nearest, (centre >= corners[nearest] - 0.5) & (centre < corners[nearest] + size + 0.5)


def _suffix(mpp: float, config: TileConfig) -> str:
    """What is added to array names: nothing for the main magnification."""
    return "" if mpp == config.mpp[0] else f"_mpp{mpp:g}"


def _attrs(slide: Slide, tissue: _Tissue, mpp: float, plan: ReadPlan, config: TileConfig) -> dict[str, Any]:
    tissue_px = int(np.count_nonzero(tissue.mask))
    return {
        "mpp": mpp,
        "mpp_source": slide.mpp_source,
        "slide_mpp": list(slide.slide_mpp),
        "tile_px": config.tile_px,
        "tile_um": config.tile_px * mpp,
        "tile_l0": list(tile_size_l0(slide, mpp, config)),
        "overlap_um": config.overlap_um,
        "size_l0": list(slide.size_l0),
        "bounds_l0": list(slide.bounds_l0),
        "level": plan.level,
        "read_px": list(plan.read_px),
        "resize": plan.resize,
        "vendor": slide.vendor,
        "quickhash": slide.quickhash,
        "segmenter": tissue.segmenter,
        "tissue_um2": tissue_px * tissue.mpp[0] * tissue.mpp[1],
        "tissue_fraction": tissue_px / tissue.mask.size,
        "mask_mpp": list(tissue.mpp),
        "mask_px": [tissue.mask.shape[1], tissue.mask.shape[0]],
        "mpps": list(config.mpp),
    }


def _why_empty(slide: Slide, tissue: _Tissue, config: TileConfig) -> str:
    tile_um = config.tile_px * config.mpp[0]
    _, _, w, h = slide.bounds_l0
    w_um, h_um = w * slide.slide_mpp[0], h * slide.slide_mpp[1]
    if min(w_um, h_um) < tile_um:
        return f"the slide, {w_um:.0f} x {h_um:.0f} µm, is smaller than one tile of {tile_um:g} µm"
    if not tissue.mask.any():
        tried = " and ".join(dict.fromkeys(n for n in (config.segmenter, config.fallback_segmenter) if n))
        return f"no tissue found ({tried})"
    return f"tissue found, but no tile has {config.min_tissue:.0%} of it (tile.min_tissue)"
