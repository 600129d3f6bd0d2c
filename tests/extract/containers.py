"""Tiled slides of any make-up, painted: codec, file tile, levels, stray pages, mpp; and what their pixels are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

APERIO = "Aperio Image Library v11.2.1 \r\n{w}x{h} [0,0 {w}x{h}]|AppMag = 20|MPP = {mpp}"
PHILIPS = (
    '<DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" '
    'PMSVR="IDataObjectArray"><Array><DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE" '
    'PMSVR="IString">WSI</Attribute><Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">{first}</Attribute>'
    '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" PMSVR="IDataObjectArray"><Array>{levels}</Array>'
    "</Attribute></DataObject></Array></Attribute></DataObject>"
)

OVERVIEW = np.full((500, 400, 3), 230, np.uint8)


@dataclass(frozen=True)
class Traits:
    """vendor: aperio, generic-tiff, leica or philips. codecs: one a level, of jpeg, ycc (33003), rgb (33005), zlib.
    size: (w, h) of level 0; factor: how much coarser the next level is; tile: (w, h). stray: the level before which a
    tiled page of equal size stands that is none (generic-tiff). shuffled: the further pages stand from small to large
    (generic-tiff).
    at: where on the glass the scanned part starts, (x, y) px (leica).
    """

    vendor: str = "generic-tiff"
    codecs: tuple[str, ...] = ("jpeg", "jpeg")
    size: tuple[int, int] = (700, 500)
    factor: int = 2
    tile: tuple[int, int] = (256, 256)
    stray: int | None = None
    shuffled: bool = False
    mpp: tuple[float, float] = (0.5, 0.5)
    big: bool = False
    at: tuple[int, int] = (0, 0)

    @property
    def glass(self) -> tuple[int, int]:
        """(w, h) of the whole slide of a Leica, px."""
        return self.at[0] + self.size[0] + 512, self.at[1] + self.size[1] + 512


def painted(w: int, h: int, seed: int = 0) -> np.ndarray:
    """uint8 (h, w, 3): smooth colours that are different everywhere, over all of the picture."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(30, 225, (h // 40 + 3, w // 40 + 3, 3)).astype(np.float32)
    big = cv2.resize(small, (40 * small.shape[1], 40 * small.shape[0]), interpolation=cv2.INTER_CUBIC)
    return np.clip(big[20 : 20 + h, 20 : 20 + w], 0, 255).astype(np.uint8)


def levels_of(traits: Traits, rgb: np.ndarray) -> list[np.ndarray]:
    """The levels of a picture, by area average."""
    out = [rgb]
    for _ in traits.codecs[1:]:
        h, w = (max(1, s // traits.factor) for s in out[-1].shape[:2])
        k = traits.factor
        out.append(cv2.resize(out[-1][: h * k, : w * k], (w, h), interpolation=cv2.INTER_AREA))
    return out


def _coded(level: np.ndarray, codec: str) -> tuple[np.ndarray, dict[str, Any]]:
    """What tifffile writes of a level, and how."""
    if codec == "ycc":
        ycc = np.ascontiguousarray(cv2.cvtColor(level, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
        return ycc, {"compression": "aperio_jp2000_ycbc", "compressionargs": {"mct": False, "level": 0}}
    if codec == "rgb":
        return level, {"compression": "aperio_jp2000_rgb", "compressionargs": {"level": 0}}
    if codec == "jpeg":
        return level, {"compression": "jpeg", "compressionargs": {"level": 95}}
    return level, {"compression": codec}


def write(path: Path, traits: Traits, rgb: np.ndarray | None = None) -> list[np.ndarray]:
    """Write the slide, of `rgb` or painted, and return its levels, uint8 (h, w, 3) each."""
    levels = levels_of(traits, painted(*traits.size) if rgb is None else rgb)
    pages: list[tuple[int, np.ndarray, bool]] = [(n, level, False) for n, level in enumerate(levels)]
    if traits.shuffled:
        pages[1:] = pages[:0:-1]
    if traits.stray is not None:
        at = next(k for k, (n, _, _) in enumerate(pages) if n == traits.stray)
        pages.insert(at, (traits.stray, 255 - levels[traits.stray], True))
    h, w = levels[0].shape[:2]
    with tifffile.TiffWriter(path, bigtiff=traits.big) as out:
        if traits.vendor == "leica":
            out.write(OVERVIEW, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None,
                      description=_leica(traits, levels))  # fmt: skip
        for place, (n, level, stray) in enumerate(pages):
            scale = w / level.shape[1]
            shown = _padded(level, traits.tile) if traits.vendor == "philips" else level
            data, options = _coded(shown, traits.codecs[n])
            if traits.vendor == "aperio":
                options["description"] = APERIO.format(w=w, h=h, mpp=traits.mpp[0])
            elif traits.vendor == "philips" and n == 0:
                options["description"] = _philips(traits, len(levels))
            out.write(data, tile=traits.tile[::-1], photometric="rgb", metadata=None,
                      software="Philips DP v1.0" if traits.vendor == "philips" else None,
                      subfiletype=int(n > 0 and not stray and place > 0), resolutionunit="CENTIMETER",
                      resolution=tuple(1e4 / (m * scale) for m in traits.mpp), **options)  # fmt: skip
    return levels


def _padded(level: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    h, w = level.shape[:2]
    return cv2.copyMakeBorder(level, 0, -h % tile[1], 0, -w % tile[0], cv2.BORDER_CONSTANT, value=(90, 160, 30))


def _leica(traits: Traits, levels: list[np.ndarray]) -> str:
    def image(name: str, pages: list[np.ndarray], first: int, view: str, power: float, na: float) -> str:
        sizes = "".join(
            f'<dimension sizeX="{p.shape[1]}" sizeY="{p.shape[0]}" r="{i}" ifd="{first + i}"/>'
            for i, p in enumerate(pages)
        )
        return (
            f'<image name="{name}"><creationDate>2020-01-01T00:00:00Z</creationDate>'
            f'<device model="Leica SCN400" version="1"/><pixels sizeX="{pages[0].shape[1]}" '
            f'sizeY="{pages[0].shape[0]}">{sizes}</pixels>{view}<scanSettings><objectiveSettings><objective>{power}'
            f"</objective></objectiveSettings><illuminationSettings><numericalAperture>{na}</numericalAperture>"
            "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"
        )

    def view(w: int, h: int, x: int, y: int) -> str:
        nm = round(traits.mpp[0] * 1000)
        return f'<view sizeX="{w * nm}" sizeY="{h * nm}" offsetX="{x * nm}" offsetY="{y * nm}"/>'

    nm = round(traits.mpp[0] * 1000)
    w, h = traits.glass
    return (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" sizeX="{w * nm}" sizeY="{h * nm}">'
        + image("overview", [OVERVIEW], 0, view(w, h, 0, 0), 0.6, 0.05)
        + image("main", levels, 1, view(*traits.size, *traits.at), 20, 0.4)
        + "</collection></scn>"
    )


def _philips(traits: Traits, count: int) -> str:
    def spacing(n: int) -> str:
        return " ".join(f"&quot;{m * traits.factor**n / 1000:.9f}&quot;" for m in traits.mpp[::-1])

    one = (
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">'
        "{spacing}</Attribute></DataObject>"
    )
    return PHILIPS.format(first=spacing(0), levels="".join(one.format(spacing=spacing(n)) for n in range(count)))


def zeroed(path: Path, page: int, tiles: Sequence[int]) -> None:
    """Make tiles of a page ones of no bytes, as some Aperio slides have them."""
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[page].tags["TileByteCounts"]  # type: ignore[union-attr]
        counts = list(tag.value)
    for k in tiles:
        counts[k] = 0
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[page].tags["TileByteCounts"].overwrite(counts)  # type: ignore[union-attr]
