"""One slide -> its tiles: tissue, grid, artefact fractions, overlay.

In: a path and the validated settings. Out: a `Tiled` value of arrays and plain attributes; writes no file of the
store. Knows nothing of cohorts, resumption or file layouts. The same slide and settings give the same bytes.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mhim.configs import lookup
from mhim.configs.schema import TileConfig
from mhim.extract import SlideError, memory
from mhim.extract.images import encoded
from mhim.extract.slide.slide import ReadPlan, Slide, open_slide, squared
from mhim.extract.tiles import artefacts, overlay, regions
from mhim.extract.tiles.clean import clean
from mhim.extract.tiles.grid import Grid, box_means
from mhim.extract.tissue.stain import background
from mhim.extract.units import Microns, Mpp

# The tissue image is held to so many px, which bounds the memory of a slide of any size: 110 MB at 1.6 million px, 180
# at 5 million. Those are 20 x 16 mm at 8 µm/px; what is larger is segmented coarser, and says so.
MAX_IMAGE_PX = 5_000_000
ARTEFACTS = ("pen", "fold", "haze", "blur")
_WARN_DROPPED = 0.5
_PROBE_PX, _PROBE_MPP = 128, 1.0
# Sharpness of real scans at 1 µm/px: 1.1 to 2.8; the same blurred by 1 µm: 0.35 to 0.6, by 2 µm: 0.2 to 0.27.
_SHARP, _BLURRED = 0.6, 0.3

cv2.setNumThreads(1)  # slides run in parallel processes; threads inside each only fight for the cores


@dataclass(frozen=True)
class Tiled:
    """The tiles of one slide.

    arrays: `coords` int32 (N, 2), level-0 px of the top-left corners, x then y, row by row; float32 (N,), fractions of
        each tile: `tissue`, `pen`, `fold`, `haze`, and `blur` (0 sharp .. 1 out of focus, at the nearest probe);
        `mask` uint8 (H, ceil(W / 8)), the tissue mask, 8 px a byte (`unpack_mask`). Where thresholds dropped tiles, the
        same under `all_...` for every tissue tile. Further magnifications have the name plus `_mpp<value>`; `parent`
        int32 (N,) is the row of the tile of the next coarser magnification that holds this tile's centre, -1 for none.
    attrs: plain JSON values: resolution, geometry and how the tiles were made; `tile_l0`, `level`, `read_px`, `resize`
        of further magnifications with the same suffix. No path, host or time.
    overlay: uint8 (h, w, 3) or None. empty: why there is no tile, or None. notes: warnings. reads: how a tile is read.
    """

    arrays: dict[str, np.ndarray]
    attrs: dict[str, Any]
    overlay: np.ndarray | None
    empty: str | None
    notes: tuple[str, ...] = ()
    reads: str = ""


@dataclass(frozen=True)
class _Seen:
    """What the low-resolution image shows. Masks are bool (H, W); mpp: µm per px of them, (x, y). regions: what was
    drawn, in words, if anything; had_tissue: whether there was tissue before that was applied."""

    rgb: np.ndarray
    mask: np.ndarray
    mpp: tuple[Mpp, Mpp]
    segmenter: str
    spoiled: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    regions: str = ""
    had_tissue: bool = False

    def per_px(self, slide_mpp: tuple[float, float]) -> tuple[float, float]:
        """Level-0 px per px of the masks, (x, y)."""
        return self.mpp[0] / slide_mpp[0], self.mpp[1] / slide_mpp[1]


def tile_slide(
    path: Path,
    config: TileConfig,
    mpp: float | None = None,
    regions: Path | None = None,
    tiles_out: Path | None = None,
    private: Path | None = None,
) -> Tiled:
    """Segment and tile one slide.

    mpp: the manifest's µm per px for it. regions: a file of regions that edit the tissue. tiles_out: folder for the
    tile images when `config.save_tiles` asks for them; they are collected in the folder `private` on the same disk
    (default: beside it) and renamed when complete. Raises SlideError (unreadable, no mpp, too coarse, bad regions).
    """
    memory.keep_freed()  # each slide needs the same planes again: a sixth of its time went into faulting them in
    with open_slide(path, mpp, config, file_tiles=True) as slide:
        plans = {m: _checked_plan(slide, m, config) for m in map(Mpp, config.mpp)}
        seen = find_tissue(slide, config, regions)
        grid = Grid(slide.bounds_l0, slide.slide_mpp, config.tile_px, Microns(config.overlap_um))
        arrays: dict[str, np.ndarray] = {"mask": np.packbits(seen.mask, axis=1)}
        probes: tuple[np.ndarray, np.ndarray] | None = None
        for m in map(Mpp, config.mpp):
            tiles = _tiles(slide, seen, grid, m, config)
            centres = tiles["coords"] + np.array(grid.tile_l0(m)) / 2
            if probes is None and len(centres):  # of the main magnification, for all of them
                probes = _probe(slide, centres, tiles["tissue"], config)
            tiles["blur"] = _at_nearest(centres, *probes) if probes else np.zeros(len(centres), np.float32)
            arrays |= {name + _suffix(m, config.mpp): a for name, a in tiles.items()}
        attrs = _attrs(slide, seen, grid, plans, config)
        filtered = refilter(arrays, attrs, config)
        picture = _picture(seen, slide, grid, filtered.arrays["coords"], config) if config.overlay else None
        if config.save_tiles != "none" and tiles_out is not None:
            _save_tiles(slide, filtered.arrays["coords"], config, tiles_out, private)
        notes = (*slide.notes, *seen.notes, *filtered.notes)
        reads = "; ".join(f"{m:g} µm/px: {plan}" for m, plan in plans.items())
        return Tiled(filtered.arrays, attrs, picture, filtered.empty, notes, reads)


def drawn_again(
    path: Path, config: TileConfig, mpp: float | None, arrays: Mapping[str, np.ndarray], attrs: dict[str, Any]
) -> np.ndarray:
    """The overlay of a slide that is tiled, from what was stored: uint8 (h, w, 3). Raises SlideError.

    arrays, attrs: of a `Tiled`. mpp: the manifest's µm per px for the slide."""
    with open_slide(path, mpp, config) as slide:
        rgb, image_mpp = slide.image_at(Mpp(config.segment_mpp), MAX_IMAGE_PX)
        seen = _Seen(rgb, unpack_mask(arrays["mask"], rgb.shape[1]), image_mpp, "")
        grid = Grid(slide.bounds_l0, slide.slide_mpp, config.tile_px, Microns(config.overlap_um))
        return _picture(seen, slide, grid, arrays["coords"], config)


def refilter(arrays: Mapping[str, np.ndarray], attrs: dict[str, Any], config: TileConfig) -> Tiled:
    """Apply the thresholds `max_pen`, `max_fold`, `max_haze`, `max_blur` to what a tiling stored, without the slide.

    arrays, attrs: of a `Tiled`, filtered or not, in any order. Pure; the result has no overlay.
    """
    mpps = [Mpp(float(m)) for m in attrs["mpps"]]
    out = {"mask": np.asarray(arrays["mask"])}
    notes: list[str] = []
    dropped = 0
    for m in mpps:
        end = _suffix(m, mpps)
        names = ("coords", "tissue", *ARTEFACTS)
        full = {n: np.asarray(arrays.get(f"all_{n}{end}", arrays[n + end])) for n in names}
        keep = np.ones(len(full["coords"]), bool)
        limits = {"pen": config.max_pen, "fold": config.max_fold, "haze": config.max_haze, "blur": config.max_blur}
        by = {name: full[name] > limit for name, limit in limits.items()}
        for too_much in by.values():
            keep &= ~too_much
        out |= {n + end: a[keep] for n, a in full.items()}
        if not keep.all():
            out |= {f"all_{n}{end}": a for n, a in full.items()}
        if not end:
            dropped = int(np.count_nonzero(~keep))
            if dropped > _WARN_DROPPED * len(keep):
                most = ", ".join(f"{name} {np.count_nonzero(b)}" for name, b in by.items() if b.any())
                notes.append(
                    f"the artefact thresholds drop {dropped} of {len(keep)} tissue tiles ({most}): look at the "
                    "overlay, and raise tile.max_* if the tissue is good"
                )
    geometry = Grid(_four(attrs["bounds_l0"]), _two(attrs["slide_mpp"]), attrs["tile_px"], Microns(attrs["overlap_um"]))
    for fine, coarse in itertools.pairwise(sorted(mpps)):
        ends = _suffix(fine, mpps), _suffix(coarse, mpps)
        out["parent" + ends[0]] = geometry.parents(out["coords" + ends[0]], fine, out["coords" + ends[1]], coarse)
    empty = None
    if not len(out["coords"]):
        empty = attrs["no_tiles_because"]
        if dropped:
            empty = f"all {dropped} tissue tiles exceed the thresholds tile.max_pen, max_fold, max_haze, max_blur"
    return Tiled(out, dict(attrs), None, empty, tuple(notes))


def unpack_mask(packed: np.ndarray, width: int) -> np.ndarray:
    """The stored `mask` -> bool (H, width)."""
    return np.unpackbits(np.asarray(packed), axis=1, count=width).astype(bool)


def find_tissue(slide: Slide, config: TileConfig, regions_file: Path | None = None) -> _Seen:
    """Segment at `segment_mpp`, trying the second segmenter where the first finds nothing; artefacts; drawn regions."""
    rgb, image_mpp = slide.image_at(Mpp(config.segment_mpp), MAX_IMAGE_PX)
    notes = []
    scale = math.sqrt(image_mpp[0] * image_mpp[1])
    if scale > 1.5 * config.segment_mpp and scale > 1.5 * max(slide.slide_mpp):
        notes.append(f"a very large slide: tissue is found at {scale:.3g}, not at {config.segment_mpp:g} µm/px")
    sigma = config.smooth_um / scale
    smooth = cv2.GaussianBlur(rgb, (0, 0), sigma) if sigma > 0.3 else rgb
    ground = background(rgb)
    od = artefacts.densities(rgb, ground)
    ink = artefacts.pen(od, scale)
    bare_ink = artefacts.ink_on_glass(od, ink)
    del od  # 3 bytes a px that the segmenter needs more; they are made again in a few ms
    mask = np.zeros(rgb.shape[:2], bool)
    name = config.segmenter
    for name in _segmenters(config):
        module = lookup.find("mhim.extract.tissue", name)
        raw = config.segmenter_params if name == config.segmenter else {}
        params = lookup.params(module, raw)
        mask = module.segment(smooth, scale, params)
        if hasattr(module, "notes"):
            notes += module.notes(params, scale)
        mask &= ~bare_ink
        mask = clean(mask, scale, config.close_um, config.min_piece_um2, config.min_hole_um2)
        if mask.any():
            break
    del smooth  # 3 bytes a px that the artefacts need more
    if name != config.segmenter:
        found = "found some" if mask.any() else "found none either"
        notes.append(f"segmenter {config.segmenter} found no tissue; {name} {found}")
    od = artefacts.densities(rgb, ground)
    spoiled = {"pen": ink, "fold": artefacts.folds(od, mask, scale), "haze": artefacts.haze(od, scale)}
    seen = _Seen(rgb, mask, image_mpp, name, spoiled, notes)
    if regions_file is None:
        return seen
    drawn = regions.read(regions_file, slide.bounds_l0[:2], config.regions_frame)
    notes += drawn.notes
    left = regions.apply(mask, drawn, slide.bounds_l0, seen.per_px(slide.slide_mpp))
    what = f"the regions of {regions_file.name} ({drawn})"
    return _Seen(rgb, left, image_mpp, f"{name} + regions", spoiled, notes, what, bool(mask.any()))


def _segmenters(config: TileConfig) -> list[str]:
    return list(dict.fromkeys(n for n in (config.segmenter, config.fallback_segmenter) if n))


def _checked_plan(slide: Slide, mpp: Mpp, config: TileConfig) -> ReadPlan:
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


def _tiles(slide: Slide, seen: _Seen, grid: Grid, mpp: Mpp, config: TileConfig) -> dict[str, np.ndarray]:
    """`coords` and the fractions of the tiles of one magnification with at least `min_tissue`."""
    x, y = grid.axes(mpp)
    per_px = seen.per_px(slide.slide_mpp)
    w, h = grid.tile_l0(mpp)
    at = ((x - slide.bounds_l0[0]) / per_px[0], (y - slide.bounds_l0[1]) / per_px[1], (w / per_px[0], h / per_px[1]))
    share = box_means(seen.mask, *at)  # (Ny, Nx)
    # Rounding of the sums must not lose a tile that lies exactly on the threshold; and no tissue is never a tile.
    row, col = np.nonzero((share >= config.min_tissue - 1e-6) & (share > 0))
    out = {"coords": np.stack([x[col], y[row]], axis=1).astype(np.int32), "tissue": share[row, col]}
    for name, bad in seen.spoiled.items():
        out[name] = box_means(bad, *at)[row, col] if bad.any() else np.zeros(len(row), np.float32)
    return out


def _probe(
    slide: Slide, centre: np.ndarray, tissue: np.ndarray, config: TileConfig
) -> tuple[np.ndarray, np.ndarray] | None:
    """Where focus was measured, float (P, 2) in level-0 px, and float32 (P,): 0 sharp .. 1 out of focus. None: nowhere.

    One probe per square of `blur_probe_um`: the middle of its tile with most tissue. Focus fails over millimetres, so
    reading one spot in 4 mm² finds what a low-resolution image cannot show, at a hundredth of the cost of all tiles.
    """
    coarsest = max(slide.slide_mpp)
    if config.blur_probe_um == 0 or coarsest > _PROBE_MPP * 1.5:
        return None  # beyond 1.5 µm/px focus cannot be told from the scanner's own softness
    mpp = Mpp(max(_PROBE_MPP, coarsest))
    square = np.floor(centre * np.array(slide.slide_mpp) / config.blur_probe_um).astype(np.int64)
    order = np.lexsort((-tissue, square[:, 0], square[:, 1]))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(square[order], axis=0) != 0).any(axis=1)
    probes = order[first]
    half_l0 = [_PROBE_PX * mpp / m / 2 for m in slide.slide_mpp]
    values = []
    for i in probes:
        corner = np.rint(centre[i] - half_l0).astype(int).tolist()
        rgb = slide.read_region(corner[0], corner[1], _PROBE_PX, mpp)
        values.append((_SHARP - artefacts.sharpness(rgb)) / (_SHARP - _BLURRED))
    return centre[probes], np.clip(np.array(values), 0.0, 1.0).astype(np.float32)


def _at_nearest(centre: np.ndarray, where: np.ndarray, value: np.ndarray) -> np.ndarray:
    """float32 (N,): for each of `centre` (N, 2) the `value` (P,) of the nearest of `where` (P, 2)."""
    out = np.zeros(len(centre), np.float32)
    for start in range(0, len(centre), 512):  # (512, P) distances at a time
        some = centre[start : start + 512]
        distance = ((some[:, None, :] - where[None]) ** 2).sum(axis=2)
        out[start : start + 512] = value[distance.argmin(axis=1)]
    return out


def _picture(seen: _Seen, slide: Slide, grid: Grid, coords_l0: np.ndarray, config: TileConfig) -> np.ndarray:
    rgb, mpp = squared(seen.rgb, seen.mpp)
    mask = seen.mask
    if mask.shape != rgb.shape[:2]:
        mask = cv2.resize(mask.astype(np.uint8), rgb.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
    per_px = np.array(mpp) / slide.slide_mpp
    corners = (coords_l0 - np.array(slide.bounds_l0[:2])) / per_px
    w, h = (np.array(grid.tile_l0(Mpp(config.mpp[0]))) / per_px).tolist()
    return overlay.draw(rgb, mask, corners, (w, h))


def saved_again(
    path: Path,
    config: TileConfig,
    mpp: float | None,
    coords_l0: np.ndarray,
    folder: Path,
    private: Path | None = None,
) -> None:
    """Make the images in `folder` those of the tiles at `coords_l0`, after other thresholds: dropped ones are deleted,
    and only where tiles came back is the slide opened. Raises SlideError."""
    wanted = {f"{x}_{y}.{config.save_tiles}": (x, y) for x, y in coords_l0.tolist()}
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    missing = [xy for name, xy in wanted.items() if name not in there]
    if missing:
        with open_slide(path, mpp, config, file_tiles=True) as slide:
            _save_tiles(slide, coords_l0, config, folder, private)
        return
    for name in there - set(wanted):
        (folder / name).unlink()


def _save_tiles(slide: Slide, coords_l0: np.ndarray, config: TileConfig, folder: Path, private: Path | None) -> None:
    """The main magnification's tiles as `<x>_<y>.jpg|png` (level-0 px), written aside and renamed when complete."""
    aside = private or folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    quality = 90 if config.save_tiles == "jpg" else None
    try:
        for x, y in coords_l0.tolist():
            rgb = slide.read_region(x, y, config.tile_px, Mpp(config.mpp[0]))
            data = encoded(rgb, f".{config.save_tiles}", quality)
            (aside / f"{x}_{y}.{config.save_tiles}").write_bytes(data)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _suffix(mpp: float, mpps: Sequence[float]) -> str:
    """What is added to array names: nothing for the main magnification."""
    return "" if mpp == mpps[0] else f"_mpp{mpp:g}"


def _attrs(slide: Slide, seen: _Seen, grid: Grid, plans: dict[Mpp, ReadPlan], config: TileConfig) -> dict[str, Any]:
    tissue_px = int(np.count_nonzero(seen.mask))
    mpp = config.mpp[0]
    reading: dict[str, Any] = {}
    for m, plan in plans.items():
        end = _suffix(m, config.mpp)
        reading |= {f"tile_l0{end}": list(grid.tile_l0(m)), f"level{end}": plan.level}
        reading |= {f"read_px{end}": list(plan.read_px), f"resize{end}": plan.resize}
    return {
        "mpp": mpp,
        "mpp_source": slide.mpp_source,
        "slide_mpp": list(slide.slide_mpp),
        "tile_px": config.tile_px,
        "tile_um": config.tile_px * mpp,
        "overlap_um": config.overlap_um,
        "size_l0": list(slide.size_l0),
        "bounds_l0": list(slide.bounds_l0),
        **reading,
        "vendor": slide.vendor,
        "quickhash": slide.quickhash,
        "segmenter": seen.segmenter,
        "tissue_um2": tissue_px * seen.mpp[0] * seen.mpp[1],
        "tissue_fraction": tissue_px / seen.mask.size,
        "mask_mpp": list(seen.mpp),
        "mask_px": [seen.mask.shape[1], seen.mask.shape[0]],
        "mpps": list(config.mpp),
        "no_tiles_because": _why_empty(slide, seen, config),
    }


def _why_empty(slide: Slide, seen: _Seen, config: TileConfig) -> str:
    """The reason there would be, were there no tile."""
    tile_um = config.tile_px * config.mpp[0]
    _, _, w, h = slide.bounds_l0
    w_um, h_um = w * slide.slide_mpp[0], h * slide.slide_mpp[1]
    if min(w_um, h_um) < tile_um:
        return f"the slide, {w_um:.0f} x {h_um:.0f} µm, is smaller than one tile of {tile_um:g} µm"
    if not seen.mask.any():
        if seen.regions and seen.had_tissue:
            return f"tissue found, but nothing of it is left by {seen.regions}"
        return f"no tissue found ({' and '.join(_segmenters(config))})"
    left = f" that is left by {seen.regions}" if seen.regions else ""
    return f"tissue found, but no tile has {config.min_tissue:.0%} of it{left} (tile.min_tissue)"


def _two(values: list[float]) -> tuple[Mpp, Mpp]:
    return Mpp(values[0]), Mpp(values[1])


def _four(values: list[int]) -> tuple[int, int, int, int]:
    return values[0], values[1], values[2], values[3]
