"""Whatever a tiled slide is made of, the default reader gives OpenSlide's pixels, and both give what was painted."""

from __future__ import annotations

import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideJob
from mhim.extract.reading.direct import DirectReader
from mhim.extract.reading.readers import open_reader
from mhim.extract.slide.slide import open_slide
from tests.extract.containers import Traits, write, zeroed

FOUR = ("jpeg",) * 4


def read(
    path: Path, corners: np.ndarray, mpp: float, tile_px: int, reader: str = "auto"
) -> tuple[np.ndarray, str, str]:
    """(tiles, how they were read, why so) at the slide's own µm per px."""
    with open_slide(path) as slide:
        slide_mpp = slide.slide_mpp
    job = SlideJob(path, corners, tile_px, mpp, slide_mpp)
    opened = open_reader(job, ExtractConfig(reader=reader))  # type: ignore[arg-type]
    out = np.empty((len(corners), tile_px, tile_px, 3), np.uint8)
    opened.fill(corners, out)
    opened.close()
    return out, opened.kind, opened.note


def grid(size: tuple[int, int], step: int) -> np.ndarray:
    return np.array([(x, y) for y in range(-40, size[1], step) for x in range(-40, size[0], step)], np.int32)


@st.composite
def drawn(draw: st.DrawFn) -> Traits:
    vendor = draw(st.sampled_from(["generic-tiff", "aperio", "philips", "leica"]))
    factor = draw(st.sampled_from([2, 4]))
    count = draw(st.integers(1, 3 if factor == 2 else 2))
    kinds = {"aperio": ["jpeg", "rgb", "ycc", "zlib"], "generic-tiff": ["jpeg", "zlib", "lzw"]}.get(vendor, ["jpeg"])
    mixed = draw(st.booleans())
    codecs = [draw(st.sampled_from(kinds)) for _ in range(count)]
    w, h = draw(st.integers(9, 60)) * 16, draw(st.integers(9, 50)) * 16
    tile = draw(st.sampled_from([(64, 64), (240, 240), (256, 256), (256, 128), (512, 512), (1024, 1024)]))
    plain = vendor == "generic-tiff"
    return Traits(
        vendor=vendor,
        codecs=tuple(codecs if mixed else codecs[:1] * count),
        size=(-(-w // tile[0]) * tile[0], -(-h // tile[1]) * tile[1]) if vendor == "philips" else (w, h),
        factor=factor,
        tile=tile,
        stray=draw(st.sampled_from([None, *range(1, count)])) if plain else None,
        shuffled=plain and draw(st.booleans()),
        mpp=draw(st.sampled_from([(0.5, 0.5), (0.25, 0.25), (0.25, 0.5)])) if plain else (0.5, 0.5),
        big=draw(st.booleans()),
        at=(draw(st.integers(0, 70)) * 16, draw(st.integers(0, 70)) * 16) if vendor == "leica" else (0, 0),
    )


@given(traits=drawn(), data=st.data())
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_auto_is_openslide_is_what_was_painted(traits: Traits, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, len(traits.codecs) - 1), label="level")
    tile_px = data.draw(st.sampled_from([48, 100, 256]), label="tile_px")
    scale = traits.factor**n
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"s.{'svs' if traits.vendor == 'aperio' else 'tif'}"
        levels = write(path, traits)
        with open_slide(path, file_tiles=True) as slide:
            assert [round(d) for d in slide.level_downsamples] == [traits.factor**k for k in range(len(levels))]
            assert slide.slide_mpp == pytest.approx(traits.mpp)
            assert slide.bounds_l0[:2] == traits.at
            place = st.tuples(st.integers(-60, traits.size[0]), st.integers(-60, traits.size[1]))
            corners = np.array(data.draw(st.lists(place, min_size=1, max_size=6), label="corners")) + traits.at
            mpp = max(slide.slide_mpp) * scale
            saved = np.stack([slide.read_region(x, y, tile_px, mpp) for x, y in corners.tolist()])
        ours, kind, note = read(path, corners, mpp, tile_px)
        theirs, _, _ = read(path, corners, mpp, tile_px, "openslide")
    direct = traits.vendor != "leica" and traits.codecs[n] in ("jpeg", "rgb", "ycc")
    assert kind == ("direct" if direct else "openslide"), note
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(saved, theirs, "what --save-tiles, pictures and the viewer read")
    for tile, corner in zip(ours, corners - traits.at, strict=True):
        expected = cut(levels[n], corner, scale, tile_px, traits.mpp)
        if expected is not None:
            assert np.abs(tile.astype(int) - expected).mean() < 9, "another place or level is 50 off"


def cut(level: np.ndarray, corner: np.ndarray, scale: int, tile_px: int, mpp: tuple[float, float]) -> np.ndarray | None:
    """The tile at a corner of level 0 as painted; None if it is mostly outside."""
    x, y = np.rint(corner / scale).astype(int).tolist()
    w, h = (round(tile_px * max(mpp) / m) for m in mpp)
    white = np.full((level.shape[0] + 2 * h + 200, level.shape[1] + 2 * w + 200, 3), 255, np.uint8)
    white[h + 100 : h + 100 + level.shape[0], w + 100 : w + 100 + level.shape[1]] = level
    part = white[h + 100 + y : h + 100 + y + h, w + 100 + x : w + 100 + x + w]
    if part.shape[:2] != (h, w) or (part == 255).all(2).mean() > 0.5:
        return None
    return cv2.resize(part, (tile_px, tile_px), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(
    ("traits", "mpp", "direct"),
    [
        (Traits(codecs=FOUR, size=(1900, 1504), tile=(1024, 1024)), 2.0, True),  # level 2 fits into one file tile
        (Traits(codecs=FOUR, size=(1920, 1504), tile=(512, 512)), 4.0, True),
        (Traits(codecs=FOUR, size=(800, 640), stray=1), 1.0, True),  # a page of equal size that is no level
        (Traits(codecs=FOUR, size=(800, 640), stray=2, shuffled=True), 2.0, True),
        (Traits(codecs=("jpeg", "zlib"), size=(800, 640)), 1.0, False),  # a level that is not decoded here
        (Traits(codecs=("zlib", "jpeg"), size=(800, 640)), 1.0, True),  # the level that is read is what counts
        (Traits("aperio", ("jpeg", "ycc"), (800, 640)), 1.0, True),
        (Traits("aperio", ("ycc", "rgb"), (800, 640)), 0.5, True),
        (Traits("philips", FOUR[:3], (1024, 768)), 2.0, True),  # level 2 has 192 rows, its page 256
    ],
    ids=lambda v: f"{v.vendor}-{'-'.join(v.codecs)}-{v.tile[0]}-{v.stray}" if isinstance(v, Traits) else str(v),
)
def test_the_level_that_is_meant(tmp_path: Path, traits: Traits, mpp: float, direct: bool) -> None:
    path = tmp_path / "s.tif"
    levels = write(path, traits)
    corners = grid(traits.size, 160)
    ours, kind, note = read(path, corners, mpp, 64)
    np.testing.assert_array_equal(ours, read(path, corners, mpp, 64, "openslide")[0])
    assert kind == ("direct" if direct else "openslide"), note
    n = round(np.log2(mpp / traits.mpp[0]))
    inside = np.flatnonzero((corners > 0).all(1))[0]
    expected = cut(levels[n], corners[inside], 2**n, 64, traits.mpp)
    assert expected is not None
    assert np.abs(ours[inside].astype(int) - expected).mean() < 9


def test_tiles_over_a_missing_one_are_painted_by_openslide(tmp_path: Path) -> None:
    """Aperio: a tile of no bytes makes those over it suspect on every coarser level; OpenSlide paints them anew."""
    path = tmp_path / "s.svs"
    write(path, Traits("aperio", FOUR[:3], (2048, 2048)))
    zeroed(path, 0, [9, 30])
    for mpp in (0.5, 1.0, 2.0):
        corners = grid((2048, 2048), 210)
        ours, kind, note = read(path, corners, mpp, 128)
        np.testing.assert_array_equal(ours, read(path, corners, mpp, 128, "openslide")[0])
        assert (kind, note) == ("direct", "some tiles through OpenSlide: the file leaves out tiles")


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_difference_on_the_level_that_is_read_is_found(
    tmp_path: Path, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One grey level in one level's tiles: that level goes through OpenSlide, the others stay direct. Level 2 is 4.01
    times coarser, where OpenSlide interpolates."""
    from mhim.extract.slide.filetiles import FileLevels, Plane

    path = tmp_path / "s.tif"
    write(path, Traits(codecs=FOUR[:3], size=(1023, 767)))
    plain = FileLevels.tile
    offs = {0: 1, 1: 4, 2: 4}

    def off(self: FileLevels, plane: Plane, *more: object) -> np.ndarray:
        pixels = plain(self, plane, *more)  # type: ignore[arg-type]
        return pixels ^ offs[level] if plane.size[0] == 1023 >> level else pixels

    monkeypatch.setattr(FileLevels, "tile", off)
    for k in range(3):
        _, kind, note = read(path, grid((1023, 767), 200), 0.5 * 2**k, 64)
        assert kind == ("openslide" if k == level else "direct")
        assert ("differ" in note) == (k == level)


def test_several_places_are_compared_where_the_tiles_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose lower tiles differ: a job that has none of them is read directly, one that has some is not."""
    from mhim.extract.slide.filetiles import FileLevels, Plane

    path = tmp_path / "s.tif"
    write(path, Traits(codecs=("jpeg",), size=(2048, 1024), tile=(128, 128)))
    plain = FileLevels.tile

    def off(self: FileLevels, plane: Plane, index: int, *more: object) -> np.ndarray:
        pixels = plain(self, plane, index, *more)  # type: ignore[arg-type]
        return pixels ^ 1 if index // plane.columns >= 6 else pixels  # the lower quarter

    monkeypatch.setattr(FileLevels, "tile", off)
    upper, lower = grid((2048, 640), 128) + 40, grid((2048, 900), 128) + 40
    assert read(path, upper, 0.5, 128)[1] == "direct"
    assert read(path, lower, 0.5, 128)[1] == "openslide"


def test_the_checks_read_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of OpenSlide's that are read before a job of any size begins."""
    from mhim.extract.slide.slide import Slide

    path = tmp_path / "s.tif"
    write(path, Traits(codecs=("jpeg",), size=(2048, 1024)))
    asked: list[int] = []
    with open_slide(path) as slide:
        plain = slide.source.read
        monkeypatch.setattr(slide.source, "read", lambda *a: asked.append(a[3] * a[4]) or plain(*a))
        job = SlideJob(path, grid((2048, 1024), 256), 256, 0.5, (0.5, 0.5))
        reader = DirectReader(job, slide)
        assert isinstance(reader.slide, Slide)
        assert 3 <= len(asked) <= 6
        assert sum(asked) <= 4 * 128**2
