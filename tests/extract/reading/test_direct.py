"""The direct reader gives OpenSlide's very pixels, decodes each file tile once, and steps aside where it must."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile

from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideJob, UnreadableSlide
from mhim.extract.reading.direct import DirectReader
from mhim.extract.reading.readers import TileReader, open_reader
from tests.extract.slides import tissue_rgb, write_svs

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "slides"
SLIDES = {"A.svs": 0.5, "cmu-1-small-region.svs": 0.499, "tcga-cr-7395-01a-01-ts1.svs": 0.25}


def read(job: SlideJob, reader: str = "auto", reduction: str = "area") -> tuple[np.ndarray, TileReader]:
    opened = open_reader(job, ExtractConfig(reader=reader, reduction=reduction))  # type: ignore[arg-type]
    out = np.empty((len(job.coords_l0), job.tile_px, job.tile_px, 3), np.uint8)
    try:
        for first in range(0, len(out), 16):
            opened.fill(job.coords_l0[first : first + 16], out[first : first + 16])
    finally:
        opened.close()
    return out, opened


def grid(w: int, h: int, step: int, shift: int = 0) -> np.ndarray:
    return np.array([(x + shift, y + shift) for y in range(0, h, step) for x in range(0, w, step)], np.int32)


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("direct") / "s.svs", tissue_rgb(1100, 1300), downsamples=(1, 2, 4))


@pytest.mark.parametrize("shift", [0, -100, 77], ids=["aligned", "outside", "unaligned"])
@pytest.mark.parametrize(("mpp", "tile_px"), [(0.5, 256), (0.5, 100), (0.51, 128), (0.7, 128), (1.0, 64), (2.0, 64)])
def test_same_pixels_as_openslide(svs: Path, shift: int, mpp: float, tile_px: int) -> None:
    """Bit for bit, at the level's own mpp and reduced by area average; corners chosen on whole pixels of each level."""
    job = SlideJob(svs, grid(1300, 1100, 256, shift * 4 if mpp > 0.99 else shift), tile_px, mpp, (0.5, 0.5))
    ours, reader = read(job)
    theirs, _ = read(job, "openslide")
    assert reader.kind == "direct", reader.note
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", SLIDES)
def test_real_slides(name: str) -> None:
    """Every slide at hand, JPEG with RGB and YCbCr tiles and JPEG 2000: no pixel differs at full size."""
    path, mpp = SHARED / name, SLIDES[name]
    if not path.is_file():
        pytest.skip("needs data: real slides, in ../shared/slides")
    with tifffile.TiffFile(path) as tiff:
        h, w = tiff.pages.first.shape[:2]
    for shift in (0, 131):
        coords = grid(w, h, 256, shift)
        job = SlideJob(path, coords[len(coords) // 2 :][:24], 256, mpp, (mpp, mpp))
        ours, reader = read(job)
        assert reader.kind == "direct", reader.note
        np.testing.assert_array_equal(ours, read(job, "openslide")[0])


def test_dct_is_close_and_area_is_exact(svs: Path) -> None:
    job = SlideJob(svs, grid(1024, 1024, 512), 128, 0.5, (0.25, 0.25))
    theirs = read(job, "openslide")[0].astype(int)
    dct, reader = read(job, reduction="dct")
    assert isinstance(reader, DirectReader)
    assert reader.halvings == 0  # level 1 has the wished mpp: nothing to halve
    one = write_svs(svs.with_name("one.svs"), tissue_rgb(), downsamples=(1,))
    job = SlideJob(one, job.coords_l0, 128, 1.0, (0.5, 0.5))
    theirs = read(job, "openslide")[0].astype(int)
    dct, reader = read(job, reduction="dct")
    assert isinstance(reader, DirectReader)
    assert reader.halvings == 1
    assert 0 < np.abs(dct - theirs).mean() < 2
    np.testing.assert_array_equal(read(job)[0], theirs)


def test_each_file_tile_is_decoded_once(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when threads cut an unaligned grid from them at once."""
    job = SlideJob(svs, grid(1000, 800, 200, 33), 200, 0.5, (0.5, 0.5))
    decoded: list[int] = []
    plain = DirectReader._decode

    def counting(self: DirectReader, index: int, out: np.ndarray | None = None) -> np.ndarray:
        decoded.append(index)
        return plain(self, index, out)

    monkeypatch.setattr(DirectReader, "_decode", counting)
    reader = open_reader(job, ExtractConfig())
    out = np.empty((len(job.coords_l0), 200, 200, 3), np.uint8)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: reader.fill(job.coords_l0[i : i + 2], out[i : i + 2]), range(0, len(out), 2)))
    assert isinstance(reader, DirectReader)
    assert not reader._tiles.kept, "nothing is kept after its last use"
    reader.close()
    assert len(decoded) == len(set(decoded))
    monkeypatch.undo()
    np.testing.assert_array_equal(out, read(job, "openslide")[0])


def test_other_structures_fall_back_and_say_why(tmp_path: Path) -> None:
    rgb = tissue_rgb(600, 700)
    cases = {
        "lzw.tif": {"compression": "lzw", "tile": (256, 256)},
        "planar.tif": {"planarconfig": "separate", "tile": (256, 256), "data": rgb.transpose(2, 0, 1)},
    }
    for name, options in cases.items():
        data = options.pop("data", rgb)
        tifffile.imwrite(tmp_path / name, data, photometric="rgb", metadata=None, **options)
        job = SlideJob(tmp_path / name, grid(512, 512, 256), 256, 0.5, (0.5, 0.5))
        tiles, reader = read(job)
        assert reader.kind == "openslide"
        assert reader.note
        np.testing.assert_array_equal(tiles[0], rgb[:256, :256])


def test_pixels_that_differ_are_refused(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that is off by one grey level loses to OpenSlide."""
    import simplejpeg

    plain = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: plain(*a, **k) ^ 1)
    job = SlideJob(svs, grid(512, 512, 256), 256, 0.5, (0.5, 0.5))
    tiles, reader = read(job)
    assert reader.kind == "openslide"
    assert "differ" in reader.note
    monkeypatch.undo()
    np.testing.assert_array_equal(tiles, read(job)[0])


def test_a_damaged_tile_fails_the_slide_by_name(svs: Path, tmp_path: Path) -> None:
    """A tile of noise in the middle of the file: OpenSlide has the last word, and its error names the place."""
    with tifffile.TiffFile(svs) as tiff:
        page = tiff.pages.first
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    data = bytearray(svs.read_bytes())
    data[offset : offset + count] = b"\0" * count
    broken = tmp_path / "broken.svs"
    broken.write_bytes(data)
    job = SlideJob(broken, grid(1024, 1024, 256), 256, 0.5, (0.5, 0.5))
    reader = open_reader(job, ExtractConfig())
    assert reader.kind == "direct"
    out = np.empty((len(job.coords_l0), 256, 256, 3), np.uint8)
    with pytest.raises(UnreadableSlide, match=r"broken\.svs.*\(0, 0\)"):
        reader.fill(job.coords_l0, out)
    reader.close()
