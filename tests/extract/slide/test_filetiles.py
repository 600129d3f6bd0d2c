"""Regions decoded from the file's own tiles are OpenSlide's pixels, and OpenSlide reads what may not be decoded so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from mhim.extract import UnreadableSlide
from mhim.extract.slide import filetiles
from mhim.extract.slide.flat import FlatImage
from mhim.extract.slide.slide import open_slide
from mhim.extract.slide.tiffpages import read_pages
from tests.extract.slides import tissue_rgb, write_svs, write_tiff

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "slides"


@pytest.fixture
def svs(tmp_path: Path) -> Path:
    return write_svs(tmp_path / "a.svs", tissue_rgb(1100, 1303), downsamples=(1, 2, 4))


class Counting:
    """Stands before a source and counts what it is asked to read."""

    def __init__(self, source: object) -> None:
        self.source = source
        self.calls = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def read(self, *region: int) -> np.ndarray:
        self.calls += 1
        return self.source.read(*region)  # type: ignore[attr-defined, no-any-return]


def both(path: Path, *regions: tuple[int, int, int, int, int]) -> int:
    """Read `regions` directly and through OpenSlide; equal. Returns how many of them the former left to OpenSlide."""
    with open_slide(path, 0.5, file_tiles=True) as ours, open_slide(path, 0.5) as theirs:
        front = ours.source
        assert isinstance(front, filetiles.FileTiles)
        counting = front._source = Counting(front._source)  # type: ignore[assignment]
        for region in regions:
            np.testing.assert_array_equal(ours.read_level(*region), theirs.read_level(*region))
        return counting.calls


def test_same_pixels_on_every_level_in_and_outside(svs: Path) -> None:
    regions = [(0, 0, 0, 1400, 1200), (-40, -30, 0, 300, 200), (513, 77, 0, 640, 300), (0, 0, 1, 700, 600),
               (256, 512, 2, 100, 90), (5000, 0, 0, 64, 64)]  # fmt: skip
    assert both(svs, *regions) == 1, "level 2 is 4.0046 times coarser: one region starts between two pixels"


def test_between_two_pixels_openslide_interpolates(svs: Path) -> None:
    assert both(svs, (0, 0, 2, 50, 50), (3, 2, 2, 50, 50)) == 1


@pytest.mark.parametrize("name", ["A.svs", "cmu-1-small-region.svs", "tcga-cr-7395-01a-01-ts1.svs"])
def test_real_slides(name: str) -> None:
    if not (SHARED / name).is_file():
        pytest.skip("needs data: real slides, in ../shared/slides")
    with open_slide(SHARED / name, 0.5) as slide:
        levels = len(slide.level_dimensions)
    both(SHARED / name, *((0, 0, level, 1250, 1250) for level in range(levels)), (1000, 1500, 0, 777, 555))


def test_what_differs_is_left_to_openslide(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = filetiles.FileLevels.tile
    monkeypatch.setattr(filetiles.FileLevels, "tile", lambda self, *a: tile(self, *a) ^ 1)
    assert both(svs, (0, 0, 0, 300, 300), (0, 0, 0, 100, 100)) == 2


def test_striped_and_flat_files_are_left_to_openslide_or_the_flat_reader(tmp_path: Path) -> None:
    rgb = tissue_rgb(600, 800)
    lossless = write_tiff(tmp_path / "lzw.tif", rgb, photometric="rgb", tile=(256, 256), compression="zlib")
    assert both(lossless, (0, 0, 0, 800, 600)) == 1
    assert both(write_tiff(tmp_path / "s.tif", rgb, photometric="rgb"), (0, 0, 0, 800, 600)) == 1


def test_a_damaged_tile_is_told_as_openslide_tells_it(svs: Path) -> None:
    with tifffile.TiffFile(svs) as tiff:
        offset = tiff.pages[0].dataoffsets[7]  # type: ignore[union-attr]
    with open(svs, "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 300)
    with open_slide(svs, file_tiles=True) as slide:
        slide.read_region(0, 0, 256, 0.5)
        with pytest.raises(UnreadableSlide, match="cannot be decoded"):
            slide.read_region(300, 300, 256, 0.5)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000"])
def test_levels_in_sub_directories(tmp_path: Path, compression: str) -> None:
    """As an OME-TIFF keeps them. OpenSlide sees level 0 only: the judge is whoever read the others."""
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for n in range(3):
            level = np.ascontiguousarray(tissue_rgb(1100, 1303)[:: 2**n, :: 2**n])
            tif.write(level, tile=(256, 256), photometric="rgb", compression=compression, metadata=None,
                      subifds=2 if n == 0 else None, subfiletype=int(n > 0))  # fmt: skip
    flat = FlatImage(path)
    assert len(flat.level_dimensions) == 3
    flat.vendor = "generic-tiff"  # so it is called where OpenSlide opens the file
    levels = filetiles.FileLevels(path, flat)
    for n in range(3):
        plane = levels.plane(n)
        out = np.empty((300, 300, 3), np.uint8)
        filetiles.paste(plane, 0, 40, 70, out, lambda index, plane=plane: levels.tile(plane, index))  # type: ignore[misc]
        scale = flat.level_downsamples[n]
        np.testing.assert_array_equal(out, flat.read(round(40 * scale), round(70 * scale), n, 300, 300))
    levels.close()
    flat.close()


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_pages_are_those_that_tifffile_finds(tmp_path: Path, big: bool, order: str) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as tif:
        for k in (1, 2):
            tif.write(tissue_rgb(600 // k, 800 // k), tile=(128, 64), photometric="rgb", compression="jpeg")
        tif.write(tissue_rgb(60, 80), photometric="rgb", rowsperstrip=8)
    ours = read_pages(path)
    with tifffile.TiffFile(path) as tiff:
        theirs = [p for p in tiff.pages if p.is_tiled]  # type: ignore[union-attr]
        assert len(ours) == len(theirs) == 2
        for a, b in zip(ours, theirs, strict=True):
            for name in ("imagewidth", "imagelength", "imagedepth", "tilewidth", "tilelength", "dtype", "photometric",
                         "samplesperpixel", "planarconfig", "compression"):  # fmt: skip
                assert getattr(a, name) == getattr(b, name), name
            assert a.jpegtables == (b.jpegtables or b"")  # type: ignore[union-attr]
            assert a.dataoffsets.tolist() == list(b.dataoffsets)
            assert a.databytecounts.tolist() == list(b.databytecounts)


def test_a_worker_that_tiles_loads_no_more_than_it_needs(svs: Path) -> None:
    """Each of these costs every worker a tenth of a second and more, and 10 to 300 MB."""
    code = (
        "import sys; from pathlib import Path\n"
        "from mhim.configs.schema import Config, TileConfig\n"
        "from mhim.pipeline.cohort.listing import SlideEntry; from mhim.pipeline.resume.stage import Item\n"
        "from mhim.pipeline.stages.tile import Tile; from mhim.pipeline.store.layout import Work\n"
        "slide, folder = Path(sys.argv[1]), Path(sys.argv[2]); entry = SlideEntry('a', slide)\n"
        "folder.mkdir()\n"
        "made = Tile(Work(folder), Config(), [entry]).make(Item('a', folder / 'o', {}, entry), folder / 'o', folder)\n"
        "assert made.numbers['tiles'] > 0\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    argv = [sys.executable, "-c", code, str(svs), str(svs.parent / "work")]
    loaded = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "timm", "zarr", "dask", "pandas", "scipy", "sklearn", "skimage", "tifffile"} & set(loaded)
