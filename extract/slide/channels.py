"""Is a file one RGB picture? The channels, focal planes and time points in it, told before a reader shows the first.

In: the path of a TIFF or CZI, or the properties of a slide that OpenSlide opened. Out: for one picture nothing; the
pages to put together where red, green and blue are stored each for itself; SeveralPlanes, naming what there is, for
all else (fluorescence, other channels, Z-stacks, time series). Reads directories and metadata, decodes nothing.
"""

from __future__ import annotations

import html
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mhim.extract import SeveralPlanes, UnreadableSlide
from mhim.extract.slide.formats import suffix
from mhim.extract.slide.tiffcheck import entries, header, text, values

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES = 256, 257, 258, 262, 277
_TILE_WIDTH, _SUB_DIRECTORIES = 322, 330
_SUBFILE, _DESCRIPTION, _PAGE_NAME, _FORMAT, _IMAGEJ_SIZES, _IMAGEJ = 254, 270, 285, 339, 50838, 50839
_NDPI_PLANE = 65424
_MOST_PAGES = 4096
_PLAIN_GREY, _RGB = {0, 1}, {2, 6}  # photometric: white or black is zero; RGB, YCbCr
_ONE_PICTURE = "a slide is one RGB picture: export its brightfield image, or the plane in focus, as one"
_FLUORESCENT = re.compile(
    r"dapi|hoechst|fitc|tritc|rhodamine|texas ?red|cy[357]\b|cyanine|alexa|\baf ?\d{3}\b|opal ?\d{3}|\w*gfp|mcherry|"
    r"fluor|spectrum ?(aqua|green|orange|gold|red)",
    re.IGNORECASE,
)
_COLOURS = ("red", "green", "blue")
_NO_SCENE = re.compile(r"label|macro|overview|thumbnail|preview|barcode", re.IGNORECASE)
_SMALLEST_SCENE = 16  # an image of this part of the first one's px is no overview
# properties of opened slides that count planes; where OpenSlide refuses them itself, its own message stands
_COUNTS = {
    "dicom.TotalPixelMatrixFocalPlanes": "focal planes", "dicom.NumberOfOpticalPaths": "optical paths (channels)",
    "ventana.Z-layers": "focal planes", "hamamatsu.NoLayers": "focal planes",
    "zeiss.Information.Image.SizeZ": "focal planes", "zeiss.Information.Image.SizeT": "time points",
}  # fmt: skip


@dataclass(frozen=True)
class _Page:
    """One directory of the chain. samples: per px; bits: of the first. whole: neither a reduced image nor a mask."""

    number: int
    size: tuple[int, int]
    samples: int
    bits: int
    photometric: int
    unsigned: bool
    tiled: bool
    has_sub_levels: bool
    whole: bool
    description: str
    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How the picture lies in a file.

    join: the TIFF pages that hold red, green and blue, in this order; one page, whose own samples are these though it
    calls itself grey; or none for what is one picture as it is. bits: per sample. has_sub_levels: its further levels
    may be sub-directories of the first page."""

    join: tuple[int, ...] = ()
    bits: int = 8
    has_sub_levels: bool = False


def examine(path: Path, vendor: str | None) -> Layout:
    """The layout of what is one RGB picture. vendor: OpenSlide's, None if it does not know the file. SeveralPlanes:
    it is several planes, which the message names. Formats whose planes OpenSlide tells as properties are judged by
    `of_properties`."""
    if vendor == "zeiss" or suffix(path) == ".czi":
        _of_czi(path)
    elif vendor == "hamamatsu" and suffix(path) == ".ndpi":
        _of_ndpi(path)
    elif vendor in (None, "generic-tiff", "aperio"):
        return _of_tiff(path, vendor)
    return Layout()


def _of_tiff(path: Path, vendor: str | None) -> Layout:
    try:
        with open(path, "rb") as file:
            pages = _pages(file)
    except (struct.error, ValueError):
        return Layout()  # no TIFF, or a damaged one, which its reader will name
    if not pages:
        return Layout()
    first = pages[0]
    ome, imagej = "<OME" in first.description[:4000], first.description.startswith("ImageJ=")
    if vendor != "aperio" and not ome and not imagej:
        first = max((p for p in pages if p.whole), key=lambda p: p.size[0] * p.size[1], default=first)
    same = [p for p in pages if p.size == first.size and p.whole and p.tiled == first.tiled]
    if ome:
        _refuse_scenes(path, first, pages)
        join = _of_ome(path, first, same)
    elif imagej:
        join = _of_imagej(path, first, same)
    elif len(same) > 1:
        join = _of_pages(path, same)
    else:
        join = _of_samples(path, first)
    if first.number and not join:  # readers take the first page for the finest level, also a small one
        join = (first.number,)
    return Layout(join, first.bits, first.has_sub_levels)


# ---------------------------------------------------------------------------------------------- who says what


def _of_ome(path: Path, first: _Page, same: Sequence[_Page]) -> tuple[int, ...]:
    """By the first image of the OME-XML; by pattern, because a file may hold a hostile XML."""
    image = re.split(r"<(?:\w+:)?Image\b", first.description, maxsplit=2)[1:2]
    pixels = _elements(image[0], "Pixels")[:1] if image else []
    if not pixels:  # the metadata lie in another file
        return _of_pages(path, same) if len(same) > 1 else _of_samples(path, first)
    counts = {axis: _count(pixels[0].get(f"Size{axis}")) for axis in "CZT"}
    channels = _elements(image[0], "Channel")
    names = [c.get("Name") or c.get("Fluor") or f"channel {i}" for i, c in enumerate(channels)]
    per_channel = max((_count(c.get("SamplesPerPixel")) for c in channels), default=1)
    per_channel = max(per_channel, first.samples if len(channels) <= 1 else 1)
    several = len(channels) or max(1, counts["C"] // per_channel)
    parts = [f"{counts['Z']} focal planes"] * (counts["Z"] > 1) + [f"{counts['T']} time points"] * (counts["T"] > 1)
    told = f" ({', '.join(names)})" if channels else ""
    glows = any(map(_glows, channels))
    if parts or (glows and several == 1):
        parts += [f"{several} channels{told}"] * (several > 1) + [f"a fluorescence channel{told}"] * glows
        raise _refusal(path, parts)
    if several == 1 or (first.samples >= 3 and first.photometric in _RGB and not glows):
        return _of_pages(path, same) if len(same) > 1 else ()
    bright = all(c.get("ContrastMethod", "").lower() == "brightfield" for c in channels) and bool(channels)
    order = None if glows else _by_name(names) or (_by_colour(channels) or (0, 1, 2) if bright else None)
    eight = first.bits == 8 and first.unsigned and pixels[0].get("Type", "uint8").lower() == "uint8"
    if several == 3 and order is not None and eight:
        if first.samples == 3:
            return (first.number,)
        where = _where(image[0], same)
        if where is not None and per_channel == 1:
            return tuple(where[c] for c in order)
        raise _refusal(path, [f"3 channels{told}, not all of which are pages of this file"])
    bits = "" if eight else f" of {first.bits} bits"
    raise _refusal(path, [f"{several} {'fluorescence ' if glows else ''}channels{bits}{told}"])


def _refuse_scenes(path: Path, first: _Page, pages: Sequence[_Page]) -> None:
    """Raises SeveralPlanes where the file holds further images of another size that show something else: scenes, of
    which only the first would be read. Labels and overviews, by name or far smaller, and levels that call themselves
    images are none."""
    here = {p.size for p in pages}
    found: list[tuple[str, tuple[int, int]]] = []
    for image in re.split(r"<(?:\w+:)?Image(?=[\s>])", first.description)[1:]:
        pixels = _elements(image, "Pixels")[:1]
        name = re.search(r'^[^>]*\bName\s*=\s*"([^"]*)"', image)
        size = tuple(_count(pixels[0].get(f"Size{axis}"), 0) for axis in "XY") if pixels else (0, 0)
        found.append((html.unescape(name.group(1)) if name else f"image {len(found)}", (size[0], size[1])))
    w, h = first.size
    scenes = [
        (name, size) for name, size in found[1:]
        if size in here and size != first.size and _SMALLEST_SCENE * size[0] * size[1] >= w * h
        and not _NO_SCENE.search(name) and not _is_reduced(size, first.size)
    ]  # fmt: skip
    if scenes:
        told = ", ".join(f"{name} of {w} x {h} px" for name, (w, h) in [found[0], *scenes])
        raise SeveralPlanes(f"{path.name} holds {len(scenes) + 1} images ({told}): save each as a file of its own")


def _is_reduced(size: tuple[int, int], of: tuple[int, int]) -> bool:
    """Whether an image of this size may be a coarser level: of the same shape, to two px of its own."""
    scale = of[0] / size[0]
    return scale > 1.5 and abs(size[1] * scale - of[1]) <= 2 * scale


def _of_imagej(path: Path, first: _Page, same: Sequence[_Page]) -> tuple[int, ...]:
    told = dict(re.findall(r"^(\w+)=(.*?)\s*$", first.description, re.MULTILINE))
    counts = {k: _count(told.get(k)) for k in ("images", "channels", "slices", "frames")}
    if max(counts.values()) == 1 and len(same) == 1:
        return _of_samples(path, first)
    names = first.labels or tuple(p.name for p in same)
    order = _rgb_order(same, names)
    if order is not None and counts["images"] == 3:
        return order
    shown = {"channels": "channels", "slices": "focal planes (slices)", "frames": "time points (frames)"}
    parts = [f"{counts[k]} {name}" for k, name in shown.items() if counts[k] > 1]
    known = f" ({', '.join(n for n in names if n)})" if any(names) else ""
    raise _refusal(path, [*(parts or [f"{max(counts['images'], len(same))} images of an ImageJ stack"])], known)


def _of_pages(path: Path, same: Sequence[_Page]) -> tuple[int, ...]:
    """Several pages of one size of which no metadata says what they are."""
    names = [p.name for p in same]
    if (order := _rgb_order(same, names)) is not None:
        return order
    known = f" ({', '.join(n for n in names if n)})" if any(names) else ""
    (w, h), n = same[0].size, len(same)
    raise _refusal(path, [f"{n} planes of {w} x {h} px{known}, channels or a stack"])


def _of_samples(path: Path, page: _Page) -> tuple[int, ...]:
    """A page of several samples that calls itself grey: channels, of which a reader would show the first."""
    if page.photometric in _PLAIN_GREY and page.samples > 2:  # two are grey and its alpha
        raise UnreadableSlide(
            f"{path.name}: {page.samples} channels in one page, which does not say that they are RGB; {_ONE_PICTURE}"
        )
    return ()


def of_properties(name: str, properties: Mapping[str, str]) -> None:
    """Raises SeveralPlanes if an opened slide counts several planes. name: of its file."""
    parts = [f"{n} {what}" for key, what in _COUNTS.items() if (n := _count(properties.get(key))) > 1]
    layers = {k: v for k, v in properties.items() if k.startswith("mirax.HIERARCHICAL.HIER_")}
    for key, what in layers.items():
        n = _count(layers.get(key.removesuffix("NAME") + "COUNT"))
        if what == "Microscope focus level" and n > 1:
            parts.append(f"{n} focal planes")
    if properties.get("mirax.GENERAL.SLIDE_TYPE", "").endswith("FLUORESCENCE"):
        filters = dict.fromkeys(v for k, v in sorted(properties.items()) if k.endswith("SECTION.FILTER_NAME"))
        parts.append(f"fluorescence channels ({', '.join(filters)})")
    if parts:
        raise SeveralPlanes(f"{name} holds {' and '.join(parts)}, where {_ONE_PICTURE}")


def _of_ndpi(path: Path) -> None:
    """Raises SeveralPlanes for a Z-stack of Hamamatsu's, of which OpenSlide would show the plane in the middle."""
    import tifffile  # NDPI keeps 64-bit offsets in 32-bit fields, which it knows how to follow

    try:
        with tifffile.TiffFile(path) as tiff:
            planes = {int(tag.value) for p in tiff.pages if (tag := p.tags.get(_NDPI_PLANE)) is not None}  # type: ignore[union-attr]
    except (tifffile.TiffFileError, ValueError, IndexError, KeyError, TypeError, struct.error):
        return  # a damaged one, which its reader will name
    if len(planes) > 1:
        at = ", ".join(f"{z:g}" for z in sorted(planes))
        raise _refusal(path, [f"{len(planes)} focal planes (at {at} nm)"])


def _of_czi(path: Path) -> None:
    """Raises SeveralPlanes for a CZI of several channels, focal planes or time points."""
    with open(path, "rb") as file:
        head = file.read(100)
        if not head.startswith(b"ZISRAWFILE") or len(head) < 100:
            return
        (at,) = struct.unpack("<q", head[92:100])
        if at <= 0:
            return
        file.seek(at)
        segment = file.read(36)
        if not segment.startswith(b"ZISRAWMETADATA"):
            return
        file.seek(at + 32 + 256)
        xml = file.read(min(struct.unpack("<i", segment[32:36])[0], 1 << 24)).decode("utf-8", "replace")
    image = xml[xml.find("<Image") :] if "<Image" in xml else xml
    n = {axis: _count((re.findall(rf"<Size{axis}>(\d+)</Size{axis}>", image) or [None])[0]) for axis in "CZT"}
    block = re.search(r"<Channels>(.*?)</Channels>", image, re.DOTALL)
    channels = _elements(block.group(1), "Channel") if block else []
    names = [c.get("Name") or c.get("Id", "") for c in channels]
    told = f" ({', '.join(names)})" if any(names) else ""
    glows = block is not None and ("Fluorescence" in block.group(1) or any(_FLUORESCENT.search(x) for x in names))
    parts = [f"{n['Z']} focal planes"] * (n["Z"] > 1) + [f"{n['T']} time points"] * (n["T"] > 1)
    parts += [f"{n['C']} channels{told}"] * (n["C"] > 1) + [f"a fluorescence channel{told}"] * (glows and n["C"] == 1)
    if parts:
        raise _refusal(path, parts)


def _refusal(path: Path, parts: Sequence[str], more: str = "") -> SeveralPlanes:
    return SeveralPlanes(f"{path.name} holds {' and '.join(parts)}{more}, where {_ONE_PICTURE}")


# ---------------------------------------------------------------------------------------------- small readers


def _rgb_order(pages: Sequence[_Page], names: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers of three grey 8-bit pages named after the colours, red first."""
    order = _by_name(names)
    if order is None or len(pages) != 3 or not all(p.samples == 1 and p.bits == 8 and p.unsigned for p in pages):
        return None
    return tuple(pages[i].number for i in order)


def _by_name(names: Sequence[str]) -> tuple[int, ...] | None:
    """Where red, green and blue stand, if these (or their letters) are the names."""
    low = [n.strip().lower() for n in names]
    for wanted in (_COLOURS, tuple(c[0] for c in _COLOURS)):
        if sorted(low) == sorted(wanted):
            return tuple(low.index(c) for c in wanted)
    return None


def _by_colour(channels: Sequence[Mapping[str, str]]) -> tuple[int, ...] | None:
    """The same by the channels' own colours, RGBA in one signed number."""
    try:
        rgb = [(int(c["Color"]) & 0xFFFFFFFF) >> 8 for c in channels]
    except (KeyError, ValueError):
        return None
    pure = (0xFF0000, 0x00FF00, 0x0000FF)
    return tuple(rgb.index(c) for c in pure) if sorted(rgb) == sorted(pure) else None


def _glows(channel: Mapping[str, str]) -> bool:
    """Whether a channel says that it is fluorescence, in any of the words that OME-XML has for it."""
    if "fluorescence" in (channel.get("ContrastMethod", "") + channel.get("IlluminationType", "")).lower():
        return True
    if channel.get("ContrastMethod", "").lower() == "brightfield":
        return False
    return bool(
        {"EmissionWavelength", "ExcitationWavelength", "Fluor"} & set(channel)
        or _FLUORESCENT.search(channel.get("Name", ""))
    )


def _where(image: str, same: Sequence[_Page]) -> dict[int, int] | None:
    """Channel -> page number by the TiffData elements; None if a channel is no whole page of this file."""
    if len(set(re.findall(r'<(?:\w+:)?UUID\b[^>]*\bFileName\s*=\s*"([^"]*)"', image))) > 1:
        return None
    found: dict[int, int] = {}
    for data in _elements(image, "TiffData") or [{}]:
        ifd, channel = int(data.get("IFD", 0)), int(data.get("FirstC", 0))
        for k in range(_count(data.get("PlaneCount"), 1 if "IFD" in data else 3)):
            found.setdefault(channel + k, ifd + k)
    whole = {p.number for p in same if p.samples == 1}
    return found if {0, 1, 2} <= set(found) and whole >= {found[c] for c in range(3)} else None


def _elements(xml: str, name: str) -> list[dict[str, str]]:
    """The attributes of every `name` element, in order."""
    tags = re.findall(rf"<(?:\w+:)?{name}\b([^>]*)>", xml)
    return [{k: html.unescape(v) for k, v in re.findall(r'(\w+)\s*=\s*"([^"]*)"', tag)} for tag in tags]


def _count(said: str | None, default: int = 1) -> int:
    return int(said) if said and said.strip().isascii() and said.strip().isdigit() else default


def _pages(file: BinaryIO) -> list[_Page]:
    order, big, at = header(file)
    seen: set[int] = set()
    found: list[_Page] = []
    while at and at not in seen and len(seen) < _MOST_PAGES:
        seen.add(at)
        tags, at = entries(file, at, order, big)

        def one(tag: int, default: int, tags: dict[int, bytes] = tags) -> int:
            many = values(file, tags[tag], order, big) if tag in tags else None
            return default if many is None or not len(many) else int(many[0])

        def words(tag: int, tags: dict[int, bytes] = tags) -> str:
            return text(file, tags[tag], order, big) if tag in tags else ""

        first = not found
        said = words(_DESCRIPTION) if first or _PAGE_NAME not in tags else ""
        named = re.search(r"<Name>([^<]*)</Name>", said)  # the channel, in Akoya's and PerkinElmer's descriptions
        found.append(_Page(
            len(found), (one(_WIDTH, 0), one(_HEIGHT, 0)), one(_SAMPLES, 1), one(_BITS, 1), one(_PHOTOMETRIC, 1),
            one(_FORMAT, 1) == 1, _TILE_WIDTH in tags, _SUB_DIRECTORIES in tags, one(_SUBFILE, 0) & 5 == 0,
            said if first else "", words(_PAGE_NAME).strip() or (named.group(1) if named else ""),
            _imagej_labels(file, tags, order, big) if first else (),
        ))  # fmt: skip
    return found


def _imagej_labels(file: BinaryIO, tags: dict[int, bytes], order: str, big: bool) -> tuple[str, ...]:
    """What ImageJ calls the images of a stack, from its own block of metadata."""
    if _IMAGEJ_SIZES not in tags or _IMAGEJ not in tags:
        return ()
    sizes, data = (values(file, tags[t], order, big) for t in (_IMAGEJ_SIZES, _IMAGEJ))
    if sizes is None or data is None or len(sizes) < 2:
        return ()
    raw = bytes(data.astype("u1"))
    kinds = [(raw[i : i + 4], struct.unpack(order + "I", raw[i + 4 : i + 8])[0]) for i in range(4, int(sizes[0]), 8)]
    at, k = int(sizes[0]), 1
    for kind, count in kinds:
        blocks = [raw[at + sum(map(int, sizes[k : k + n])) :][: int(sizes[k + n])] for n in range(count)]
        if kind in (b"labl", b"lbal"):
            return tuple(b.decode("utf-16-le" if order == "<" else "utf-16-be", "replace") for b in blocks)
        at, k = at + sum(map(int, sizes[k : k + count])), k + count
    return ()
