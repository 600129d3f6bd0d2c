"""What synthetic tissue is painted with: textures, nuclei and glands, drawn once per mpp.

In: a seed and µm per px. Out: a `Library` of uint8 stain amounts. It knows no slide and no map.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

FIBRE_MPP = 0.5  # fibres carry no finer detail
PERIOD_UM = 512.0  # textures repeat after this, and are warped so that no grid shows
U8 = np.ndarray  # uint8 planes throughout this file


@dataclass(frozen=True)
class Library:
    """Textures (uint8, one period) and sprites (uint8 haematoxylin) at one mpp."""

    mpp: float
    fibre: U8
    grain: U8
    fat: U8
    nuclei: dict[str, list[U8]] = field(repr=False)
    glands: list[tuple[U8, U8, U8]] = field(repr=False)


def _periodic_noise(
    rng: np.random.Generator, n: int, low_px: float, high_px: float, stretch: float = 1.0
) -> np.ndarray:
    """Periodic band-pass noise, float32 (n, n) of mean 0 and sd 1, structures `low_px` to `high_px` wide."""
    fx = np.fft.rfftfreq(n)[None, :] * stretch
    fy = np.fft.fftfreq(n)[:, None]
    f = np.sqrt(fx * fx + fy * fy)
    band = np.exp(-((f * low_px) ** 2)) - np.exp(-((f * high_px) ** 2))
    out = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, n))) * band, s=(n, n))
    return np.asarray(out / out.std(), dtype=np.float32)


def u8(values: np.ndarray) -> U8:
    """uint8, cut to 0..255."""
    return np.asarray(np.clip(values, 0, 255), dtype=np.uint8)


def _nucleus(
    rng: np.random.Generator,
    mpp: float,
    long_um: float,
    short_um: float,
    rough: float,
    dark: float,
    coarse: float,
    nucleoli: int,
) -> U8:
    """One nucleus seen through a microscope: a wavy ellipse with chromatin, a rim and nucleoli; uint8 stain."""
    half = int(np.ceil(long_um * 0.65 / mpp)) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32) * mpp
    turn = rng.uniform(0, np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
    angle = np.arctan2(v, u)
    edge = np.ones_like(angle)
    for k in (2, 3, 4, 5):
        edge += rough * rng.normal() / k * np.cos(k * angle + rng.uniform(0, 6.28))
    radius = np.sqrt((u / (long_um / 2)) ** 2 + (v / (short_um / 2)) ** 2) / np.maximum(edge, 0.4)
    inside = np.clip((1.0 - radius) * short_um / (2 * max(mpp, 0.35)) + 0.5, 0, 1)
    clumps = cv2.GaussianBlur(rng.standard_normal(x.shape).astype(np.float32), (0, 0), max(0.5, 0.6 / mpp))
    clumps /= clumps.std() + 1e-6
    stain = dark * (0.82 + 0.18 * np.clip(radius, 0, 1) ** 4) * (1 + coarse * clumps)
    for _ in range(nucleoli):
        a, r = rng.uniform(0, 6.28), rng.uniform(0, 0.25) * short_um
        d2 = (x - r * np.cos(a)) ** 2 + (y - r * np.sin(a)) ** 2
        stain += 70 * np.exp(-d2 / (2 * 0.6**2))
    return u8(stain * inside)


def _nuclei(rng: np.random.Generator, mpp: float, count: int) -> dict[str, list[U8]]:
    """Kinds of nuclei with sizes in µm as a pathologist would measure them."""
    kinds: dict[str, list[U8]] = {"fibroblast": [], "epithelium": [], "lymphocyte": [], "tumour": []}
    for _ in range(count):
        kinds["fibroblast"].append(_nucleus(rng, mpp, rng.uniform(9, 14), rng.uniform(2.2, 3.4), 0.05, 165, 0.06, 0))
        d = rng.uniform(6.5, 8.5)
        kinds["epithelium"].append(_nucleus(rng, mpp, d * 1.12, d * 0.9, 0.04, 138, 0.09, int(rng.random() < 0.3)))
        d = rng.uniform(6.0, 7.2)
        kinds["lymphocyte"].append(_nucleus(rng, mpp, d, d * 0.95, 0.03, 205, 0.08, 0))
        d = rng.uniform(8.0, 13.0)
        long_um, short_um, dark = d * rng.uniform(1.0, 1.35), d * rng.uniform(0.7, 0.95), rng.uniform(150, 215)
        kinds["tumour"].append(_nucleus(rng, mpp, long_um, short_um, 0.16, dark, 0.16, int(rng.integers(0, 3))))
    return kinds


def _gland(rng: np.random.Generator, mpp: float, nuclei: list[U8]) -> tuple[U8, U8, U8]:
    """One benign gland: lumen, columnar cytoplasm, one orderly row of basal nuclei. (haema, eosin, alpha), uint8."""
    outer_um = rng.uniform(38, 62)
    half = int(outer_um * 1.35 / mpp)
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32) * mpp
    turn, flat = rng.uniform(0, np.pi), rng.uniform(0.7, 1.0)
    u, v = x * np.cos(turn) + y * np.sin(turn), (-x * np.sin(turn) + y * np.cos(turn)) / flat
    angle = np.arctan2(v, u)
    wave = [(k, 0.1 * rng.normal() / k, rng.uniform(0, 6.28)) for k in (2, 3, 4)]
    edge = 1 + sum(a * np.cos(k * angle + p) for k, a, p in wave)
    r = np.sqrt(u * u + v * v) / edge
    lumen_um = outer_um - rng.uniform(20, 25)
    alpha = np.clip((outer_um - r) / 1.5, 0, 1)
    wall = np.clip((r - lumen_um) / 1.2, 0, 1)
    streak = 1 + 0.10 * np.cos(angle * outer_um * 0.9)
    haema = u8(34 * wall * streak)
    eosin = u8((70 + 34 * np.clip((outer_um - r) / 22, 0, 1)) * wall * streak)
    spacing_um = 6.2
    for a in np.arange(0, 2 * np.pi, spacing_um / (outer_um * 0.86)):
        at = (outer_um - rng.uniform(5.5, 9.0)) * (1 + sum(m * np.cos(k * a + p) for k, m, p in wave))
        gu, gv = at * np.cos(a), at * np.sin(a) * flat
        gx, gy = gu * np.cos(turn) - gv * np.sin(turn), gu * np.sin(turn) + gv * np.cos(turn)
        stamp(haema, nuclei[int(rng.integers(len(nuclei)))], int(gx / mpp) + half, int(gy / mpp) + half)
    return haema, eosin, u8(alpha * 255)


def build_library(seed: int, mpp: float, small: bool = False) -> Library:
    """All textures and sprites at one mpp; `small` draws fewer sprites (a test's economy)."""
    rng = np.random.default_rng([seed, round(mpp * 1000)])
    n = round(PERIOD_UM / mpp)
    um = 1 / mpp
    long_fibres = _periodic_noise(rng, n, 1.6 * um, 7 * um, stretch=0.12)
    waves = _periodic_noise(rng, n, 40 * um, 160 * um)
    shift = np.mgrid[0:n, 0:n].astype(np.float32)
    map_x, map_y = shift[1], shift[0] + 14 * um * waves
    long_fibres = cv2.remap(long_fibres, map_x % n, map_y % n, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    fine = _periodic_noise(rng, n, 0.5 * um, 2.0 * um)
    fibre = u8(112 + 34 * long_fibres + 8 * fine + 10 * waves)
    fibre = cv2.resize(fibre, None, fx=mpp / FIBRE_MPP, fy=mpp / FIBRE_MPP, interpolation=cv2.INTER_AREA)
    grain = u8(128 + 30 * _periodic_noise(rng, n, 0.8 * um, 3 * um) + 25 * _periodic_noise(rng, n, 5 * um, 16 * um))
    nuclei = _nuclei(rng, mpp, 24 if small else 96)
    glands = [_gland(rng, mpp, nuclei["epithelium"]) for _ in range(6 if small else 20)]
    return Library(mpp, fibre, grain, _fat(rng, n, mpp), nuclei, glands)


def _fat(rng: np.random.Generator, n: int, mpp: float) -> U8:
    """Fat cells: thin pink walls around white, cells about 70 µm wide; uint8 eosin, periodic."""
    from scipy.spatial import cKDTree

    coarse = 256
    points = rng.uniform(0, PERIOD_UM, (int((PERIOD_UM / 62) ** 2), 2))
    tree = cKDTree(points, boxsize=PERIOD_UM)
    grid = np.moveaxis(np.mgrid[0:coarse, 0:coarse], 0, -1).reshape(-1, 2) * (PERIOD_UM / coarse)
    near = tree.query(grid, k=2)[0]
    gap = (near[:, 1] - near[:, 0]).reshape(coarse, coarse).astype(np.float32)
    gap = cv2.resize(gap, (n, n), interpolation=cv2.INTER_CUBIC)
    return u8(125 * np.clip(1.6 - gap / 2.2, 0, 1))


def stamp(plane: U8, sprite: U8, x: int, y: int) -> None:
    """Darken `plane` by `sprite` centred at (x, y), cut at the borders."""
    h, w = sprite.shape
    x0, y0 = x - w // 2, y - h // 2
    cx, cy = max(0, -x0), max(0, -y0)
    part = plane[y0 + cy : y0 + h, x0 + cx : x0 + w]
    if part.size:
        np.maximum(part, sprite[cy : cy + part.shape[0], cx : cx + part.shape[1]], out=part)
