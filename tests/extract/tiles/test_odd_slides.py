"""A corpus of broken and odd slides, made here: each ends as tiles, EMPTY or a SlideError that names the cause."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from mhim.configs.schema import TileConfig
from mhim.extract import MissingMpp, SlideError, UnreadableSlide
from mhim.extract.slide import identity
from mhim.extract.slide.slide import open_slide
from mhim.extract.tiles.tiling import tile_slide
from tests.extract.slides import tissue_rgb, write_svs, write_tiff

TILES, NO_TILE = "tiles", "empty"
Case = tuple[str, Callable[[Path], Path], float | None, object, str]


def svs(folder: Path, name: str = "a.svs", **options: object) -> Path:
    return write_svs(folder / name, tissue_rgb(), **options)  # type: ignore[arg-type]


def cut(path: Path, share: float) -> Path:
    os.truncate(path, int(path.stat().st_size * share))
    return path


def raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def poke(path: Path, at: int, data: bytes) -> Path:
    with open(path, "r+b") as file:
        file.seek(at if at >= 0 else path.stat().st_size + at)
        file.write(data)
    return path


def image(folder: Path, name: str, mode: str = "RGB", **options: object) -> Path:
    picture = Image.fromarray(tissue_rgb(700, 900))
    picture.convert(mode).save(folder / name, **options)  # type: ignore[arg-type]
    return folder / name


def rgba(folder: Path, name: str) -> Path:
    rgb = tissue_rgb(700, 900)
    alpha = np.full(rgb.shape[:2], 255, np.uint8)
    alpha[:350] = 0
    Image.fromarray(np.dstack([rgb, alpha])).save(folder / name)
    return folder / name


def linked(folder: Path) -> Path:
    (folder / "link.svs").symlink_to(folder / "gone.svs")
    return folder / "link.svs"


def folder_named(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def in_folder(folder: Path, sub: str) -> Path:
    folder_named(folder, "p")
    folder_named(folder, "q")
    svs(folder / "p")
    return svs(folder / sub)


def giant_tiff(path: Path) -> Path:
    """A header that claims 4 billion by 4 billion px with one strip of 8 bytes."""
    tags = [(256, 4, 1, 0xFFFFFFF0), (257, 4, 1, 0xFFFFFFF0), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 0xFFFFFFF0), (279, 4, 1, 8)]  # fmt: skip
    body = b"".join(struct.pack("<HHII", *t) for t in tags)
    return raw(path, struct.pack("<2sHI", b"II", 42, 16) + b"\0" * 8 + struct.pack("<H", len(tags)) + body + b"\0" * 4)


def bomb_png(path: Path) -> Path:
    """A PNG of 100,000 x 100,000 px in a few bytes."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return raw(
        path,
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b""),
    )


def mrxs_without_data(folder: Path) -> Path:
    return raw(folder / "a.mrxs", (folder / raw(folder / "b.jpg", b"\xff\xd8\xff\xe0" + b"\0" * 300).name).read_bytes())


def grey16(folder: Path) -> Path:
    grey = tissue_rgb()[..., 1].astype(np.uint16) * 257
    return write_tiff(folder / "g.tif", grey, photometric="minisblack", rowsperstrip=64)


def many_pages(folder: Path) -> Path:
    with tifffile.TiffWriter(folder / "m.tif") as tif:
        for size in (1024, 300, 700):
            tif.write(tissue_rgb(size, size), photometric="rgb", metadata=None)
    return folder / "m.tif"


RGB = {"photometric": "rgb"}
CASES: list[Case] = [
    ("whole", svs, None, TILES, ""),
    ("cut at 90 %", lambda d: cut(svs(d), 0.9), None, UnreadableSlide, "truncated"),
    ("cut at 50 %", lambda d: cut(svs(d), 0.5), None, UnreadableSlide, "truncated|damaged"),
    ("cut at 10 %", lambda d: cut(svs(d), 0.1), None, UnreadableSlide, "truncated|damaged"),
    (
        "cut to 100 bytes",
        lambda d: raw(d / "a.svs", svs(d, "b.svs").read_bytes()[:100]),
        None,
        UnreadableSlide,
        "truncated",
    ),
    ("cut to 5 bytes", lambda d: raw(d / "a.svs", b"II*\0\x08"), None, UnreadableSlide, "truncated|damaged"),
    ("half a png", lambda d: cut(image(d, "a.png"), 0.6), 0.5, UnreadableSlide, "damaged|truncated"),
    ("zero bytes", lambda d: raw(d / "a.svs", b""), None, UnreadableSlide, "empty .0 bytes"),
    ("text named svs", lambda d: raw(d / "a.svs", b"no slide at all\n" * 99), None, UnreadableSlide, "suffix is wrong"),
    ("zeros named tif", lambda d: raw(d / "a.tif", b"\0" * 9999), None, UnreadableSlide, "damaged, or its suffix"),
    ("slide named png", lambda d: svs(d, "a.png"), None, TILES, ""),
    ("unknown suffix", lambda d: raw(d / "a.xyz", b"123"), None, UnreadableSlide, "not a format"),
    ("no pyramid", lambda d: svs(d, downsamples=(1,)), None, TILES, ""),
    (
        "one px",
        lambda d: write_tiff(d / "a.tif", np.full((1, 1, 3), 200, np.uint8), **RGB),
        0.5,
        NO_TILE,
        "smaller than one tile",
    ),
    ("smaller than a tile", lambda d: image(d, "a.png").rename(d / "b.png"), 0.1, NO_TILE, "smaller than one tile"),
    (
        "all white",
        lambda d: write_svs(d / "a.svs", np.full((1024, 1024, 3), 255, np.uint8)),
        None,
        NO_TILE,
        "no tissue",
    ),
    ("all black", lambda d: write_svs(d / "a.svs", np.zeros((1024, 1024, 3), np.uint8)), None, None, ""),
    ("16-bit grey", grey16, 0.5, None, ""),
    ("8-bit grey", lambda d: image(d, "a.png", "L"), 0.5, None, ""),
    ("bilevel", lambda d: image(d, "a.png", "1"), 0.5, None, ""),
    ("palette png", lambda d: image(d, "a.png", "P"), 0.5, TILES, ""),
    ("cmyk jpeg", lambda d: image(d, "a.jpg", "CMYK"), 0.5, TILES, ""),
    ("cmyk tiff", lambda d: image(d, "a.tif", "CMYK"), 0.5, TILES, ""),
    ("palette tiff", lambda d: image(d, "a.tif", "P"), 0.5, TILES, ""),
    ("alpha png", lambda d: rgba(d, "a.png"), 0.5, TILES, ""),
    ("alpha tiff", lambda d: rgba(d, "a.tif"), 0.5, TILES, ""),
    ("jpeg core", lambda d: image(d, "a.jpg"), 0.5, TILES, ""),
    ("jpeg without mpp", lambda d: image(d, "a.jpg"), None, MissingMpp, "column `mpp`"),
    (
        "striped tiff",
        lambda d: write_tiff(d / "a.tif", tissue_rgb(), rowsperstrip=16, compression="deflate", **RGB),
        0.5,
        TILES,
        "",
    ),
    (
        "planar tiff",
        lambda d: write_tiff(
            d / "a.tif", np.moveaxis(tissue_rgb(), 2, 0).copy(), planarconfig="separate", rowsperstrip=100, **RGB
        ),
        0.5,
        TILES,
        "",
    ),
    (
        "one huge strip",
        lambda d: write_tiff(d / "a.tif", tissue_rgb(2048, 2048), rowsperstrip=2048, **RGB),
        0.5,
        TILES,
        "",
    ),
    ("float tiff", lambda d: write_tiff(d / "a.tif", np.ones((600, 600), np.float32)), 0.5, UnreadableSlide, "float32"),
    (
        "seven channels",
        lambda d: write_tiff(
            d / "a.tif", np.ones((600, 600, 7), np.uint8), photometric="minisblack", planarconfig="contig"
        ),
        0.5,
        UnreadableSlide,
        "7 channels",
    ),
    ("pages of odd sizes", many_pages, 0.5, TILES, ""),
    ("absurd header", lambda d: giant_tiff(d / "a.tif"), 0.5, UnreadableSlide, "million px|claims|damaged"),
    ("png bomb", lambda d: bomb_png(d / "a.png"), 0.5, UnreadableSlide, "too large"),
    (
        "directory loop",
        lambda d: raw(d / "a.tif", struct.pack("<2sHIHI", b"II", 42, 8, 0, 8) + b"\0" * 30),
        0.5,
        UnreadableSlide,
        "damaged|TIFF",
    ),
    ("damaged pixels", lambda d: poke(svs(d, downsamples=(1,)), 3000, b"\0" * 20000), None, None, ""),
    ("mrxs without its folder", mrxs_without_data, None, UnreadableSlide, "damaged|recognise"),
    ("mpp 0", lambda d: svs(d, mpp="0"), None, MissingMpp, "passed over"),
    ("mpp negative", lambda d: svs(d, mpp="-0.5"), None, MissingMpp, "passed over"),
    ("mpp nan", lambda d: svs(d, mpp="nan"), None, MissingMpp, "mpp"),
    ("mpp text", lambda d: svs(d, mpp="half"), None, MissingMpp, "mpp"),
    ("mpp of a screen", lambda d: svs(d, mpp="352.8"), None, MissingMpp, "which no slide has"),
    ("no mpp", lambda d: svs(d, mpp=None), None, MissingMpp, "objective power of 20x but no mpp"),
    ("no mpp, manifest tells", lambda d: svs(d, mpp=None), 0.5, TILES, ""),
    ("too coarse", lambda d: svs(d, mpp="4.0"), None, SlideError, "enlarged 8.00 times"),
    ("non-ascii name", lambda d: svs(d, "Größe 鼻 №7.svs"), None, TILES, ""),
    ("very long name", lambda d: svs(d, "x" * 240 + ".svs"), None, TILES, ""),
    ("name with newline", lambda d: svs(d, "a\nb.svs"), None, TILES, ""),
    ("same name in two folders", lambda d: in_folder(d, "q"), None, TILES, ""),
    ("dangling link", linked, None, UnreadableSlide, "symbolic link"),
    ("missing file", lambda d: d / "none.svs", None, UnreadableSlide, "no such file"),
    ("directory named svs", lambda d: folder_named(d, "x.svs"), None, UnreadableSlide, "folder without .dcm"),
    (
        "not DICOM",
        lambda d: raw(d / "a.dcm", b"\0" * 128 + b"DICM" + b"\1" * 50),
        None,
        UnreadableSlide,
        "DICOM|recognise|damaged",
    ),
]


def outcome(path: Path, mpp: float | None) -> tuple[object, str]:
    """What becomes of a slide: TILES, NO_TILE or the type of its SlideError, and the message."""
    try:
        tiled = tile_slide(path, TileConfig(overlay=False), mpp)
    except SlideError as error:
        return type(error), str(error)
    return (NO_TILE, tiled.empty) if tiled.empty else (TILES, "")


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_each_odd_slide_has_its_end(case: Case, tmp_path: Path) -> None:
    _, make, mpp, expected, message = case
    path = make(tmp_path)
    end, said = outcome(path, mpp)
    if expected is not None:
        assert end == expected, said
    assert re.search(message, said)
    if isinstance(end, type):
        assert path.name in said, "the message names the slide"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = svs(tmp_path)
    path.chmod(0)
    with pytest.raises(UnreadableSlide, match="no permission"):
        tile_slide(path, TileConfig())


def test_there_are_enough_of_them() -> None:
    assert len({c[0] for c in CASES}) >= 30


def test_a_pipe_is_no_slide_and_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody writes into it: whoever opens it waits for ever."""
    os.mkfifo(tmp_path / "pipe.svs")
    assert identity.stamp(tmp_path / "pipe.svs") is None
    with pytest.raises(UnreadableSlide, match=r"pipe\.svs is a pipe"):
        open_slide(tmp_path / "pipe.svs")
