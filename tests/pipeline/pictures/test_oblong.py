"""Slides whose pixels are no squares: overlays, contact sheets and viewer show tiles as --save-tiles writes them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from mhim.configs.schema import TileConfig
from mhim.extract.slide.slide import open_slide, squared
from mhim.extract.tiles.tiling import Tiled, tile_slide
from mhim.pipeline.pictures import layers
from mhim.pipeline.store.attributes import Geometry
from mhim.pipeline.viewer import tile_layers
from mhim.pipeline.viewer.pyramid import Pyramid
from tests.extract.containers import Traits, write
from tests.extract.slides import tissue_rgb

ACROSS, DOWN = (0.25, 0.5), (0.5, 0.25)


def slide_of(folder: Path, mpp: tuple[float, float]) -> tuple[Path, Tiled, np.ndarray]:
    """(a slide of 1024 x 1024 µm/2, its tiles, the first of them as --save-tiles writes it, at x, y of it)."""
    path = folder / "oblong.tif"
    size = (2048, 1024) if mpp == ACROSS else (1024, 2048)
    rgb = cv2.resize(tissue_rgb(1024, 1024), size, interpolation=cv2.INTER_LINEAR)
    write(path, Traits(codecs=("zlib",), size=size, mpp=mpp), rgb)
    config = TileConfig(mpp=(0.5,), tile_px=256, save_tiles="png")
    tiled = tile_slide(path, config, tiles_out=folder / "tiles")
    x, y = tiled.arrays["coords"][0].tolist()
    bgr = cv2.imread(str(folder / "tiles" / f"{x}_{y}.png"))
    assert bgr is not None
    return path, tiled, bgr[..., ::-1]


@pytest.mark.parametrize("mpp", [ACROSS, DOWN], ids=str)
def test_contact_sheet(tmp_path: Path, mpp: tuple[float, float]) -> None:
    path, tiled, saved = slide_of(tmp_path, mpp)
    coords = tiled.arrays["coords"]
    layer = layers.Layer("attention", -np.arange(len(coords), dtype=np.float64))
    with open_slide(path, tuple(tiled.attrs["slide_mpp"]), file_tiles=True) as slide:
        sheet = layers.contact_sheet(slide, layer, coords, Geometry.of(tiled.attrs, path), 2)
    np.testing.assert_array_equal(sheet[:256, :256], saved)


@pytest.mark.parametrize("mpp", [ACROSS, DOWN], ids=str)
def test_viewer(tmp_path: Path, mpp: tuple[float, float]) -> None:
    path, tiled, saved = slide_of(tmp_path, mpp)
    pyramid = Pyramid(open_slide(path, tuple(tiled.attrs["slide_mpp"]), file_tiles=True))
    assert pyramid.size_px == (2048, 2048)
    x, y = (tiled.arrays["coords"][0] * pyramid.stretch).astype(int) // 2
    np.testing.assert_array_equal(pyramid._read(2, x, y, 256, 256), saved)
    fine = pyramid._read(1, 2 * x, 2 * y, 512, 512)
    assert np.abs(cv2.resize(fine, (256, 256), interpolation=cv2.INTER_AREA).astype(int) - saved).mean() < 3
    place = tile_layers.layer_frame(Geometry.of(tiled.attrs, path))
    w, h = place.size_px
    assert w == h
    assert [a / b for a, b in zip(place.px_l0, place.px_l0[::-1], strict=True)] == [mpp[1] / mpp[0], mpp[0] / mpp[1]]


@pytest.mark.parametrize("mpp", [ACROSS, DOWN], ids=str)
def test_overlays_have_square_pixels(tmp_path: Path, mpp: tuple[float, float]) -> None:
    path, tiled, _ = slide_of(tmp_path, mpp)
    assert tiled.overlay is not None
    assert tiled.overlay.shape[0] == pytest.approx(tiled.overlay.shape[1], abs=2)
    with open_slide(path, tuple(tiled.attrs["slide_mpp"]), file_tiles=True) as slide:
        rgb, frame = layers.low_resolution(slide)
        whole = slide.read_region(0, 0, rgb.shape[1::-1], frame.mpp)
    assert rgb.shape[0] == pytest.approx(rgb.shape[1], abs=2)
    assert np.abs(rgb.astype(int) - whole).mean() < 3
    assert (np.array(frame.px_l0) * mpp).tolist() == pytest.approx([frame.mpp] * 2, rel=0.01)


def test_squares_are_left_alone() -> None:
    rgb = tissue_rgb(64, 96)
    assert squared(rgb, (8.0, 8.05))[0] is rgb
    small, mpp = squared(rgb, (4.0, 8.0))
    assert small.shape == (64, 48, 3)
    assert mpp == (8.0, 8.0)
