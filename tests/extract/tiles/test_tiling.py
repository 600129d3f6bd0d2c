"""One slide to its tiles: the same bytes each time, filters that need no slide, regions, tiles as files."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from mhim.configs.schema import TileConfig
from mhim.extract import SlideError
from mhim.extract.tiles.regions import BadRegions
from mhim.extract.tiles.tiling import ARTEFACTS, Tiled, refilter, tile_slide, unpack_mask
from tests.extract.slides import tissue_rgb, write_svs

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "slides"
SMALL = TileConfig(tile_px=64, min_piece_um2=500, blur_probe_um=100)


def equal(a: Tiled, b: Tiled) -> bool:
    return (
        list(a.arrays) == list(b.arrays)
        and all(a.arrays[k].dtype == b.arrays[k].dtype and np.array_equal(a.arrays[k], b.arrays[k]) for k in a.arrays)
        and (a.attrs, a.empty, a.notes) == (b.attrs, b.empty, b.notes)
    )  # fmt: skip


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("slides") / "a.svs", tissue_rgb(1536, 2048))


@pytest.fixture(scope="module")
def inked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tissue with a blue stroke that starts on glass and runs across it, and a blurred right half."""
    rgb = tissue_rgb(1536, 2048).copy()
    rgb[:, 1024:] = cv2.GaussianBlur(rgb[:, 1024:], (0, 0), 8)
    stroke = np.zeros(rgb.shape[:2], np.uint8)
    cv2.line(stroke, (40, 300), (1000, 700), 1, 160)
    ink = np.exp(-np.array([1.5, 0.9, 0.12]))
    rgb = np.where(stroke[..., None] > 0, rgb * ink, rgb).astype(np.uint8)
    return write_svs(tmp_path_factory.mktemp("slides") / "ink.svs", rgb)


def test_the_same_slide_gives_the_same_bytes(svs: Path) -> None:
    first, second = tile_slide(svs, SMALL), tile_slide(svs, SMALL)
    assert equal(first, second)
    assert first.overlay is not None
    assert np.array_equal(first.overlay, second.overlay)  # type: ignore[arg-type]


def test_the_contract_of_the_arrays(svs: Path) -> None:
    tiled = tile_slide(svs, SMALL)
    n = len(tiled.arrays["coords"])
    assert n > 100
    assert tiled.arrays["coords"].dtype == np.int32
    for name in ("tissue", *ARTEFACTS):
        assert tiled.arrays[name].shape == (n,)
        assert tiled.arrays[name].dtype == np.float32
    assert json.loads(json.dumps(tiled.attrs)) == tiled.attrs, "plain JSON only"
    assert str(svs.parent) not in json.dumps(tiled.attrs)
    assert tiled.attrs["tile_um"] == 32.0
    order = np.lexsort((tiled.arrays["coords"][:, 0], tiled.arrays["coords"][:, 1]))
    assert np.array_equal(order, np.arange(n)), "row by row"


def test_tissue_fractions_are_those_of_the_stored_mask(svs: Path) -> None:
    tiled = tile_slide(svs, SMALL)
    mask = unpack_mask(tiled.arrays["mask"], tiled.attrs["mask_px"][0])
    (x, y), share = tiled.arrays["coords"][40], tiled.arrays["tissue"][40]
    assert (x % 64, y % 64) == (0, 0), "anchored at the slide's corner"
    assert share == pytest.approx(mask[y // 16 : y // 16 + 4, x // 16 : x // 16 + 4].mean(), abs=1e-6)
    assert tiled.attrs["tissue_um2"] == mask.sum() * 64.0


def test_the_disc_is_found(svs: Path) -> None:
    tiled = tile_slide(svs, SMALL)
    mask = unpack_mask(tiled.arrays["mask"], tiled.attrs["mask_px"][0])
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] * 16 + 8
    truth = (x - 1024) ** 2 + (y - 768) ** 2 < (0.42 * 1536) ** 2
    assert (mask & truth).sum() / (mask | truth).sum() > 0.95


def test_pen_is_no_tissue_on_glass_and_a_fraction_on_tissue(inked: Path) -> None:
    tiled = tile_slide(inked, SMALL)
    mask = unpack_mask(tiled.arrays["mask"], tiled.attrs["mask_px"][0])
    assert not mask[300 // 16 - 2 : 300 // 16 + 3, 3:10].any(), "ink on glass"
    assert mask[42:46, 56:60].all(), "tissue beneath ink"
    pen, coords = tiled.arrays["pen"], tiled.arrays["coords"]
    on_stroke = np.abs(coords[:, 1] + 32 - (300 + (coords[:, 0] + 32 - 40) * 400 / 960)) < 30
    inside = on_stroke & (coords[:, 0] > 560) & (coords[:, 0] < 900)
    assert inside.sum() > 3
    assert pen[inside].min() > 0.9
    assert pen[coords[:, 1] > 1000].max() == 0


def test_blur_is_measured_where_it_is(inked: Path) -> None:
    tiled = tile_slide(inked, SMALL)
    x, blur = tiled.arrays["coords"][:, 0], tiled.arrays["blur"]
    assert blur[x > 1250].mean() > 0.9
    assert blur[x < 800].mean() < 0.1


def test_filtering_later_equals_filtering_at_once(inked: Path) -> None:
    config = SMALL.model_copy(update={"mpp": (0.5, 1.0)})
    strict = config.model_copy(update={"max_pen": 0.2, "max_blur": 0.5})
    loose_first, at_once = tile_slide(inked, config), tile_slide(inked, strict)
    later = refilter(loose_first.arrays, loose_first.attrs, strict)
    assert 0 < len(later.arrays["coords"]) < len(loose_first.arrays["coords"])
    assert equal(later, Tiled(at_once.arrays, at_once.attrs, None, at_once.empty, at_once.notes))
    back = refilter(later.arrays, later.attrs, config)
    assert equal(back, Tiled(loose_first.arrays, loose_first.attrs, None, None, loose_first.notes))
    assert later.arrays["pen"].max() <= 0.2


@pytest.mark.parametrize("limit", [{"max_pen": 0.5}, {"max_blur": 0.5}, {"max_fold": 0.5}, {"max_haze": 0.5}])
def test_each_artefact_has_its_own_threshold(svs: Path, limit: dict[str, float]) -> None:
    (artefact,) = (name.removeprefix("max_") for name in limit)
    tiled = tile_slide(svs, SMALL.model_copy(update={"overlay": False}))
    share = np.zeros(len(tiled.arrays[artefact]), np.float32)
    share[:7] = 0.6
    clean = {name: np.zeros_like(share) for name in ARTEFACTS}
    kept = refilter(tiled.arrays | clean | {artefact: share}, tiled.attrs, SMALL.model_copy(update=limit))
    assert np.array_equal(kept.arrays["coords"], tiled.arrays["coords"][7:])


@pytest.mark.parametrize("setting", [{"segment_mpp": 4.0}, {"smooth_um": 40.0}])
def test_how_tissue_is_looked_at_moves_the_mask(svs: Path, setting: dict[str, float]) -> None:
    before, after = tile_slide(svs, SMALL), tile_slide(svs, SMALL.model_copy(update=setting))
    assert not np.array_equal(before.arrays["mask"], after.arrays["mask"])
    if "segment_mpp" in setting:
        assert after.attrs["mask_mpp"] == pytest.approx([4.0, 4.0])


def test_a_slide_too_coarse_is_refused_or_enlarged_as_allowed(svs: Path) -> None:
    fine = SMALL.model_copy(update={"mpp": (0.3,)})  # 1.67 times the slide's own
    with pytest.raises(SlideError, match=r"tile.max_upsample is 1\.25"):
        tile_slide(svs, fine)
    tiled = tile_slide(svs, fine.model_copy(update={"max_upsample": 2.0}))
    assert len(tiled.arrays["coords"]) > 0


def test_a_filter_that_takes_most_warns_and_one_that_takes_all_is_empty(inked: Path) -> None:
    tiled = tile_slide(inked, SMALL.model_copy(update={"overlay": False}))
    arrays = tiled.arrays | {"pen": np.linspace(0.1, 1, len(tiled.arrays["pen"]), dtype=np.float32)}
    most = refilter(arrays, tiled.attrs, SMALL.model_copy(update={"max_pen": 0.3}))
    assert "drop" in most.notes[0]
    assert most.empty is None
    every = refilter(arrays, tiled.attrs, SMALL.model_copy(update={"max_pen": 0.0}))
    assert every.empty is not None
    assert "max_pen" in every.empty
    assert equal(refilter(every.arrays, every.attrs, SMALL), refilter(arrays, tiled.attrs, SMALL))


def test_magnifications_share_one_grid(svs: Path) -> None:
    tiled = tile_slide(svs, SMALL.model_copy(update={"mpp": (0.5, 2.0, 1.0)}))
    arrays = tiled.arrays
    for child, parent, size in (("", "_mpp1", 128), ("_mpp1", "_mpp2", 256)):
        index = arrays["parent" + child]
        has = index >= 0
        offset = arrays["coords" + child][has] - arrays["coords" + parent][index[has]]
        assert has.any()
        assert ((offset >= 0) & (offset < size)).all()
    assert "parent_mpp2" not in arrays


def test_the_second_segmenter_is_tried_and_named(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", tissue_rgb(1024, 1024))
    nothing = {"min_chroma": 1.0, "max_chroma": 1.0, "dark_od": 9.0, "membrane_od": 0}
    blind = SMALL.model_copy(update={"segmenter_params": nothing})
    tiled = tile_slide(path, blind)
    assert tiled.attrs["segmenter"] == "otsu"
    assert "stain found no tissue; otsu found some" in tiled.notes[0]
    alone = tile_slide(path, blind.model_copy(update={"fallback_segmenter": ""}))
    assert alone.empty == "no tissue found (stain)"


def test_regions_edit_the_tissue(svs: Path, tmp_path: Path) -> None:
    def geojson(*features: tuple[str, list[list[int]]]) -> Path:
        path = tmp_path / "r.geojson"
        made = [
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
             "properties": {"objectType": "annotation", "classification": {"name": name}}}
            for name, ring in features
        ]  # fmt: skip
        path.write_text(json.dumps({"type": "FeatureCollection", "features": made}))
        return path

    left = [[0, 0], [1024, 0], [1024, 1536], [0, 1536], [0, 0]]
    plain = tile_slide(svs, SMALL).arrays["coords"]
    inside = tile_slide(svs, SMALL, regions=geojson(("ROI", left))).arrays["coords"]
    outside = tile_slide(svs, SMALL, regions=geojson(("Exclude", left))).arrays["coords"]
    assert np.array_equal(inside, plain[plain[:, 0] < 1024])
    assert np.array_equal(outside, plain[plain[:, 0] >= 1024])
    drawn = tile_slide(svs, SMALL, regions=geojson(("Tissue", [[0, 0], [256, 0], [256, 128], [0, 128]])))
    assert len(drawn.arrays["coords"]) == 8
    assert drawn.attrs["segmenter"] == "stain + regions"
    (tmp_path / "bad").write_text("{")
    with pytest.raises(BadRegions, match="no GeoJSON"):
        tile_slide(svs, SMALL, regions=tmp_path / "bad")


def test_tiles_are_saved_as_they_are_read(svs: Path, tmp_path: Path) -> None:
    from mhim.extract.slide.slide import open_slide

    config = SMALL.model_copy(update={"tile_px": 256, "save_tiles": "png"})
    tiled = tile_slide(svs, config, tiles_out=tmp_path / "t" / "a.svs")
    files = {p.name for p in (tmp_path / "t" / "a.svs").iterdir()}
    assert files == {f"{x}_{y}.png" for x, y in tiled.arrays["coords"].tolist()}
    x, y = tiled.arrays["coords"][3].tolist()
    with open_slide(svs) as slide:
        stored = cv2.imread(str(tmp_path / "t" / "a.svs" / f"{x}_{y}.png"))
        assert np.array_equal(stored[..., ::-1], slide.read_region(x, y, 256, 0.5))
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["a.svs"], "nothing is left aside"


def test_an_overlap_as_large_as_the_tile_is_refused(svs: Path) -> None:
    with pytest.raises(SlideError, match="overlap_um"):
        tile_slide(svs, SMALL.model_copy(update={"overlap_um": 32.0}))


@pytest.mark.skipif(not (SHARED / "A.svs").exists(), reason="needs data: real slides, in ../shared/slides")
def test_mask_and_tiles_of_a_known_slide() -> None:
    from mhim.extract.tiles.grid import Grid, box_means

    truth = np.load(SHARED / "A_truemask64.npy")
    config = TileConfig(overlay=False, blur_probe_um=0)
    tiled = tile_slide(SHARED / "A.svs", config)
    mask = unpack_mask(tiled.arrays["mask"], tiled.attrs["mask_px"][0])
    # The truth has the value of one point, the upper left corner of its square: 313 = 20000/64 rounded up, as [::64]
    # gives; a bare threshold on saturation at 2 µm/px, sampled at any offset in steps of 8 px, agrees best with it at
    # (0, 0); right of the last true column's corner tissue goes on for half a square on average, left of the first one
    # it began half a square before. So both are compared in those points, and squares lie around them. (Read as areas
    # the truth is shifted by half a square: its own tiles then agree to .977 with those of its points.)
    points = mask[::4, ::4]
    assert (points & truth).sum() / (points | truth).sum() >= 0.98
    x, y = Grid((0, 0, 20000, 20000), (0.5, 0.5), 256).axes(0.5)
    row, col = np.nonzero(box_means(truth, x / 64 + 0.5, y / 64 + 0.5, (4.0, 4.0)) >= config.min_tissue)
    expected = set(zip(x[col].tolist(), y[row].tolist(), strict=True))
    got = set(map(tuple, tiled.arrays["coords"].tolist()))
    assert len(got & expected) / len(got | expected) >= 0.98


def test_only_the_scanned_part_of_a_slide_is_tiled(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MRXS has it: the scan lies somewhere in a larger plane, and the bounds say where."""
    from mhim.extract.slide import slide as slides
    from mhim.extract.slide import source as source_

    x, y, w, h = 300, 220, 1400, 1100
    keys = {f"openslide.bounds-{k}": str(v) for k, v in (("x", x), ("y", y), ("width", w), ("height", h))}
    opened = slides._open_source

    def bounded(path: Path) -> source_.Source:
        source = opened(path)
        source.properties = {**source.properties, **keys}
        return source

    whole = tile_slide(svs, SMALL)
    monkeypatch.setattr(slides, "_open_source", bounded)
    part = tile_slide(svs, SMALL)
    assert part.attrs["bounds_l0"] == [x, y, w, h]
    assert part.attrs["size_l0"] == whole.attrs["size_l0"]
    coords = part.arrays["coords"]
    assert ((coords - (x, y)) % 64 == 0).all(), "anchored at the bounds' corner, in px of the whole plane"
    assert coords.min(axis=0).tolist() >= [x, y]
    assert (coords.max(axis=0) + 64 <= (x + w, y + h)).all()
    inside = unpack_mask(whole.arrays["mask"], whole.attrs["mask_px"][0]).repeat(16, 0).repeat(16, 1)
    for (tile_x, tile_y), share in zip(coords.tolist(), part.arrays["tissue"].tolist(), strict=True):
        assert inside[tile_y : tile_y + 64, tile_x : tile_x + 64].mean() == pytest.approx(share, abs=0.35)
    assert inside[y : y + h, x : x + w].mean() == pytest.approx(part.attrs["tissue_fraction"], abs=0.02)


def test_blur_is_probed_once_a_slide_for_several_magnifications(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mhim.extract.tiles import artefacts

    calls: list[int] = []
    measure = artefacts.sharpness
    monkeypatch.setattr(artefacts, "sharpness", lambda rgb: calls.append(1) or measure(rgb))
    alone = tile_slide(svs, SMALL)
    once = len(calls)
    calls.clear()
    several = tile_slide(svs, SMALL.model_copy(update={"mpp": (0.5, 1.0, 2.0)}))
    assert once > 5
    assert len(calls) == once
    assert np.array_equal(several.arrays["blur"], alone.arrays["blur"])


def test_saved_images_follow_a_later_threshold(inked: Path, tmp_path: Path) -> None:
    from mhim.pipeline.cli.main import _main

    def run(max_pen: float) -> dict[str, bytes]:
        settings = {
            **SMALL.model_dump(include={"tile_px", "min_piece_um2", "blur_probe_um"}),
            "save_tiles": "png",
            "max_pen": max_pen,
            "overlay": False,
        }
        given = [part for name, value in settings.items() for part in ("--set", f"tile.{name}={value}")]
        assert _main(["tile", str(inked), "--work", str(tmp_path), "--workers", "1", *given]) == 0
        return {p.name: p.read_bytes() for p in (tmp_path / "tile_images" / inked.name).iterdir()}

    first, fewer = run(1.0), run(0.2)
    assert 0 < len(fewer) < len(first)
    assert fewer.items() < first.items()
    assert run(1.0) == first, "those that came back are read again"


def drawn(path: Path, name: str, x: int, y: int, edge: int) -> Path:
    ring = [[x, y], [x + edge, y], [x + edge, y + edge], [x, y + edge], [x, y]]
    one = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
           "properties": {"classification": {"name": name}}}  # fmt: skip
    path.write_text(json.dumps(one))
    return path


def test_where_regions_leave_nothing_the_reason_names_them(svs: Path, tmp_path: Path) -> None:
    """Tissue was found: "no tissue found" would send people to the segmenter's settings."""
    file = tmp_path / "r.geojson"
    for name, x, edge, what in (("Tumor", 90_000, 500, "1 confine"), ("Exclude", 0, 3000, "1 cut out")):
        empty = tile_slide(svs, SMALL, regions=drawn(file, name, x, x, edge)).empty
        assert empty is not None
        assert empty.startswith("tissue found, but nothing of it is left by the regions of r.geojson")
        assert what in empty
    empty = tile_slide(svs, SMALL, regions=drawn(file, "Tumor", 1000, 700, 20)).empty
    assert empty is not None
    assert "no tile has 30% of it that is left by the regions of r.geojson" in empty
    white = write_svs(tmp_path / "white.svs", np.full((1024, 1024, 3), 243, np.uint8))
    assert tile_slide(white, SMALL, regions=file).empty == "no tissue found (stain and otsu)"


def test_regions_count_from_the_bounds_or_from_level_0(
    svs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mhim.extract.slide import slide as slides
    from mhim.extract.slide import source as source_

    x, y = 300, 220
    keys = dict(zip(("x", "y", "width", "height"), (x, y, 1400, 1100), strict=True))
    opened = slides._open_source

    def bounded(path: Path) -> source_.Source:
        source = opened(path)
        source.properties = {**source.properties, **{f"openslide.bounds-{k}": str(v) for k, v in keys.items()}}
        return source

    monkeypatch.setattr(slides, "_open_source", bounded)
    full = SMALL.model_copy(update={"regions_frame": "full"})
    by_bounds = tile_slide(svs, SMALL, regions=drawn(tmp_path / "b.geojson", "Tumor", 512, 256, 512))
    of_level_0 = drawn(tmp_path / "l.geojson", "Tumor", 512 + x, 256 + y, 512)
    by_level_0 = tile_slide(svs, full, regions=of_level_0)
    assert len(by_bounds.arrays["coords"]) == 64
    assert np.array_equal(by_bounds.arrays["coords"], by_level_0.arrays["coords"])
    assert any("(300, 220)" in note for note in by_bounds.notes)
    corners = "".join(
        f'<Vertex X="{512 + x + dx}" Y="{256 + y + dy}"/>' for dx, dy in ((0, 0), (512, 0), (512, 512), (0, 512))
    )
    (tmp_path / "r.xml").write_text(
        f"<Annotations><Annotation><Regions><Region><Vertices>{corners}</Vertices></Region></Regions></Annotation>"
        "</Annotations>"
    )
    xml = tile_slide(svs, SMALL, regions=tmp_path / "r.xml")
    assert np.array_equal(by_bounds.arrays["coords"], xml.arrays["coords"]), "ImageScope counts from level 0"
    lost = tile_slide(svs, SMALL, regions=drawn(tmp_path / "o.geojson", "Tumor", 1350, 1050, 40)).empty
    assert lost is not None
    assert "the corner of the scanned bounds, here (300, 220) of level 0" in lost
