"""Small OME-TIFFs for the tests: planes with their further levels as sub-directories, and the XML that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from tests.extract.slides import MPP

RGB_NAMES: list[dict[str, Any]] = [{"Name": n, "SamplesPerPixel": 1} for n in ("Red", "Green", "Blue")]


def halved(plane: np.ndarray, count: int) -> list[np.ndarray]:
    """`plane` and count - 1 further levels, each half as wide."""
    out = [plane]
    while len(out) < count:
        h, w = (side // 2 for side in out[-1].shape[:2])
        out.append(cv2.resize(out[-1], (w, h), interpolation=cv2.INTER_AREA))
    return out


def ome_xml(shape: tuple[int, ...], pixels: dict[str, Any], channels: list[dict[str, Any]], data: str = "") -> str:
    """The XML of one image. shape: (h, w, ...). pixels, channels: attributes. data: the TiffData elements."""
    size = {"SizeX": shape[1], "SizeY": shape[0], "SizeC": 1, "SizeZ": 1, "SizeT": 1, "DimensionOrder": "XYCZT",
            "Type": "uint8", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP} | pixels  # fmt: skip
    named = "".join(
        "<Channel " + " ".join(f'{k}="{v}"' for k, v in {"ID": f"Channel:0:{i}", **c}.items()) + "/>"
        for i, c in enumerate(channels)
    )
    told = " ".join(f'{k}="{v}"' for k, v in size.items())
    return (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        f'<Pixels ID="Pixels:0" {told}>{named}{data}</Pixels></Image></OME>'
    )


def write_ome(
    path: Path,
    planes: list[np.ndarray],
    pixels: dict[str, Any],
    channels: list[dict[str, Any]],
    levels: int = 1,
    chain: bool = False,
    data: str = "<TiffData/>",
    **options: Any,
) -> Path:
    """One page per plane. chain: further levels as pages after all planes, not as sub-directories of each."""
    xml = ome_xml(planes[0].shape, pixels, channels, data)
    pyramids = [halved(p, levels) for p in planes]
    kind = {"tile": (256, 256), "compression": "zlib", "metadata": None} | options
    grey = {"photometric": "minisblack"} if planes[0].ndim == 2 else {"photometric": "rgb"}
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        for n, pyramid in enumerate(pyramids):
            for k, level in enumerate(pyramid[:1] if chain else pyramid):
                out.write(level, subifds=levels - 1 if k == 0 and not chain else None, subfiletype=int(k > 0),
                          description=xml.encode() if n == k == 0 else None, **{**grey, **kind})  # fmt: skip
        for k in range(1, levels if chain else 1):
            for pyramid in pyramids:
                out.write(pyramid[k], subfiletype=1, **{**grey, **kind})
    return path
