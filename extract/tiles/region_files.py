"""Files of drawn regions, told by content and not by name: GeoJSON of any QuPath, XML of ASAP and of ImageScope.

In: a path. Out: shapes with the base of their class, in the frame of the file. Knows nothing of what a class means.

- GeoJSON, plain, `.gz` or in a `.zip`, in UTF-8 or UTF-16 with or without a byte order mark. Only annotations count
  (detections, cells, tiles and TMA cores are no regions), those within other objects too, to any depth.
- ASAP: the class is the group, of a group within groups the outermost.
- ImageScope (and HALO, which writes the same elements): the class is the layer's name; a region whose own text is given
  has both. A region with `NegativeROA` is marked as `negative`.

Files come from anywhere: what is too deep, too large or declares a document type (XML entities) is refused.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np

from mhim.extract import SlideError

Rings = tuple[np.ndarray, ...]  # the outer first, then holes; float64 (K, 2), x then y

FRAME_KEY = "counted_from"  # member of a GeoJSON collection that says its frame; ours alone
FRAMES = ("bounds", "full")
MAX_BYTES = 1 << 30  # of the text; annotations of a whole slide take a few MB
_MAX_DEPTH = 32  # XML elements within each other; the formats use 6


class BadRegions(SlideError):
    """The file of a slide's regions cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class Shape:
    """One annotation with an area. names: what may name its class, the first that has a meaning counts. polygons: rings
    each, in px of level 0 as the file counts them. negative: it is a hole that was drawn as a region of its own."""

    names: tuple[str, ...]
    polygons: tuple[Rings, ...]
    negative: bool = False


@dataclass(frozen=True)
class Counted:
    """Where a file counts px from. frame: "bounds", the corner of the scanned bounds (as QuPath does), or "full", that
    of level 0. said: the file says so itself (`FRAME_KEY`); else it is how the program that writes such files does."""

    frame: str
    said: bool = False


def read_shapes(path: Path, may_be_empty: bool = False) -> tuple[list[Shape], Counted]:
    """The shapes of a file, and where it counts from. may_be_empty: that nothing at all is drawn
    says something; objects that are no areas or no annotations do not. Raises BadRegions."""
    name = f"regions file {path.name}"
    try:
        raw = _content(path)
        encoding = json.detect_encoding(raw)
        if raw[:64].decode(encoding, "ignore").lstrip("\ufeff \t\r\n").startswith("<"):
            shapes, counted = _xml(raw), Counted("full")
            nothing = not re.search(r"<(Vertex|Coordinate)\b", raw.decode(encoding, "ignore"))
        else:
            parsed = json.loads(raw.decode(encoding))
            nothing = (parsed.get("features") if isinstance(parsed, dict) else parsed) == []
            said = parsed.get(FRAME_KEY) if isinstance(parsed, dict) else None
            shapes, counted = list(_geojson(parsed)), Counted("bounds")
            if said in FRAMES:
                counted = Counted(said, said=True)
    except FileNotFoundError:
        raise BadRegions(f"{name} does not exist") from None
    except RecursionError:
        raise BadRegions(f"{name} is nested too deeply to be of any annotation program") from None
    except _Odd as error:
        raise BadRegions(f"{name}: {error}") from error
    except ElementTree.ParseError as error:
        raise BadRegions(f"{name} is no valid XML: {error}") from error
    except (OSError, EOFError, ValueError, LookupError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise BadRegions(f"{name} is no GeoJSON and no XML of regions: {error}") from error
    if not shapes and not (may_be_empty and nothing):
        raise BadRegions(f"{name} holds no annotation with an area; export annotations, not detections, from QuPath")
    return shapes, counted


class _Odd(ValueError):
    """What is wrong with a file's content, to be told after its name."""


def _content(path: Path) -> bytes:
    """The text's bytes, unpacked if need be."""
    with open(path, "rb") as file:
        head = file.read(4)
        file.seek(0)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(file) as packed:
                raw = packed.read(MAX_BYTES + 1)
        elif head == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                members = [m for m in archive.infolist() if not m.is_dir()]
                if len(members) != 1:
                    raise _Odd(f"a .zip of {len(members)} files; it must hold one")
                with archive.open(members[0]) as member:
                    raw = member.read(MAX_BYTES + 1)
        else:
            raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise _Odd(f"it is larger than {MAX_BYTES >> 20} MiB unpacked; export the annotations without detections")
    return raw


# ---------------------------------------------------------------------------------------------- GeoJSON

_KINDS = frozenset({"annotation", "detection", "cell", "tile", "tma_core", "tmacore", "root", "track"})


def _geojson(parsed: Any) -> Iterator[Shape]:
    to_do: list[tuple[Any, str]] = [(parsed, "the file")]
    while to_do:
        thing, where = to_do.pop()
        if isinstance(thing, list):
            to_do += [(one, f"feature {k} of {where}") for k, one in reversed(list(enumerate(thing)))]
            continue
        if not isinstance(thing, dict):
            raise _Odd(f"{where} is no valid GeoJSON (a {type(thing).__name__} in place of an object)")
        if "features" in thing:
            if not isinstance(thing["features"], list):
                raise _Odd("`features` is no list")
            to_do.append((thing["features"], where))
            continue
        properties = thing.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        for children in (h.get(k) for h in (properties, thing) for k in ("childObjects", "children")):
            if isinstance(children, (list, dict)) and children:
                to_do.append((children, f"the children of {where}"))
        if _kind(thing, properties) != "annotation":
            continue
        try:
            polygons = tuple(_polygons(thing.get("geometry", thing)))
            names = _class_names(properties.get("classification"))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise _Odd(f"{where} is no valid GeoJSON ({error})") from error
        if polygons:
            yield Shape(names, polygons)


def _kind(feature: dict[str, Any], properties: dict[str, Any]) -> str:
    """What kind of object QuPath says it is; what says nothing is an annotation.

    `objectType` (since 0.4), `object_type` (0.3), `type`, or the feature's `id` (0.2: PathDetectionObject)."""
    for key in ("objectType", "object_type"):
        if isinstance(properties.get(key), str):
            return _plain_kind(properties[key])
    for text in (properties.get("type"), feature.get("id")):  # which mean other things in other programs
        if isinstance(text, str) and _plain_kind(text) in _KINDS:
            return _plain_kind(text)
    return "annotation"


def _plain_kind(text: str) -> str:
    """`annotation` of PathAnnotationObject, `tma_core` of TMACoreObject."""
    return text.strip().lower().removeprefix("path").removesuffix("object").strip(" _")


def _class_names(classification: Any) -> tuple[str, ...]:
    """The base of a class in all spellings: names: [base, ...], "base: ...", or the outermost parentClass."""
    while isinstance(classification, dict):
        if isinstance(classification.get("parentClass"), (dict, str)) and classification["parentClass"]:
            classification = classification["parentClass"]
        else:
            classification = classification.get("names") or classification.get("name")
    if isinstance(classification, list):
        classification = classification[0] if classification else None
    return (str(classification).partition(":")[0].strip(),) if classification is not None else ()


def _polygons(geometry: Any) -> Iterator[Rings]:
    if geometry is None:
        return  # RFC 7946: a feature without a place
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part)
    elif kind in ("Polygon", "MultiPolygon"):
        for polygon in [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]:
            rings = tuple(np.asarray(ring, float)[:, :2] for ring in polygon)
            if any(len(r) < 3 or not np.isfinite(r).all() for r in rings):
                raise ValueError("a ring of fewer than 3 finite corners")
            if rings:
                yield rings
    elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        raise ValueError(f"unknown geometry {kind!r}")


# ---------------------------------------------------------------------------------------------- XML


@dataclass
class _Element:
    tag: str
    attributes: dict[str, str]
    inside: list[_Element] = field(default_factory=list)

    def all(self, *tags: str) -> Iterator[_Element]:
        """Elements of these names within it, at any depth (which is bounded)."""
        for one in self.inside:
            if one.tag in tags:
                yield one
            yield from one.all(*tags)

    def get(self, name: str) -> str:
        return self.attributes.get(name, "").strip()


class _Builder:
    """What the XML parser fills: elements without their texts, bounded in depth, and no document type."""

    def __init__(self) -> None:
        self.open: list[_Element] = [_Element("", {})]

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise _Odd("it declares an XML document type, which no annotation program writes and which is not read")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if len(self.open) > _MAX_DEPTH:
            raise _Odd(f"it has more than {_MAX_DEPTH} XML elements within each other")
        made = _Element(tag.rpartition("}")[2], attributes)
        self.open[-1].inside.append(made)
        self.open.append(made)

    def end(self, tag: str) -> None:
        self.open.pop()

    def close(self) -> _Element:
        return self.open[0].inside[0]


def _xml(raw: bytes) -> list[Shape]:
    parser = ElementTree.XMLParser(target=_Builder())
    source = io.BytesIO(raw)
    while some := source.read(1 << 16):
        parser.feed(some)
    root = cast(_Element, parser.close())  # what the target makes
    readers: dict[str, Callable[[_Element], Iterator[Shape]]] = {"ASAP_Annotations": _asap, "Annotations": _imagescope}
    if root.tag not in readers:
        raise _Odd(f"<{root.tag}> is XML of an unknown kind: ASAP writes <ASAP_Annotations>, ImageScope <Annotations>")
    return list(readers[root.tag](root))


def _asap(root: _Element) -> Iterator[Shape]:
    groups = {g.get("Name"): g.get("PartOfGroup") for g in root.all("Group")}
    for annotation in root.all("Annotation"):
        if annotation.get("Type") in ("Dot", "PointSet", "Measurement"):
            continue
        corners = sorted(annotation.all("Coordinate"), key=lambda c: _number(c, "Order", 0.0))
        name = annotation.get("PartOfGroup")
        for _ in range(len(groups)):  # to the outermost, also where the groups run in a circle
            if groups.get(name, "None") in ("", "None"):
                break
            name = groups[name]
        if len(corners) >= 3:
            yield Shape((name,) if name not in ("", "None") else (), ((_corners(corners),),))


def _imagescope(root: _Element) -> Iterator[Shape]:
    for layer in root.all("Annotation"):
        for region in layer.all("Region"):
            points = _corners(list(region.all("Vertex", "V")))
            kind = region.get("Type").lower()
            if kind in ("2", "ellipse") and len(points) >= 2:
                points = _ellipse(points)
            elif kind in ("1", "rectangle") and len(points) == 2:
                (x0, y0), (x1, y1) = points
                points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
            elif kind not in ("", "0", "1", "polygon", "rectangle", "freehand"):
                continue  # arrows, rulers and pins have no area
            if len(points) >= 3:
                names = tuple(n for n in (region.get("Text"), layer.get("Name")) if n)
                yield Shape(names, ((points,),), region.get("NegativeROA").lower() in ("1", "true"))


def _corners(elements: list[_Element]) -> np.ndarray:
    return np.array([[_number(e, "X"), _number(e, "Y")] for e in elements], float).reshape(-1, 2)


def _number(element: _Element, name: str, default: float | None = None) -> float:
    text = element.get(name)
    if not text and default is not None:
        return default
    try:
        value = float(text.replace(",", "."))  # as ASAP and ImageScope write it where the decimal sign is a comma
    except ValueError:
        raise _Odd(f"<{element.tag}> has {name}={text!r}, which is no number") from None
    if not np.isfinite(value):
        raise _Odd(f"<{element.tag}> has {name}={text!r}, which is no place")
    return value


def _ellipse(points: np.ndarray) -> np.ndarray:
    """The ellipse in the box around `points`, as 64 corners."""
    low, high = points.min(axis=0), points.max(axis=0)
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.asarray((low + high) / 2 + np.stack([np.cos(angle), np.sin(angle)], axis=1) * (high - low) / 2)
