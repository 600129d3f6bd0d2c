"""Pixels at a requested mpp: what is read, at which scale, and that memory and frames do not depend on the level."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mhim.configs.schema import TileConfig
from mhim.extract.slide import slide as slide_module
from mhim.extract.slide.slide import open_slide
from mhim.extract.slide.source import on_white
from tests.extract.slides import tissue_rgb, write_svs, write_tiff


def test_full_resolution_is_the_file(tmp_path: Path) -> None:
    rgb = tissue_rgb(600, 800)
    path = write_tiff(tmp_path / "a.tif", rgb, photometric="rgb", rowsperstrip=40)
    with open_slide(path, 0.5) as slide:
        assert np.array_equal(slide.read_region(100, 50, (300, 200), 0.5), rgb[50:250, 100:400])
        beyond = slide.read_region(700, 500, 256, 0.5)
        assert np.array_equal(beyond[:100, :100], rgb[500:, 700:])
        assert beyond[100:].min() == 255
        assert beyond[:, 100:].min() == 255


def test_reduced_reading_is_the_area_average(tmp_path: Path) -> None:
    rgb = tissue_rgb(600, 800)
    path = write_tiff(tmp_path / "a.tif", rgb, photometric="rgb")
    with open_slide(path, 0.25) as slide:
        got = slide.read_region(64, 32, 128, 0.5).astype(int)
        expected = rgb[32:288, 64:320].reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("mpp", [0.25, 0.265, 0.4990, 0.5])
def test_the_plan_reads_what_covers_the_tile(tmp_path: Path, mpp: float) -> None:
    with open_slide(write_svs(tmp_path / "a.svs", tissue_rgb(), mpp=mpp)) as slide:
        for target in (0.5, 1.0, 2.0, 4.0):
            plan = slide.plan_read(target, 256)
            level_mpp = mpp * slide.level_downsamples[plan.level]
            assert level_mpp <= target * 1.01, "never from a coarser level"
            assert plan.read_px[0] * level_mpp == pytest.approx(256 * target, abs=level_mpp / 2 + 1e-9)
            assert plan.resize == pytest.approx(256 / plan.read_px[0])


def test_the_low_resolution_image_is_the_area_average_in_any_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb = tissue_rgb(500, 700)
    path = write_tiff(tmp_path / "a.tif", rgb, photometric="rgb", rowsperstrip=16)
    with open_slide(path, 0.5) as slide:
        whole, mpp = slide.image_at(8.0)
        monkeypatch.setattr(slide_module, "_BLOCK_PX", 5000)
        pieces, _ = slide.image_at(8.0)
    assert mpp == (8.0, 8.0)
    assert np.array_equal(whole, pieces)
    expected = rgb[:496, :688].reshape(31, 16, 43, 16, 3).mean((1, 3))
    assert np.abs(whole[:31, :43].astype(int) - expected).max() <= 1
    assert whole.shape == (32, 44, 3), "what is left at the edges counts as a px"


def test_unequal_mpp(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", tissue_rgb(1024, 1024), photometric="rgb",
                      resolution=(20000, 40000), resolutionunit="CENTIMETER")  # fmt: skip
    with open_slide(path) as slide:
        assert slide.slide_mpp == pytest.approx((0.5, 0.25))
        assert slide.plan_read(0.5, 256).read_px == (256, 512)
        assert slide.read_region(0, 0, 128, 0.5).shape == (128, 128, 3)
        image, mpp = slide.image_at(8.0)
        assert image.shape == (32, 64, 3)
        assert mpp == pytest.approx((8.0, 8.0))


def test_alpha_lies_on_white() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    assert on_white(rgba).tolist() == [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]


def test_formats_of_the_fallback_agree(tmp_path: Path) -> None:
    rgb = tissue_rgb(300, 400)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    Image.fromarray(rgb).save(tmp_path / "a.tif", compression="tiff_lzw")
    write_tiff(tmp_path / "planar.tif", np.moveaxis(rgb, 2, 0).copy(), planarconfig="separate", photometric="rgb")
    write_tiff(tmp_path / "deep.tif", rgb.astype(np.uint16) * 257, photometric="rgb")
    for name in ("a.png", "a.tif", "planar.tif", "deep.tif"):
        with open_slide(tmp_path / name, 0.5) as slide:
            assert np.array_equal(slide.read_region(0, 0, (400, 300), 0.5), rgb), name


def test_openslide_and_fallback_give_one_image(tmp_path: Path) -> None:
    rgb = tissue_rgb(1024, 1024)
    write_tiff(tmp_path / "tiled.tif", rgb, tile=(256, 256), photometric="rgb")
    write_tiff(tmp_path / "striped.tif", rgb, rowsperstrip=32, photometric="rgb")
    with open_slide(tmp_path / "tiled.tif", 0.5) as a, open_slide(tmp_path / "striped.tif", 0.5) as b:
        assert (a.vendor, b.vendor) == ("generic-tiff", "tiff")
        assert np.array_equal(a.read_region(300, 200, 300, 0.6), b.read_region(300, 200, 300, 0.6))


def test_the_largest_slide_takes_little_memory(tmp_path: Path) -> None:
    """Strips of a flat TIFF are decoded one by one: far less than the 300 MB of the picture."""
    import subprocess
    import sys

    path = tmp_path / "big.tif"
    grey = np.full((10_000, 10_000, 3), 240, np.uint8)
    write_tiff(path, grey, photometric="rgb", rowsperstrip=64, compression="zlib")
    code = (
        "import sys, resource; from pathlib import Path; from mhim.extract.slide.slide import open_slide\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "open_slide(Path(sys.argv[1]), 0.5).image_at(8.0)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) < 120


def test_manifest_wins_and_says_so(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", tissue_rgb(512, 512), mpp=0.25)
    with open_slide(path, 0.5, TileConfig(mpp_of_slides=0.7)) as slide:
        assert slide.slide_mpp == (0.5, 0.5)
        assert slide.mpp_source == "manifest"
        assert "0.25" in slide.notes[0]


def test_resizing_is_by_area_also_for_odd_factors(tmp_path: Path) -> None:
    rgb = tissue_rgb(800, 800)
    path = write_tiff(tmp_path / "a.tif", rgb, photometric="rgb")
    with open_slide(path, 0.265) as slide:
        got = slide.read_region(10, 20, 256, 0.5)
        expected = cv2.resize(rgb[20 : 20 + 483, 10 : 10 + 483], (256, 256), interpolation=cv2.INTER_AREA)
        assert np.array_equal(got, expected)


def test_an_image_is_held_to_so_many_px(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", tissue_rgb(600, 800), photometric="rgb")
    with open_slide(path, 0.5) as slide:
        image, mpp = slide.image_at(1.0, max_px=20_000)
        assert image.shape[0] * image.shape[1] <= 20_000
        assert mpp == (2.5, 2.5)
