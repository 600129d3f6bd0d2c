"""Drawn regions: what each class means in every spelling, from which corner files count, and what is written again."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhim.extract.tiles import geojson, region_files, regions


def blobs(seed: int) -> np.ndarray:
    """bool (60, 80): a few random pieces with holes, thicker than a pixel."""
    noise = np.random.default_rng(seed).standard_normal((60, 80)).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 3) > 0.02)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), origin=st.tuples(st.integers(0, 5000), st.integers(0, 5000)))
def test_the_round_trip_gives_the_mask_back(
    seed: int, origin: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    mask = blobs(seed)
    bounds, per_px = (*origin, 80 * 16, 60 * 16), (16.0, 16.0)
    path = tmp_path_factory.mktemp("g") / "t.geojson"
    path.write_text(geojson.dumps(geojson.tissue_features(mask, per_px)))
    back = regions.apply(np.zeros_like(mask), regions.read(path, origin), bounds, per_px)
    assert (mask ^ back).sum() <= 0.01 * mask.sum(), "a QuPath file shifts no border"


def test_tiles_carry_their_numbers_and_count_from_the_bounds() -> None:
    coords = np.array([[512, 256], [768, 256]])
    numbers = {"tissue": np.array([0.5, 1.0])}
    features = geojson.tile_features(coords, (256.5, 256.5), numbers, (512, 0), "a.svs", "Tile")
    parsed = json.loads(geojson.dumps(features))["features"]
    assert [f["properties"]["objectType"] for f in parsed] == ["tile", "tile"]
    assert parsed[0]["geometry"]["coordinates"][0][0] == [0, 256]
    assert parsed[0]["geometry"]["coordinates"][0][2] == [256.5, 512.5]
    assert parsed[1]["properties"]["measurements"] == {"tissue": 1.0}
    assert parsed[1]["properties"]["classification"]["name"] == "Tile"
    assert len({f["id"] for f in parsed}) == 2
    for f in parsed:
        ring = f["geometry"]["coordinates"][0]
        assert ring[0] == ring[-1], "closed, as GeoJSON demands"


def square(x: float, y: float, edge: float) -> dict[str, Any]:
    ring = [[x, y], [x + edge, y], [x + edge, y + edge], [x, y + edge], [x, y]]
    return {"type": "Polygon", "coordinates": [ring]}


def feature(geometry: dict[str, Any] | None, **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def save(path: Path, *features: Any) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def roles(path: Path) -> list[str]:
    return [r.role for r in regions.read(path).regions]


SPELLINGS = {
    "simple": lambda base, derived: {"name": base},
    "0.4": lambda base, derived: {"names": [base, derived]},
    "colon": lambda base, derived: {"name": f"{base}: {derived}"},
    "text": lambda base, derived: f"{base}: {derived}",
    "parent": lambda base, derived: {"name": derived, "parentClass": {"name": base}},
    "grandparent": lambda base, derived: {
        "name": "x", "parentClass": {"name": derived, "parentClass": {"name": base, "parentClass": None}},
    },
    "list": lambda base, derived: [base, derived],
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("base", "role"),
    [("Tissue", "tissue"), ("tissue", "tissue"), ("Ignore*", "exclude"), ("Ignore", "exclude"), ("Exclude", "exclude"),
     ("EXCLUDE", "exclude"), ("Tumor", "include"), ("Tissue fold", "include"), ("tissue edited", "include"),
     ("Penile SCC", "include"), ("Other", "include"), ("Artifact", "include"), ("Region*", "include"),
     ("Ignored nuclei", "include"), ("Excluded", "include"), ("Not Exclude", "include")],
)  # fmt: skip
@pytest.mark.parametrize("derived", ["Fold", "Exclude", "Tissue"])
def test_the_base_class_decides(base: str, role: str, derived: str, spelling: str, tmp_path: Path) -> None:
    classification = SPELLINGS[spelling](base, derived)
    assert roles(save(tmp_path / "r.geojson", feature(square(0, 0, 9), classification=classification))) == [role]


@pytest.mark.parametrize("classification", [None, "", {}, {"name": None}, {"names": []}, [], {"color": [1, 2, 3]}])
def test_without_a_class_it_confines(classification: Any, tmp_path: Path) -> None:
    assert roles(save(tmp_path / "r.geojson", feature(square(0, 0, 9), classification=classification))) == ["include"]


def test_a_class_that_sounds_as_if_it_cut_out_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "r.geojson", feature(square(0, 0, 9), classification={"name": "Artifact"}))
    assert "class Artifact confine the tissue" in regions.read(path).notes[0]


KINDS = {
    "objectType": ("annotation", "detection", "cell", "tile", "tma_core"),
    "object_type": ("annotation", "detection", "cell", "tile", "tma_core"),
    "type": ("annotation", "Detection", "cell", "TILE", "tmaCore"),
    "id": ("PathAnnotationObject", "PathDetectionObject", "PathCellObject", "PathTileObject", "TMACoreObject"),
}


@pytest.mark.parametrize("key", KINDS)
def test_only_annotations_are_regions(key: str, tmp_path: Path) -> None:
    found = []
    for kind in KINDS[key]:
        one = feature(square(0, 0, 9))
        (one if key == "id" else one["properties"])[key] = kind
        save(tmp_path / "r.geojson", one, feature(square(20, 0, 9)))
        found.append(len(regions.read(tmp_path / "r.geojson").regions))
    assert found == [2, 1, 1, 1, 1]


def test_other_programs_may_use_type_and_id_for_themselves(tmp_path: Path) -> None:
    one = feature(square(0, 0, 9), type="Tumor") | {"id": "7c6f"}
    assert roles(save(tmp_path / "r.geojson", one)) == ["include"]


@pytest.mark.parametrize("key", ["childObjects", "children"])
def test_children_count_to_any_depth_also_of_what_is_no_region(key: str, tmp_path: Path) -> None:
    inner = feature(square(2, 2, 3), classification={"names": ["Ignore*", "Blur"]})
    middle = feature(square(1, 1, 7), objectType="tma_core", **{key: [inner]})
    outer = feature(None, objectType="root", **{key: [middle, feature(square(1, 1, 5))]})
    assert sorted(roles(save(tmp_path / "r.geojson", outer))) == ["exclude", "include"]


def test_encodings_and_packings(tmp_path: Path) -> None:
    text = json.dumps([feature(square(0, 0, 9), name="Süd")], ensure_ascii=False)
    kept = {}
    for name in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        kept[name] = text.encode(name)
    kept["gz"] = gzip.compress(text.encode())
    for name, raw in kept.items():
        (tmp_path / name).write_bytes(raw)
        assert roles(tmp_path / name) == ["include"], name
    with zipfile.ZipFile(tmp_path / "zip", "w") as z:
        z.writestr("r.geojson", text)
    assert roles(tmp_path / "zip") == ["include"]


def test_a_feature_without_a_place_is_no_fault(tmp_path: Path) -> None:
    line = {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}
    empty = {"type": "MultiPolygon", "coordinates": []}
    features = (feature(None), feature(line), feature(empty), feature(square(0, 0, 9)))
    assert roles(save(tmp_path / "r.geojson", *features)) == ["include"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"features": 3}', '{"features": [3]}', '{"features": [{"geometry": null}]}',
     '{"features": [{"geometry": {"type": "Polygon", "coordinates": [[[0, 0]]]}}]}',
     '{"features": [{"geometry": {"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [2, 2]]]}}]}',
     '{"features": [{"geometry": {"type": "Polygon", "coordinates": [[[NaN, 0], [1, 1], [2, 2]]]}}]}',
     '{"features": [{"geometry": {"type": "Circle"}}]}', '{"features": [{"geometry": 3}]}',
     '{"geometry": {"type": "GeometryCollection", "geometries": 3}}', "[" * 100_000, "1" * 5000,
     '{"geometry": ' + '{"type": "GeometryCollection", "geometries": [' * 400 + "]}" * 400 + "}",
     "<", "<a/>", "<Annotations/>", "<Annotations>" * 100, "<Annotations" + ">" * 3,
     '<?xml version="1.0" encoding="nonsense"?><Annotations/>',
     "<ASAP_Annotations><Annotation><Coordinate X='1' Y='2'/><Coordinate X='1' Y='b'/><Coordinate X='1' Y='2'/>"
     "</Annotation></ASAP_Annotations>",
     '<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;&x;">]><Annotations>&z;</Annotations>'],
)  # fmt: skip
def test_what_is_no_region_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.geojson"
    path.write_text(text)
    with pytest.raises(regions.BadRegions, match=r"odd\.geojson"):
        regions.read(path)


def test_what_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_files, "MAX_BYTES", 1 << 20)
    (tmp_path / "r.geojson.gz").write_bytes(gzip.compress(b" " * (2 << 20)))
    with pytest.raises(regions.BadRegions, match="larger than 1 MiB"):
        regions.read(tmp_path / "r.geojson.gz")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"[]" * 1000)[:-9])
    with pytest.raises(regions.BadRegions, match=r"cut\.gz"):
        regions.read(tmp_path / "cut.gz")
    with pytest.raises(regions.BadRegions, match="does not exist"):
        regions.read(tmp_path / "none.geojson")


ASAP = """<?xml version="1.0"?><ASAP_Annotations><Annotations>
<Annotation Name="Annotation 0" Type="Polygon" PartOfGroup="Folds" Color="#F4FA58"><Coordinates>
<Coordinate Order="1" X="140" Y="20"/><Coordinate Order="0" X="100" Y="20"/><Coordinate Order="2" X="140" Y="60"/>
<Coordinate Order="3" X="100" Y="60"/></Coordinates></Annotation>
<Annotation Name="Annotation 1" Type="Dot" PartOfGroup="Tumor" Color="#F4FA58"><Coordinates>
<Coordinate Order="0" X="1" Y="2"/></Coordinates></Annotation>
<Annotation Name="Annotation 2" Type="Spline" PartOfGroup="None" Color="#F4FA58"><Coordinates>
<Coordinate Order="0" X="1,5" Y="2"/><Coordinate Order="1" X="9" Y="2"/><Coordinate Order="2" X="9" Y="9"/>
</Coordinates></Annotation></Annotations>
<AnnotationGroups><Group Name="Exclude" PartOfGroup="None" Color="#0"/><Group Name="Folds" PartOfGroup="Exclude"/>
</AnnotationGroups></ASAP_Annotations>"""


def test_asap(tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(ASAP)
    drawn = regions.read(tmp_path / "r.xml", (1000, 2000))
    assert [r.role for r in drawn.regions] == ["exclude", "include"]
    assert drawn.frame == "full"
    assert drawn.regions[0].polygons[0][0].tolist() == [[100, 20], [140, 20], [140, 60], [100, 60]]
    assert drawn.regions[1].polygons[0][0][0].tolist() == [1.5, 2]
    shifted = regions.read(tmp_path / "r.xml", (1000, 2000), "bounds")
    assert shifted.regions[0].polygons[0][0][0].tolist() == [1100, 2020]


def imagescope(layer: str, *inside: str, root: str = '<Annotations MicronsPerPixel="0.5">') -> str:
    return f'{root}<Annotation Id="1" Name="{layer}"><Regions>{"".join(inside)}</Regions></Annotation></Annotations>'


def region(points: list[tuple[int, int]], vertex: str = "Vertex", **attributes: object) -> str:
    given = " ".join(f'{k}="{v}"' for k, v in attributes.items())
    corners = "".join(f'<{vertex} X="{x}" Y="{y}" Z="0"/>' for x, y in points)
    return f"<Region {given}><Vertices>{corners}</Vertices></Region>"


BOX = [(10, 10), (50, 10), (50, 50), (10, 50)]


@pytest.mark.parametrize(
    ("layer", "attributes", "role"),
    [("", {"Type": 0}, "include"), ("Exclude", {"Type": 0}, "exclude"), ("Tumor", {"NegativeROA": 1}, "exclude"),
     ("Tumor", {"Text": "Ignore*"}, "exclude"), ("Exclude", {"Text": "pen"}, "exclude"),
     ("Exclude", {"NegativeROA": 1}, "spare"), ("Tissue", {"Type": "Polygon"}, "tissue")],
)  # fmt: skip
def test_imagescope_and_halo(layer: str, attributes: dict[str, object], role: str, tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(imagescope(layer, region(BOX, **attributes)))
    drawn = regions.read(tmp_path / "r.xml", (7, 7))
    assert [r.role for r in drawn.regions] == [role]
    assert drawn.regions[0].polygons[0][0].tolist() == [list(p) for p in BOX]


def test_shapes_of_two_corners_and_those_without_area(tmp_path: Path) -> None:
    two = [(10, 10), (50, 30)]
    file = imagescope(
        "", region(two, "V", Type="Rectangle"), region(two, Type=2), region(two, Type=4), region([(1, 1)], Type=0)
    )
    (tmp_path / "r.annotations").write_text(file)
    box, ellipse = regions.read(tmp_path / "r.annotations").regions
    assert box.polygons[0][0].tolist() == [[10, 10], [50, 10], [50, 30], [10, 30]]
    area = cv2.contourArea(ellipse.polygons[0][0].astype(np.float32))
    assert area == pytest.approx(np.pi * 20 * 10, rel=0.01)


def painted(*features: Any, shape: tuple[int, int] = (60, 60), path: Path) -> np.ndarray:
    drawn = regions.read(save(path, *features))
    return regions.apply(np.ones(shape, bool), drawn, (0, 0, shape[1], shape[0]), (1.0, 1.0))


def test_holes_and_crossing_rings(tmp_path: Path) -> None:
    outer = square(10, 10, 20)["coordinates"][0]
    beyond = square(20, 20, 30)["coordinates"][0]
    mask = painted(feature({"type": "Polygon", "coordinates": [outer, beyond]}), path=tmp_path / "a")
    assert mask[15, 15]
    assert not mask[25, 25]
    assert not mask[45, 45], "a hole that reaches out of its polygon is no area"
    bow_tie = [[0, 0], [40, 40], [40, 0], [0, 40], [0, 0]]
    mask = painted(feature({"type": "Polygon", "coordinates": [bow_tie]}), path=tmp_path / "b")
    assert mask[20, 5]
    assert mask[20, 35]
    assert not mask[5, 20]


def test_places_beyond_all_numbers_do_no_harm(tmp_path: Path) -> None:
    mask = painted(feature(square(-1e15, -1e15, 2e15)), path=tmp_path / "a")
    assert mask.all()
    assert not painted(feature(square(1e12, 1e12, 5)), path=tmp_path / "b").any()


def test_a_spared_region_of_a_layer_that_is_cut_out_stays(tmp_path: Path) -> None:
    inner = [(20, 20), (30, 20), (30, 30), (20, 30)]
    (tmp_path / "r.xml").write_text(imagescope("Exclude", region(BOX), region(inner, NegativeROA=1)))
    mask = regions.apply(np.ones((60, 60), bool), regions.read(tmp_path / "r.xml"), (0, 0, 60, 60), (1.0, 1.0))
    assert mask[25, 25]
    assert not mask[15, 15]
    assert mask[55, 55]
