"""From a slide's properties to its µm per px: an ordered chain whose every step can be wrong.

In: the properties of an opened slide (text to text, as OpenSlide names them) and the settings. Out: (x, y) µm per px
of level 0, the source, and notes. Opens no file.

Order: manifest column, `tile.mpp_of_slides`, OpenSlide's own value, the vendors' keys, TIFF resolution tags, OME-XML,
and only on request the objective power. A value that is no positive finite number, or that no microscope has, is
passed over with a note, never used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mhim.configs.schema import TileConfig

PLAUSIBLE_MPP = (0.05, 20.0)  # a 100x oil objective gives 0.1, a macro scan 10; 72 dpi "screen" tags give 353

# (key of x, key of y, µm per unit); the same key twice where the vendor stores one number.
_MIRAX = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"
_VENDOR_KEYS = (
    ("aperio.MPP", "aperio.MPP", 1.0),
    (_MIRAX + "X", _MIRAX + "Y", 1.0),
    ("philips.DICOM_PIXEL_SPACING", "philips.DICOM_PIXEL_SPACING", 1000.0),
    ("dicom.PixelSpacing", "dicom.PixelSpacing", 1000.0),
    ("dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing",) * 2 + (1000.0,),
    ("ventana.ScanRes", "ventana.ScanRes", 1.0),
    ("trestle.Objective Power MPP", "trestle.Objective Power MPP", 1.0),
    ("zeiss.Scaling.X", "zeiss.Scaling.Y", 1e6),
)
_UM_PER_OME_UNIT = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4}
_UM_PER_IMAGEJ_UNIT = {"micron": 1.0, "micrometer": 1.0, "micrometre": 1.0, "nanometer": 1e-3, "millimeter": 1e3,
                       "centimeter": 1e4, "inch": 25400.0, "inche": 25400.0}  # fmt: skip
_UM_PER_TIFF_UNIT = {"inch": 25400.0, "centimeter": 10000.0}


@dataclass(frozen=True)
class Resolved:
    """mpp: µm per px of level 0, (x, y), or None if nothing tells it; source: where it comes from."""

    mpp: tuple[float, float] | None
    source: str
    notes: tuple[str, ...] = ()


def resolve(properties: Mapping[str, str], config: TileConfig, manifest_mpp: float | None = None) -> Resolved:
    """Walk the chain. The manifest and the settings are believed (with a note where the file disagrees)."""
    notes: list[str] = []
    found: tuple[tuple[float, float], str] | None = None
    for name, x_text, y_text, scale in _candidates(properties):
        x, y = _number(x_text), _number(y_text)
        if x is None or y is None or x <= 0 or y <= 0:
            notes.append(f"{name} is {_pair(x_text, y_text)}, not a positive number: passed over")
            continue
        x, y = x * scale, y * scale
        if not all(PLAUSIBLE_MPP[0] <= v <= PLAUSIBLE_MPP[1] for v in (x, y)) or not 0.2 <= x / y <= 5:
            notes.append(f"{name} gives {x:.4g} x {y:.4g} µm/px, which no slide has: passed over")
            continue
        found = ((x, y), name)
        break
    told = _told(config, manifest_mpp)
    if told is not None:
        value, source = told
        if found is not None and abs(value / math.sqrt(found[0][0] * found[0][1]) - 1) > 0.05:
            in_file = " x ".join(f"{v:.4g}" for v in dict.fromkeys(found[0]))
            notes.append(f"{source} says {value:g} µm/px, the file's {found[1]} {in_file}: {source} is used")
        return Resolved((value, value), source, tuple(notes))
    if found is not None:
        return Resolved(found[0], found[1], tuple(notes))
    power = _number(properties.get("openslide.objective-power", ""))
    if power is not None and 0.5 <= power <= 200:
        if config.assume_mpp_from_power:
            assumed = 10.0 / power
            return Resolved((assumed, assumed), f"assumed from the objective power {power:g}x", tuple(notes))
        notes.append(f"the file states an objective power of {power:g}x but no mpp")
    return Resolved(None, "", tuple(notes))


def _told(config: TileConfig, manifest_mpp: float | None) -> tuple[float, str] | None:
    """What the user says, which needs no plausibility but must be a positive number."""
    if manifest_mpp is not None:
        if not (math.isfinite(manifest_mpp) and manifest_mpp > 0):
            raise ValueError(f"the manifest's mpp must be a positive number, not {manifest_mpp}")
        return float(manifest_mpp), "manifest"
    if config.mpp_of_slides is not None:
        return config.mpp_of_slides, "tile.mpp_of_slides"
    return None


def _candidates(properties: Mapping[str, str]) -> list[tuple[str, str, str, float]]:
    """(name, x text, y text, µm per unit) of everything the file offers, in the order of the chain."""
    out = []
    if "openslide.mpp-x" in properties or "openslide.mpp-y" in properties:
        x = properties.get("openslide.mpp-x", properties.get("openslide.mpp-y", ""))
        out.append(("openslide.mpp", x, properties.get("openslide.mpp-y", x), 1.0))
    for key_x, key_y, scale in _VENDOR_KEYS:
        if key_x in properties:
            x, y = properties[key_x], properties.get(key_y, properties[key_x])
            if scale == 1000.0:  # DICOM spacing: "row spacing, column spacing", that is y then x, one text
                parts = re.split(r"[\\\s,]+", x.replace('"', " ").strip())
                y, x = (parts[0], parts[-1]) if parts else ("", "")
            out.append((key_x, x, y, scale))
    unit = properties.get("tiff.ResolutionUnit", "").lower()
    description = properties.get("tiff.ImageDescription", properties.get("openslide.comment", ""))
    imagej = _imagej_um_per_unit(description)
    if imagej is not None and "tiff.XResolution" in properties:
        x, y = properties["tiff.XResolution"], properties.get("tiff.YResolution", properties["tiff.XResolution"])
        per_px = [None if (n := _number(t)) is None or n <= 0 else imagej / n for t in (x, y)]
        out.append((f"ImageJ ({x} px per unit)", str(per_px[0] or x), str(per_px[1] or y), 1.0))
    elif "tiff.XResolution" in properties and unit in _UM_PER_TIFF_UNIT:
        x, y = properties["tiff.XResolution"], properties.get("tiff.YResolution", properties["tiff.XResolution"])
        per_px = [None if (n := _number(t)) is None or n <= 0 else _UM_PER_TIFF_UNIT[unit] / n for t in (x, y)]
        out.append((f"TIFF resolution tags ({x} per {unit})", str(per_px[0] or x), str(per_px[1] or y), 1.0))
    out.extend(_ome(description))
    return out


def _imagej_um_per_unit(description: str) -> float | None:
    """µm per unit of the resolution tags as ImageJ means them, whatever the tags' own unit says; None without one."""
    if not description.startswith("ImageJ="):
        return None
    told = re.search(r"^unit=(.*?)\s*$", description, re.MULTILINE)
    unit = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m.group(1), 16)), told.group(1)) if told else ""
    return _UM_PER_OME_UNIT.get(unit) or _UM_PER_IMAGEJ_UNIT.get(unit.lower().removesuffix("s"))


def _ome(description: str) -> list[tuple[str, str, str, float]]:
    """PhysicalSizeX/Y of the first Pixels element; by pattern, because a file may hold a hostile XML."""
    if "<OME" not in description[:4000]:
        return []
    element = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", description)
    if element is None:
        return []
    attributes: dict[str, str] = dict(re.findall(r'(\w+)\s*=\s*"([^"]*)"', element.group()))
    x = attributes.get("PhysicalSizeX")
    if x is None:
        return []
    unit_x = _UM_PER_OME_UNIT.get(attributes.get("PhysicalSizeXUnit", "µm"))
    unit_y = _UM_PER_OME_UNIT.get(attributes.get("PhysicalSizeYUnit", attributes.get("PhysicalSizeXUnit", "µm")))
    y = attributes.get("PhysicalSizeY", x)
    if unit_x is None or unit_y is None:  # "pixel" or "reference frame": no length
        return []
    number_y = _number(y)
    return [("OME-XML PhysicalSize", x, y if number_y is None else repr(number_y * unit_y / unit_x), unit_x)]


def _number(text: str) -> float | None:
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _pair(x: str, y: str) -> str:
    return repr(x) if x == y else f"{x!r}, {y!r}"
