"""Paints one synthetic H&E slide: a plan in µm in, the amounts of two stains per pixel and the truth out.

In: a `SlidePlan` (extent, mpp, tumour size, looks) and a `Library` of textures and nuclei drawn once per mpp. Out: a
`Painting`: uint8 haematoxylin and eosin planes at level 0, and the tissue and tumour maps at `MAP_MPP`. It works in
stain amounts, not colours, so that paleness and tint cost one look-up table later. It knows no file and no label.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from mhim.pipeline.demo.sprites import PERIOD_UM, U8, Library, stamp, u8

MAP_MPP = 4.0  # µm per px of the region maps: fine enough for a border, 1/64 of the work at level 0


@dataclass(frozen=True)
class SlidePlan:
    """What one slide looks like. Sizes in level-0 px or µm as named; `tumour_um2` 0 is a benign slide."""

    seed: int
    width_px: int
    height_px: int
    mpp: float
    tumour_um2: float = 0.0
    hyperchromasia: float = 1.0
    pieces: int = 1
    tissue: bool = True


@dataclass(frozen=True)
class Painting:
    """haema, eosin: uint8 (H, W) at level 0. tissue, tumour: bool (h, w) at MAP_MPP."""

    haema: U8
    eosin: U8
    tissue: np.ndarray
    tumour: np.ndarray


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell_um: float) -> np.ndarray:
    """Smooth aperiodic noise over a map, float32, about unit sd, structures of `cell_um`."""
    step = cell_um / MAP_MPP
    rows, cols = (int(np.ceil(s / step)) + 3 for s in shape)
    grid = rng.standard_normal((rows, cols)).astype(np.float32)
    big = cv2.resize(grid, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
    oy, ox = int(step), int(step)
    return np.asarray(big[oy : oy + shape[0], ox : ox + shape[1]] * 1.3, dtype=np.float32)


@dataclass(frozen=True)
class _Regions:
    """float32 maps at MAP_MPP: positive inside, in units of about 40 µm of depth. labels: which cells live where."""

    tissue: np.ndarray
    tumour: np.ndarray
    fat: np.ndarray
    epithelium: np.ndarray
    lymphoid: np.ndarray
    dense: np.ndarray


def _depth(inside: np.ndarray) -> np.ndarray:
    """Signed distance to the border of a boolean map, float32 in units of 40 µm, clipped to ±3."""
    mask = inside.astype(np.uint8)
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3) - cv2.distanceTransform(1 - mask, cv2.DIST_L2, 3)
    return np.asarray(np.clip(depth * (MAP_MPP / 40.0), -3, 3), dtype=np.float32)


def _largest(score: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest-scoring allowed pixels, as a boolean map: a region of exactly that area."""
    flat = np.where(allowed, score, -np.inf).ravel()
    count = min(count, int(allowed.sum()))
    out = np.zeros(flat.shape, bool)
    if count:
        out[np.argpartition(flat, -count)[-count:]] = True
    return out.reshape(score.shape)


def map_shape(plan: SlidePlan) -> tuple[int, int]:
    """(rows, columns) of the region maps: enough to cover the slide."""
    return -int(-plan.height_px * plan.mpp // MAP_MPP), -int(-plan.width_px * plan.mpp // MAP_MPP)


def _regions(plan: SlidePlan, rng: np.random.Generator) -> _Regions:
    shape = map_shape(plan)
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    body = np.full(shape, -1e3, np.float32)
    for i in range(plan.pieces):
        cx = shape[1] * ((i + 0.5) / plan.pieces + rng.uniform(-0.04, 0.04))
        cy = shape[0] * rng.uniform(0.45, 0.55)
        a, b = shape[1] / plan.pieces * rng.uniform(0.40, 0.47), shape[0] * rng.uniform(0.38, 0.44)
        body = np.maximum(body, 1 - ((x - cx) / a) ** 2 - ((y - cy) / b) ** 2)
    margin = np.minimum(np.minimum(x, shape[1] - x), np.minimum(y, shape[0] - y)) * (MAP_MPP / 60)
    body += 0.20 * _noise(rng, shape, 500) + 0.10 * _noise(rng, shape, 150) + 0.04 * _noise(rng, shape, 40)
    tissue = (np.minimum(body, margin - 1) > 0.12) & plan.tissue
    tears = _noise(rng, shape, 260) + 0.4 * _noise(rng, shape, 60)
    tissue &= tears < 2.35
    if not plan.tissue:
        never = np.full(shape, -3, np.float32)
        return _Regions(never, never, never, never, never, never)
    zones = [_noise(rng, shape, 620) + 0.25 * _noise(rng, shape, 120) for _ in range(3)]
    fat = (zones[0] > 1.1) & (zones[0] > zones[1])
    epithelium = (zones[1] > 0.05) & ~fat
    dense = (zones[2] > 0.5) & ~fat & ~epithelium
    lymphoid = np.zeros(shape, bool)
    for _ in range(int(rng.integers(1, 4))):
        at = np.argwhere(tissue)[rng.integers(int(tissue.sum()))]
        r = rng.uniform(60, 170) / MAP_MPP
        blob = 1 - ((y - at[0]) ** 2 + (x - at[1]) ** 2) / r**2 + 0.3 * _noise(rng, shape, 70)
        lymphoid |= blob > 0.25
    tumour = np.zeros(shape, bool)
    if plan.tumour_um2 > 0:
        radius = np.sqrt(plan.tumour_um2 / np.pi) / MAP_MPP
        deep = cv2.distanceTransform(tissue.astype(np.uint8), cv2.DIST_L2, 3)
        sites = np.argwhere(deep > min(0.6 * radius, 0.7 * float(deep.max())))
        at = sites[rng.integers(len(sites))]
        blob = -np.hypot(y - at[0], x - at[1]) / radius + 0.35 * _noise(rng, shape, max(60.0, radius * MAP_MPP * 0.7))
        tumour = _largest(blob, tissue, round(plan.tumour_um2 / MAP_MPP**2))
    fat &= ~tumour & ~lymphoid
    epithelium &= ~tumour & ~lymphoid
    lymphoid &= ~tumour
    return _Regions(*(_depth(m) for m in (tissue, tumour, fat, epithelium, lymphoid, dense)))


def _points(rng: np.random.Generator, shape: tuple[int, int], pitch_um: float, chance: np.ndarray) -> np.ndarray:
    """Jittered grid points (N, 2) x, y in µm, each kept with its map's chance: dense cells that seldom collide."""
    step = pitch_um / MAP_MPP
    gy, gx = np.mgrid[0 : shape[0] - 1 : step, 0 : shape[1] - 1 : step]
    gy = np.clip(gy + rng.uniform(-0.42, 0.42, gy.shape) * step, 0, shape[0] - 1).ravel()
    gx = np.clip(gx + rng.uniform(-0.42, 0.42, gx.shape) * step, 0, shape[1] - 1).ravel()
    keep = rng.random(len(gx)) < chance[gy.astype(int), gx.astype(int)]
    return np.stack([gx[keep], gy[keep]], 1) * MAP_MPP


def _enlarge(values: np.ndarray, rows_px: tuple[int, int], width_px: int, mpp: float) -> np.ndarray:
    """Some level-0 rows of a map, enlarged bilinearly; seamless from strip to strip."""
    k = round(MAP_MPP / mpp)
    top, bottom = rows_px[0] // k, -(-rows_px[1] // k)
    part = values[np.clip(np.arange(top - 1, bottom + 1), 0, len(values) - 1)]
    big = cv2.resize(part, None, fx=k, fy=k, interpolation=cv2.INTER_LINEAR)
    return np.asarray(big[k : k + rows_px[1] - rows_px[0], :width_px])


def _alpha(
    depth: np.ndarray, rows_px: tuple[int, int], width_px: int, mpp: float, ragged: U8, sharp: float
) -> U8 | None:
    """0..255 coverage at level 0 of a region given by depth, for some rows; its border is roughened by a texture.

    None where the region does not reach these rows.
    """
    k = round(MAP_MPP / mpp)
    if depth[max(0, rows_px[0] // k - 1) : rows_px[1] // k + 2].max() < -1:
        return None
    up = _enlarge(u8(128 + depth * 40), rows_px, width_px, mpp)
    rough = cv2.addWeighted(up, 1.0, ragged, 0.12, -15.4)
    ramp = u8((np.arange(256) - 128) * sharp + 128)
    return np.asarray(cv2.LUT(rough, ramp))


def _mix(below: U8, above: U8, alpha: U8 | None) -> U8:
    """`above` over `below` with a coverage of 0..255; None covers nothing."""
    if alpha is None:
        return below
    rest = cv2.multiply(below, cv2.bitwise_not(alpha), scale=1 / 255)
    return np.asarray(cv2.add(rest, cv2.multiply(above, alpha, scale=1 / 255)))


def _ground(plan: SlidePlan, lib: Library, regions: _Regions, rng: np.random.Generator) -> tuple[U8, U8]:
    """Everything but cells and glands: fibres, cytoplasm, fat, holes. Returns (haema, eosin)."""
    h, w = plan.height_px, plan.width_px
    haema, eosin = np.zeros((h, w), np.uint8), np.zeros((h, w), np.uint8)
    n, m = lib.grain.shape[0], lib.fibre.shape[0]
    thin = n // m  # fibres are wide: drawn at FIBRE_MPP at most, then enlarged
    shape = regions.tissue.shape
    turn = rng.uniform(0, 6.28)
    my, mx = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32) * (MAP_MPP / PERIOD_UM * m)
    bend = np.stack([_noise(rng, shape, 900), _noise(rng, shape, 700)]) * (190 / PERIOD_UM * m)
    where = np.cos(turn) * mx - np.sin(turn) * my + bend[0], np.sin(turn) * mx + np.cos(turn) * my + bend[1]
    wrap_x, wrap_y = (np.asarray(c - m * np.floor(c.min() / m), np.float32) for c in where)
    off = rng.integers(0, n, 4)
    strip = 512
    assert n % strip == 0  # no strip crosses the seam of the texture
    grains = np.tile(np.roll(lib.grain, (-off[0], -off[1]), (0, 1)), (1, -(-w // n)))[:, :w]
    for top in range(0, h, strip):
        rows = (top, min(h, top + strip))
        k = round(MAP_MPP / plan.mpp)
        if regions.tissue[max(0, top // k - 1) : rows[1] // k + 2].max() <= -1:
            continue
        down, across = np.arange(*rows), np.arange(w)
        grain = grains[top % n : top % n + len(down)]
        low = (rows[0] // thin, -(-rows[1] // thin))
        x, y = (_enlarge(c, low, -(-w // thin), plan.mpp * thin) for c in (wrap_x, wrap_y))
        at, column = y.astype(np.int32), x.astype(np.int32)
        at &= m - 1
        at <<= m.bit_length() - 1
        column &= m - 1
        at |= column
        fibre = lib.fibre.ravel().take(at)  # nearest: m is a power of two, 3 times faster than a wrapping remap
        if thin > 1:
            fibre = cv2.resize(fibre, None, fx=thin, fy=thin, interpolation=cv2.INTER_LINEAR)[: len(down), :w]

        def alpha(depth: np.ndarray, sharp: float, rows: tuple[int, int] = rows, grain: U8 = grain) -> U8 | None:
            return _alpha(depth, rows, w, plan.mpp, grain, sharp)

        malignant, fatty, lymphoid = alpha(regions.tumour, 6), alpha(regions.fat, 12), alpha(regions.lymphoid, 4)
        e = _mix(fibre, cv2.addWeighted(fibre, 0.55, fibre, 0, 88), alpha(regions.dense, 6))
        e = _mix(e, cv2.addWeighted(fibre, 0.55, grain, 0.12, 14), alpha(regions.epithelium, 4))
        e = _mix(e, cv2.addWeighted(grain, 0.30, grain, 0, 48), malignant)
        basophil = cv2.addWeighted(grain, 0.22, grain, 0, 14)
        hm = cv2.addWeighted(grain, 0.10, grain, 0, -2)
        hm = _mix(_mix(hm, basophil, malignant), basophil, lymphoid)
        if fatty is not None:
            e = _mix(e, lib.fat[((down + off[2]) % n)[:, None], (across + off[3]) % n], fatty)
            hm = cv2.multiply(hm, cv2.bitwise_not(fatty), scale=1 / 255)
        tissue = alpha(regions.tissue, 14)
        assert tissue is not None  # rows without any were left out above
        haema[rows[0] : rows[1]] = cv2.multiply(hm, tissue, scale=1 / 255)
        eosin[rows[0] : rows[1]] = cv2.multiply(e, tissue, scale=1 / 255)
    return haema, eosin


def paint(plan: SlidePlan, lib: Library) -> Painting:
    """Paint one slide. Deterministic in `plan.seed`; memory is about 3 bytes per level-0 px."""
    rng = np.random.default_rng([plan.seed, 17])
    regions = _regions(plan, rng)
    haema, eosin = _ground(plan, lib, regions, rng)
    shape = regions.tissue.shape
    solid = (regions.tissue > 0.15) & (regions.fat < 0)
    busy = np.zeros(shape, bool)
    for gx, gy in _points(rng, shape, 118, solid & (regions.epithelium > 0.5)):
        gland, quarters = lib.glands[int(rng.integers(len(lib.glands)))], int(rng.integers(4))
        haema_g, eosin_g, alpha_g = (np.ascontiguousarray(np.rot90(p, quarters)) for p in gland)
        x0, y0 = int(gx / plan.mpp) - alpha_g.shape[1] // 2, int(gy / plan.mpp) - alpha_g.shape[0] // 2
        x1, y1 = x0 + alpha_g.shape[1], y0 + alpha_g.shape[0]
        if x0 < 0 or y0 < 0 or x1 > plan.width_px or y1 > plan.height_px:
            continue
        for plane, sprite in ((haema, haema_g), (eosin, eosin_g)):
            plane[y0:y1, x0:x1] = _mix(plane[y0:y1, x0:x1], sprite, alpha_g)
        r = alpha_g.shape[0] * plan.mpp / 2 / 1.3 / MAP_MPP
        my, mx = gy / MAP_MPP, gx / MAP_MPP
        ys, xs = slice(max(0, int(my - r)), int(my + r) + 2), slice(max(0, int(mx - r)), int(mx + r) + 2)
        yy, xx = np.mgrid[ys.start : ys.start + busy[ys, xs].shape[0], xs.start : xs.start + busy[ys, xs].shape[1]]
        busy[ys, xs] |= (yy - my) ** 2 + (xx - mx) ** 2 < r * r
    free = solid & ~busy
    nests = _noise(rng, shape, 70) > -1.1
    malignant = free & (regions.tumour > 0)
    stroma = free & (regions.tumour <= 0) & (regions.lymphoid <= 0)
    inflamed = np.where(stroma, 0.05 + 0.22 * (regions.epithelium > 0), np.where(malignant, 0.06, 0.0))
    cells = (
        ("fibroblast", 13.0, np.where(stroma, 0.33, np.where(malignant & ~nests, 0.6, 0.0)), 1.0),
        ("lymphocyte", 17.0, inflamed, 1.0),
        ("lymphocyte", 7.0, np.where(free & (regions.lymphoid > 0) & (regions.tumour <= 0), 0.93, 0.0), 1.0),
        ("tumour", 12.0, np.where(malignant & nests, 0.93, 0.0), plan.hyperchromasia),
    )
    for kind, pitch_um, chance, dark in cells:
        sprites = lib.nuclei[kind] if dark == 1.0 else [u8(s * dark) for s in lib.nuclei[kind]]
        where = _points(rng, shape, pitch_um, chance) / plan.mpp
        which = rng.integers(0, len(sprites), len(where))
        for (px, py), i in zip(where.astype(int).tolist(), which.tolist(), strict=True):
            stamp(haema, sprites[i], px, py)
    return Painting(haema, eosin, regions.tissue > 0, regions.tumour > 0)
