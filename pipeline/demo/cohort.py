"""The synthetic cohort of `pipeline demo`: which slides there are, their labels, their truth, and the cases that break.

In: a folder and a seed. Out: `slides/*.svs` (Aperio-style pyramids that OpenSlide opens), `labels.csv` with the class
and the tumour's share of the tissue, `clinical.csv` with made-up patients, and `truth/` with the planted tumour and the
tissue. The same seed gives the same bytes. Each look (resolution, size, stain, pen, site) is given to one benign and
one tumour slide, so that nothing but the tumour itself tells the label.
It knows how a slide is written, not how its tissue is painted (`tissue.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from mhim.configs.processes import usable_cores
from mhim.extract.tiles import geojson
from mhim.pipeline.demo.sprites import Library, build_library
from mhim.pipeline.demo.tissue import MAP_MPP, Painting, SlidePlan, map_shape, paint
from mhim.pipeline.store import tables, writing

TILE_PX = 256
DOWNSAMPLES = (1, 4, 16)
JPEG_QUALITY = 72
NO_TISSUE, NO_MPP, TRUNCATED = "no_tissue.svs", "no_mpp.svs", "truncated.svs"
LABELS = ("benign", "tumour")
SHARE = "tumour_share"  # the column of labels.csv with the second target, 0 to 1
TUMOUR_UM2 = (2.4e6, 4.5e5, 7.5e4, 9.0e5, 1.6e6, 2.5e5)  # large to a few tiles only (a 128 µm tile is 1.6e4)


@dataclass(frozen=True)
class Look:
    """Stain and optics of a site. haema_od, eosin_od: absorbance per channel (R, G, B) at full stain; white: 0..255."""

    haema_od: tuple[float, float, float]
    eosin_od: tuple[float, float, float]
    white: tuple[float, float, float]
    site: str


LOOKS = (
    Look((1.14, 1.23, 0.51), (0.10, 0.90, 0.29), (243, 243, 243), "north"),
    Look((1.22, 1.16, 0.62), (0.06, 0.74, 0.42), (246, 241, 233), "south"),  # warm: more red, yellowish glass
    Look((0.72, 0.76, 0.32), (0.07, 0.52, 0.18), (240, 242, 245), "west"),  # pale: half the stain, cold glass
)


@dataclass(frozen=True)
class DemoSlide:
    """One slide of the cohort, as planned."""

    name: str
    patient: str
    label: int
    plan: SlidePlan
    look: Look
    pen: bool


@dataclass(frozen=True)
class Truth:
    """tissue, tumour: bool (h, w) maps at `mpp` µm per px, aligned with the slide's top-left corner."""

    tissue: np.ndarray
    tumour: np.ndarray
    mpp: float
    slide_mpp: float


def plan_cohort(seed: int = 7, n: int = 32, small: bool = False) -> list[DemoSlide]:
    """The labelled slides in order of their names, then the three broken ones.

    `n` is rounded up to even. `small`: slides of 1.5 mm for tests instead of 3 to 5 mm.
    """
    half = max(1, (n + 1) // 2)
    order = np.random.default_rng([seed, 1]).permutation(2 * half)
    slides = []
    for t in range(half):
        fine = t % 3 == 0
        width_px, height_px = (12288, 9216) if fine else (10240 + 1024 * (t % 2), 5632)
        if small:
            width_px, height_px = (5888, 4096) if fine else (2944, 2048)
        patient_of_class = t - (t % 8 in (1, 5))  # templates 1 and 5 of eight are the second slide of the one before
        for label in (0, 1):
            number = int(order[2 * t + label]) + 1
            area_um2 = TUMOUR_UM2[t % len(TUMOUR_UM2)] / (5 if small else 1)
            plan = SlidePlan(
                seed=seed * 1000 + 2 * t + label,
                width_px=width_px + 17 * (t % 4),
                height_px=height_px + 13 * (t % 5),
                mpp=0.25 if fine else 0.5,
                tumour_um2=area_um2 if label else 0.0,
                hyperchromasia=0.74 if t % 6 in (3, 5) else 1.0,
                pieces=1 + (t % 4 == 2),
            )
            patient = f"P{int(order[2 * patient_of_class + label]) + 1:02d}"
            slides.append(DemoSlide(f"case_{number:02d}.svs", patient, label, plan, LOOKS[(t // 2) % 3], t % 4 == 1))
    slides.sort(key=lambda s: s.name)
    plain = SlidePlan(seed * 1000 + 900, 2944 if small else 10240, 2048, 0.5)
    broken = [f"P{max(90, 2 * half + 1) + k}" for k in range(3)]
    slides.append(DemoSlide(NO_TISSUE, broken[0], 0, replace(plain, tissue=False), LOOKS[0], True))
    slides.append(DemoSlide(NO_MPP, broken[1], 0, replace(plain, seed=seed * 1000 + 901), LOOKS[0], False))
    cut = replace(plain, seed=seed * 1000 + 902, tumour_um2=3e5 / (5 if small else 1))
    slides.append(DemoSlide(TRUNCATED, broken[2], 1, cut, LOOKS[1], False))
    return slides


def make_cohort(folder: Path, seed: int = 7, n: int = 32, small: bool = False, workers: int = 0) -> Path:
    """Write the cohort into `folder`: slides/, truth/, clinical.csv and labels.csv, whose path is returned.

    A slide that is already there is kept (it was renamed into place complete), so an interrupted run goes on.
    workers: threads, 0 is one per core; about 400 MB each at full size.
    """
    slides = plan_cohort(seed, n, small)
    for name in ("slides", "truth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    stamp = json.dumps({"seed": seed, "n": n, "small": small, "version": 1}, sort_keys=True)
    marker = folder / "truth" / "cohort.json"
    fresh = not marker.exists() or json.loads(marker.read_text())["made_from"] != json.loads(stamp)
    known = {
        "made_from": json.loads(stamp),
        "mpp": MAP_MPP,
        "slides": {s.name: {"slide_mpp": s.plan.mpp, "tumour_um2": s.plan.tumour_um2} for s in slides},
    }
    if fresh:  # another cohort's slides must not pass for this one's
        for slide in slides:
            (folder / "slides" / slide.name).unlink(missing_ok=True)
    marker.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    # threads: almost all of the work is OpenCV's and NumPy's, which let go of the lock; processes were not faster
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        for done in [pool.submit(_make_slide, folder, s, seed, small) for s in slides]:
            done.result()
    share = tumour_shares(folder, slides)
    rows = ([s.name, s.patient, LABELS[s.label], f"{share[s.patient]:.4f}", s.look.site] for s in slides)
    (folder / "labels.csv").write_text(tables.text_of(("slide", "patient", "label", SHARE, "site"), rows))
    (folder / "clinical.csv").write_text(clinical(share, seed))
    return folder / "labels.csv"


def tumour_shares(folder: Path, slides: Sequence[DemoSlide]) -> dict[str, float]:
    """Patient -> the share of the tissue on all painted slides of the patient that is planted tumour."""
    area: dict[str, np.ndarray] = {}
    for slide in slides:
        truth = read_truth(folder, slide.name)
        area[slide.patient] = area.get(slide.patient, 0) + np.array([truth.tumour.sum(), truth.tissue.sum()])
    return {patient: float(tumour / max(tissue, 1)) for patient, (tumour, tissue) in area.items()}


def clinical(share: Mapping[str, float], seed: int) -> str:
    """A table of made-up patients: a marker that the tumour sheds (`share`: patient -> the tumour's share of the
    tissue), an age that leans a little with it, a sex that does not, and a few empty cells."""
    rng = np.random.default_rng(seed)
    rows: list[list[object]] = []
    for patient, of in sorted(share.items()):
        age, marker = 62 + 5 * (of > 0) + rng.normal(0, 8), np.exp(1 + 2.5 * np.sqrt(of) + rng.normal(0, 0.25))
        sex, empty = str(rng.choice(["female", "male"])), rng.random(2)
        rows.append([patient, "" if empty[0] < 0.15 else round(age), sex, "" if empty[1] < 0.15 else round(marker, 2)])
    return tables.text_of(("patient", "age", "sex", "marker"), rows)


@lru_cache(maxsize=4)
def _library(seed: int, mpp: float, small: bool) -> Library:
    return build_library(seed, mpp, small)


def _make_slide(folder: Path, slide: DemoSlide, seed: int, small: bool) -> None:
    path, truth = folder / "slides" / slide.name, folder / "truth" / f"{slide.name}.png"
    if path.exists() and truth.exists():
        _draw_truth(folder, slide)
        return
    picture = paint(slide.plan, _library(seed, slide.plan.mpp, small))
    levels = np.where(picture.tumour, 255, np.where(picture.tissue, 128, 0)).astype(np.uint8)
    aside = path.with_name(f".{path.name}.part")
    write_slide(aside, picture, slide, mpp_in_file=slide.name != NO_MPP)
    if slide.name == TRUNCATED:
        with aside.open("r+b") as file:
            file.truncate(int(aside.stat().st_size * 0.55))
    cv2.imwrite(str(truth), levels)
    aside.replace(path)
    _draw_truth(folder, slide)


def _draw_truth(folder: Path, slide: DemoSlide) -> None:
    """The planted tumour as regions, which `score --truth` reads: `truth/<slide>.geojson`."""
    levels = cv2.imread(str(folder / "truth" / f"{slide.name}.png"), cv2.IMREAD_GRAYSCALE)
    if levels is None:
        return  # damaged: told by `read_truth`
    scale = MAP_MPP / slide.plan.mpp
    drawn = geojson.tissue_features(levels > 192, (scale, scale), "Tumor")
    writing.write_atomic(folder / "truth" / f"{slide.name}.geojson", geojson.dumps(drawn, say_frame=True))


def write_slide(path: Path, picture: Painting, slide: DemoSlide, mpp_in_file: bool = True) -> None:
    """Write a painting as a pyramidal, tiled JPEG TIFF with Aperio's description (and its mpp, if wanted)."""
    import tifffile

    plan = slide.plan
    power = f"|AppMag = {round(10 / plan.mpp)}|MPP = {plan.mpp}" if mpp_in_file else ""
    with tifffile.TiffWriter(path) as tif:
        below: np.ndarray | None = None
        for level, down in enumerate(DOWNSAMPLES):
            w, h = plan.width_px // down, plan.height_px // down
            tiles: Iterator[bytes]
            if level == 0:
                below = np.empty((h // 4 + 64, w // 4 + 64, 3), np.uint8)
                tiles = _full_tiles(picture, slide, below)
                size = f"{w}x{h} [0,0 {w}x{h}] ({TILE_PX}x{TILE_PX}) JPEG/RGB Q={JPEG_QUALITY}"
            else:
                assert below is not None
                if level == 2:
                    below = cv2.resize(below[: h * 4, : w * 4], (w, h), interpolation=cv2.INTER_AREA)
                tiles = _cut(below[:h, :w])
                size = f"{plan.width_px}x{plan.height_px} -> {w}x{h} ({TILE_PX}x{TILE_PX}) JPEG/RGB Q={JPEG_QUALITY}"
            tif.write(
                tiles,
                shape=(h, w, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                compression="jpeg",
                subsampling=(2, 2),
                subfiletype=0 if level == 0 else 1,
                software=False,
                description=f"Aperio Image Library v12.0.0 \r\n{size}{power}|Synthetic = demo",
                metadata=None,
            )


def _jpeg(rgb: np.ndarray) -> bytes:
    import imagecodecs

    return bytes(
        imagecodecs.jpeg8_encode(rgb, level=JPEG_QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling="420")
    )


def _cut(rgb: np.ndarray) -> Iterator[bytes]:
    """JPEG tiles of an image in row order; the last ones are filled up by repeating the border."""
    h, w = rgb.shape[:2]
    for y in range(0, h, TILE_PX):
        for x in range(0, w, TILE_PX):
            part = rgb[y : y + TILE_PX, x : x + TILE_PX]
            grow = ((0, TILE_PX - part.shape[0]), (0, TILE_PX - part.shape[1]), (0, 0))
            yield _jpeg(np.ascontiguousarray(np.pad(part, grow, mode="edge")))


def _tables(od: tuple[float, float, float], white: tuple[float, float, float]) -> list[np.ndarray]:
    """Per channel a 256-entry table: stain amount -> light that passes (Beer-Lambert)."""
    amount = np.arange(256) / 255.0
    return [np.clip(np.rint(w * np.exp(-k * amount)), 0, 255).astype(np.uint8) for k, w in zip(od, white, strict=True)]


def _full_tiles(picture: Painting, slide: DemoSlide, quarter: np.ndarray) -> Iterator[bytes]:
    """JPEG tiles of level 0; fills `quarter` (the next level) on the way.

    The light differs from tile to tile by up to 3 %, as in stitched scans; an empty tile is encoded once per light.
    """
    plan, look = slide.plan, slide.look
    rng = np.random.default_rng([plan.seed, 23])
    rows, cols = -(-plan.height_px // TILE_PX), -(-plan.width_px // TILE_PX)
    light = cv2.resize(rng.uniform(-1, 1, (4, 4)).astype(np.float32), (cols, rows), interpolation=cv2.INTER_CUBIC)
    lamp = np.clip(np.rint(light * 3.5 + 0.4 * rng.standard_normal((rows, cols))), -4, 4).astype(int)
    haema_tables = _tables(look.haema_od, (255, 255, 255))
    ink, ink_od = _pen(plan, rng) if slide.pen else (None, (0.0, 0.0, 0.0))
    empty: dict[int, bytes] = {}
    q = TILE_PX // 4
    for r in range(rows):
        for c in range(cols):
            at = np.s_[r * TILE_PX : (r + 1) * TILE_PX, c * TILE_PX : (c + 1) * TILE_PX]
            haema, eosin = picture.haema[at], picture.eosin[at]
            level = int(lamp[r, c])
            white = tuple(min(254.0, v + level * 1.5) for v in look.white)
            inked = None if ink is None else _ink_of_tile(ink, r, c, plan)
            to = np.s_[r * q : (r + 1) * q, c * q : (c + 1) * q]
            if inked is None and not eosin.any() and not haema.any():
                if level not in empty:
                    empty[level] = _jpeg(np.full((TILE_PX, TILE_PX, 3), np.rint(white), np.uint8))
                quarter[to] = np.rint(white)
                yield empty[level]
                continue
            if haema.shape != (TILE_PX, TILE_PX):
                grow = ((0, TILE_PX - haema.shape[0]), (0, TILE_PX - haema.shape[1]))
                haema, eosin = np.pad(haema, grow, mode="edge"), np.pad(eosin, grow, mode="edge")
            eosin_tables = _tables(look.eosin_od, white)  # type: ignore[arg-type]
            planes = [
                cv2.multiply(cv2.LUT(haema, ht), cv2.LUT(eosin, et), scale=1 / 255)
                for ht, et in zip(haema_tables, eosin_tables, strict=True)
            ]
            if inked is not None:
                light_left = [cv2.LUT(inked, t) for t in _tables(ink_od, (255, 255, 255))]
                planes = [cv2.multiply(p, t, scale=1 / 255) for p, t in zip(planes, light_left, strict=True)]
            rgb = cv2.merge(planes)
            small = cv2.resize(rgb, (q, q), interpolation=cv2.INTER_AREA)
            room = quarter[to]
            room[:] = small[: room.shape[0], : room.shape[1]]
            yield _jpeg(rgb)


def _pen(plan: SlidePlan, rng: np.random.Generator) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A felt-pen stroke on the glass: uint8 ink at MAP_MPP, about 0.2 mm wide, and its absorbance (blue or green)."""
    h, w = map_shape(plan)
    t = np.linspace(0, 1, 40)
    x = w * (0.08 + 0.30 * t) + 12 * np.sin(t * 7 + rng.uniform(0, 6))
    y = h * (0.10 + 0.12 * np.sin(t * 3 + rng.uniform(0, 1)))
    ink = np.zeros((h, w), np.uint8)
    wide = max(6, round(min(200 / MAP_MPP, h / 5)))
    cv2.polylines(ink, [np.stack([x, y], 1).astype(np.int32)], False, 210, wide)
    blue, green = (1.5, 0.9, 0.12), (1.5, 0.35, 1.1)
    return np.asarray(cv2.GaussianBlur(ink, (0, 0), 1.5)), blue if rng.random() < 0.5 else green


def _ink_of_tile(ink: np.ndarray, row: int, col: int, plan: SlidePlan) -> np.ndarray | None:
    """The ink of one level-0 tile at full resolution, or None where there is none."""
    k = round(MAP_MPP / plan.mpp)
    y, x, n = row * TILE_PX // k, col * TILE_PX // k, TILE_PX // k
    part = ink[y : y + n, x : x + n]
    if not part.any():
        return None
    part = np.pad(part, ((0, n - part.shape[0]), (0, n - part.shape[1])), mode="edge")
    return np.asarray(cv2.resize(part, (TILE_PX, TILE_PX), interpolation=cv2.INTER_LINEAR))


def read_truth(folder: Path, slide: str) -> Truth:
    """The truth of one demo slide (its file name) of the cohort in `folder`. KeyError if it is none of its slides."""
    known = json.loads((folder / "truth" / "cohort.json").read_text())
    about = known["slides"][slide]
    levels = cv2.imread(str(folder / "truth" / f"{slide}.png"), cv2.IMREAD_GRAYSCALE)
    if levels is None:
        raise FileNotFoundError(f"{folder / 'truth' / slide}.png is missing or damaged: make the cohort again")
    return Truth(levels > 64, levels > 192, float(known["mpp"]), float(about["slide_mpp"]))


def tumour_fraction(truth: Truth, coords_l0: np.ndarray, tile_l0: float | Sequence[float]) -> np.ndarray:
    """Share of each tile that is planted tumour: float64 (N,).

    coords_l0: (N, 2) top-left corners in level-0 px, x then y. tile_l0: tile edge in level-0 px, one or (x, y).
    """
    table = np.pad(np.cumsum(np.cumsum(truth.tumour, 0, dtype=np.int64), 1), ((1, 0), (1, 0)))
    scale = truth.slide_mpp / truth.mpp
    low = np.rint(np.asarray(coords_l0, float) * scale).astype(int)
    high = np.rint((np.asarray(coords_l0, float) + np.asarray(tile_l0, float)) * scale).astype(int)
    limit = np.array([truth.tumour.shape[1], truth.tumour.shape[0]])
    area = np.maximum(1, np.prod(high - low, axis=1))
    (x0, y0), (x1, y1) = np.clip(low, 0, limit).T, np.clip(high, 0, limit).T
    inside = table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]
    return np.asarray(inside / area)
