"""The viewer's tiles are the slide's pixels, however they are read: directly, halved by the decoder, in quarters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from mhim.extract.slide.filetiles import Undecodable
from mhim.extract.slide.slide import open_slide
from mhim.pipeline.viewer import pyramid as module
from mhim.pipeline.viewer.pyramid import Pyramid
from tests.extract.slides import tissue_rgb, write_svs

SIZE = (1531, 1003)  # odd on purpose: no tile, level or halving fits


def written(path: Path, tile: tuple[int, int], compression: str = "jpeg") -> Path:
    """An Aperio-style slide of levels 1, 4, 16 with tiles of this size."""
    rgb = tissue_rgb(SIZE[1], SIZE[0])
    with tifffile.TiffWriter(path) as tif:
        for i, k in enumerate((1, 4, 16)):
            size = (rgb.shape[1] // k, rgb.shape[0] // k)
            level = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) if k > 1 else rgb
            text = f"Aperio Image Library v12.0.15 \r\n{rgb.shape[1]}x{rgb.shape[0]}|AppMag = 20|MPP = 0.5"
            tif.write(level, tile=tile, photometric="rgb", compression=compression, description=text, metadata=None,
                      subfiletype=1 if i else 0)  # fmt: skip
    return path


@pytest.fixture(params=[(256, 256), (240, 240), (272, 128)], ids=str)
def pyramid(request: pytest.FixtureRequest, tmp_path: Path) -> Pyramid:
    made = Pyramid(open_slide(written(tmp_path / "s.svs", request.param)))
    assert not made.note
    return made


def every(made: Pyramid, level: int, tile: Callable[[int, int, int, int], np.ndarray]) -> np.ndarray:
    """A level put together from the tiles that `tile` (x, y, w, h) gives."""
    w, h = made.size_at(level)
    whole = np.zeros((h, w, 3), np.uint8)
    for y in range(0, h, module.TILE_PX):
        for x in range(0, w, module.TILE_PX):
            part = whole[y : y + module.TILE_PX, x : x + module.TILE_PX]
            part[:] = tile(x, y, part.shape[1], part.shape[0])
    return whole


def test_full_resolution_is_openslide_s_to_the_bit(pyramid: Pyramid) -> None:
    found = every(pyramid, pyramid.top, lambda x, y, w, h: pyramid._read(1, x, y, w, h))
    expected = pyramid.slide.read_level(0, 0, 0, *SIZE)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("down", [2, 4, 8, 32])
def test_coarser_levels_are_the_same_picture(pyramid: Pyramid, down: int) -> None:
    level = pyramid.top - int(np.log2(down))
    found = every(pyramid, level, lambda x, y, w, h: pyramid._read(down, x, y, w, h)).astype(int)
    w, h = pyramid.size_at(level)
    expected = pyramid.slide.read_region(0, 0, (w, h), 0.5 * down).astype(int)
    inner = np.s_[: h - 2, : w - 2]  # the last px mix with what lies beyond the slide
    assert np.abs(found[inner] - expected[inner]).mean() < 3
    shifted = np.abs(found[inner][:, 1:] - expected[inner][:, :-1]).mean()
    assert shifted > np.abs(found[inner] - expected[inner]).mean()  # and it lies at its place


def test_what_is_too_large_is_read_in_quarters(pyramid: Pyramid, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pyramid._read(2, 0, 0, 512, 480)
    monkeypatch.setattr(module, "READ_PX", 1 << 16)
    np.testing.assert_array_equal(pyramid._read(2, 0, 0, 512, 480), whole)


def test_other_files_are_read_through_openslide(tmp_path: Path) -> None:
    made = Pyramid(open_slide(written(tmp_path / "s.svs", (256, 256), "adobe_deflate")))
    np.testing.assert_array_equal(made._read(1, 512, 0, 512, 512), made.slide.read_level(512, 0, 0, 512, 512))
    assert "compressed" in made.note


def test_a_damaged_tile_is_left_to_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pyramid(open_slide(write_svs(tmp_path / "s.svs", tissue_rgb())))

    def broken(*_: object, **__: object) -> np.ndarray:
        raise Undecodable("bad bytes")

    made._file.plane(0)
    monkeypatch.setattr(made._file, "tile", broken)
    np.testing.assert_array_equal(made._read(1, 0, 0, 512, 512), made.slide.read_level(0, 0, 0, 512, 512))
    assert "bad bytes" in made.note


@pytest.mark.parametrize(("level", "column", "row"), [(99, 0, 0), (-1, 0, 0), (11, 3, 0), (11, 0, -1)])
def test_there_is_nothing_beyond_the_slide(tmp_path: Path, level: int, column: int, row: int) -> None:
    with pytest.raises(LookupError):
        Pyramid(open_slide(write_svs(tmp_path / "s.svs", tissue_rgb()))).tile(level, column, row)
