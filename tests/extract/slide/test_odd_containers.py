"""TIFFs whose pixels are sound, in containers that OpenSlide leaves out: the same levels and pixels as their twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from mhim.configs.schema import ExtractConfig, TileConfig
from mhim.extract import SlideJob, UnreadableSlide
from mhim.extract.reading.readers import open_reader
from mhim.extract.slide.slide import Slide, open_slide
from mhim.extract.tiles.tiling import tile_slide
from tests.extract.dicoms import write_instance
from tests.extract.omes import halved, ome_xml, write_ome
from tests.extract.slides import tissue_rgb, write_tiff

PICTURE = tissue_rgb(512, 768)
LEVELS = halved(PICTURE, 3)
SIZES = ((768, 512), (384, 256), (192, 128))
WHOLE = [{"SamplesPerPixel": 3}]


def pyramid(path: Path, levels: list[np.ndarray] = LEVELS, **options: Any) -> Path:
    """One tiled page a level."""
    with tifffile.TiffWriter(path) as out:
        for n, level in enumerate(levels):
            out.write(level, tile=(256, 256), photometric="rgb", subfiletype=int(n > 0), metadata=None, **options)
    return path


def whole(slide: Slide, level: int) -> np.ndarray:
    w, h = slide.level_dimensions[level]
    return slide.read_level(0, 0, level, w, h)


@pytest.mark.parametrize(
    ("codec", "args"),
    [("jpeg2000", {"reversible": True}), ("webp", {"lossless": True}), ("jpegxl", {"lossless": True}), ("zstd", {}),
     ("lerc", {}), ("lzma", {})],
)  # fmt: skip
def test_codecs_that_openslide_leaves_out(codec: str, args: dict[str, Any], tmp_path: Path) -> None:
    path = pyramid(tmp_path / "a.tif", compression=codec, compressionargs=args)
    with open_slide(path, 0.5, file_tiles=True) as slide:
        assert slide.level_dimensions == SIZES
        for n, level in enumerate(LEVELS):
            np.testing.assert_array_equal(whole(slide, n), level)
    assert not tile_slide(path, TileConfig(tile_px=128, overlay=False), 0.5).empty


def test_aperio_in_a_codec_of_our_own_keeps_its_mpp(tmp_path: Path) -> None:
    about = "Aperio Image Library v12.4.3 \r\n768x512 [0,0 768x512] (256x256)|AppMag = 40|MPP = 0.2527"
    path = tmp_path / "a.svs"
    with tifffile.TiffWriter(path) as out:
        for n, level in enumerate(LEVELS):
            out.write(level, tile=(256, 256), photometric="rgb", description=about, metadata=None, compression="webp",
                      compressionargs={"lossless": True})  # fmt: skip
            if n == 0:  # as in every slide of Aperio's
                out.write(LEVELS[1], photometric="rgb", description=about, metadata=None, rowsperstrip=16)
    with open_slide(path) as slide:
        assert (slide.slide_mpp, slide.mpp_source) == ((0.2527, 0.2527), "aperio.MPP")
        assert slide.level_dimensions == SIZES
        np.testing.assert_array_equal(whole(slide, 2), LEVELS[2])


def test_dicom_in_jpeg_2000_has_the_very_pixels(tmp_path: Path) -> None:
    kind = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    path = write_instance(tmp_path / "a.dcm", PICTURE, "1.2.3", "1.2.3.1", kind, lossless=True)
    corners = np.array([[0, 0], [200, 100], [512, 256]], np.int32)
    for reader in ("auto", "openslide"):
        opened = open_reader(SlideJob(path, corners, 256, 0.5, (0.5, 0.5)), ExtractConfig(reader=reader))  # type: ignore[arg-type]
        got = np.empty((3, 256, 256, 3), np.uint8)
        opened.fill(corners, got)
        opened.close()
        assert opened.kind == ("direct" if reader == "auto" else "openslide"), opened.note
        for tile, (x, y) in zip(got, corners, strict=True):
            np.testing.assert_array_equal(tile, PICTURE[y : y + 256, x : x + 256])


@pytest.mark.parametrize("codec", ["zlib", "jpeg"])
def test_levels_in_sub_directories_are_levels(codec: str, tmp_path: Path) -> None:
    """Also where a label image lies in the chain, which OpenSlide takes for a level."""
    path = write_ome(tmp_path / "a.ome.tif", [PICTURE], {"SizeC": 3}, WHOLE, levels=3, compression=codec)
    with tifffile.TiffWriter(path, append="force") as out:
        out.write(tissue_rgb(300, 280, 5), tile=(256, 256), photometric="rgb", metadata=None)
    twin = pyramid(tmp_path / "twin.tif", compression=codec)
    for file_tiles in (False, True):
        with open_slide(path, file_tiles=file_tiles) as slide, open_slide(twin, 0.5) as other:
            assert slide.level_dimensions == other.level_dimensions == SIZES
            assert slide.level_downsamples == other.level_downsamples
            for n in range(3):
                np.testing.assert_array_equal(whole(slide, n), whole(other, n))
            mine, theirs = slide.image_at(2.0), other.image_at(2.0)
            np.testing.assert_array_equal(mine[0], theirs[0])
    for mpp in (0.5, 1.0, 2.0):
        tiles = {}
        for file, reader in ((path, "auto"), (path, "openslide"), (twin, "openslide")):
            job = SlideJob(file, np.array([[0, 0], [128, 64]], np.int32), 64, mpp, (0.5, 0.5))
            opened = open_reader(job, ExtractConfig(encoder="texture", reader=reader))
            got = np.empty((2, 64, 64, 3), np.uint8)
            opened.fill(job.coords_l0, got)
            opened.close()
            tiles[file.name, reader] = got
        np.testing.assert_array_equal(tiles[path.name, "auto"], tiles[path.name, "openslide"])
        np.testing.assert_array_equal(tiles[path.name, "openslide"], tiles[twin.name, "openslide"])


def deep(rgb: np.ndarray, bits: int) -> np.ndarray:
    """8 bits -> `bits` in 16, so that rounding gives the 8 bits again."""
    return np.round(rgb.astype(np.float64) * (2**bits - 1) / 255).astype(np.uint16)


TILES = {"tile": (256, 256), "compression": "zlib"}
DEEP: dict[str, tuple[int, dict[str, Any]]] = {
    "12, MaxSampleValue, tiles": (12, {**TILES, "extratags": [(281, 3, 3, (4095,) * 3, False)]}),
    "12, MaxSampleValue, strips": (12, {"rowsperstrip": 64, "extratags": [(281, 3, 3, (4095,) * 3, False)]}),
    "12, SMaxSampleValue": (12, {**TILES, "extratags": [(341, 3, 3, (4095,) * 3, False)]}),
    "14, the highest value there is": (14, {**TILES, "extratags": [(281, 3, 3, (16011,) * 3, False)]}),
    "10, OME-XML": (10, {**TILES, "description": ome_xml(
        PICTURE.shape, {"SizeC": 3, "Type": "uint16", "SignificantBits": 10}, WHOLE).encode()}),
    "16": (16, TILES),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("grey", [False, True])
def test_bits_that_do_not_count_are_not_read_as_black(kind: str, grey: bool, tmp_path: Path) -> None:
    bits, options = DEEP[kind]
    rgb = np.repeat(PICTURE[..., 1:2], 3, axis=2) if grey else PICTURE
    if grey and "extratags" in options:
        options = {**options, "extratags": [(tag, 3, 1, most[0], False) for tag, _, _, most, _ in options["extratags"]]}
    data = deep(rgb, bits)[..., 1].copy() if grey else deep(rgb, bits)
    path = write_tiff(tmp_path / "a.tif", data, photometric="minisblack" if grey else "rgb", **options)
    with open_slide(path, 0.5, file_tiles=True) as slide:
        assert np.abs(whole(slide, 0).astype(int) - rgb).max() <= (1 if bits == 10 else 0)


@pytest.mark.parametrize("grey", [False, True])
def test_bits_of_which_nothing_tells_are_no_guess(grey: bool, tmp_path: Path) -> None:
    data = deep(PICTURE, 12)
    path = write_tiff(tmp_path / "a.tif", data[..., 1].copy() if grey else data,
                      photometric="minisblack" if grey else "rgb", **TILES)  # fmt: skip
    with pytest.raises(UnreadableSlide, match="about 12 bits count, and nothing says how many"):
        open_slide(path, 0.5)


def test_a_level_is_of_the_picture_or_left_out(tmp_path: Path) -> None:
    """A sub-directory that shows something else, as some writers keep their thumbnails."""
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as out:
        out.write(PICTURE, tile=(256, 256), photometric="rgb", subifds=2, metadata=None)
        out.write(tissue_rgb(300, 280, 5), tile=(256, 256), photometric="rgb", subfiletype=1, metadata=None)
        out.write(cv2.resize(PICTURE, (384, 256), interpolation=cv2.INTER_AREA), tile=(256, 256), photometric="rgb",
                  subfiletype=1, metadata=None)  # fmt: skip
    with open_slide(path, 0.5) as slide:
        assert slide.level_dimensions == SIZES[:2]
