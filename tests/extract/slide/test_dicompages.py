"""DICOM slides are decoded frame by frame with OpenSlide's pixels, wherever their table of frames stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames

from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideJob
from mhim.extract.reading.readers import open_reader
from mhim.extract.slide import dicompages
from mhim.extract.slide.slide import open_slide
from tests.extract.containers import painted
from tests.extract.dicoms import write_instance, write_series

SERIES = "1.2.826.0.1.3680043.8.498.1"


def read(path: Path, mpp: float, reader: str = "auto") -> tuple[np.ndarray, str, str]:
    corners = np.array([(x, y) for y in range(-40, 700, 130) for x in range(-40, 900, 130)], np.int32)
    opened = open_reader(SlideJob(path, corners, 128, mpp, (0.5, 0.5)), ExtractConfig(reader=reader))  # type: ignore[arg-type]
    out = np.empty((len(corners), 128, 128, 3), np.uint8)
    opened.fill(corners, out)
    opened.close()
    return out, opened.kind, opened.note


def rewritten(path: Path, table: str) -> None:
    """Put the frames of a file down again with another table of them."""
    data = pydicom.dcmread(path)
    frames = list(generate_frames(data.PixelData, number_of_frames=int(data.NumberOfFrames)))
    if table == "extended":
        data.PixelData, data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths = encapsulate_extended(frames)
    else:
        data.PixelData = encapsulate(frames, has_bot=table == "basic")
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("table", ["basic", "extended", "none"])
@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_same_pixels_at_every_level(tmp_path: Path, table: str, folder: bool) -> None:
    files = write_series(tmp_path / "s", painted(920, 760), SERIES, ("b.dcm", "a.dcm"), label="0.dcm")
    for file in files[:2]:
        rewritten(file, table)
    write_series(tmp_path / "s", painted(512, 512, 1), f"{SERIES}.5", ("9.dcm",))  # another slide in the same folder
    path = files[0]
    if folder:
        (tmp_path / "s" / "9.dcm").unlink()
        path = tmp_path / "s"
    for mpp in (0.5, 1.0):
        ours, kind, note = read(path, mpp)
        assert kind == "direct", note
        np.testing.assert_array_equal(ours, read(path, mpp, "openslide")[0])
    with open_slide(path, file_tiles=True) as slide:
        whole = slide.read_region(0, 0, (920, 760), 0.5)
    assert np.abs(whole.astype(int) - painted(920, 760)).mean() < 6


def test_what_is_laid_out_otherwise_is_refused(tmp_path: Path) -> None:
    kind = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    one = tmp_path / "one" / "1.dcm"
    one.parent.mkdir()
    write_instance(one, painted(600, 400), SERIES, f"{SERIES}.1", kind, DimensionOrganizationType="TILED_SPARSE")
    with pytest.raises(ValueError, match="one plane of tiles"):
        dicompages.level_pages(one)
    data = pydicom.dcmread(write_instance(one, painted(600, 400), SERIES, f"{SERIES}.1", kind))
    data.NumberOfFrames = 12  # two planes of six
    data.save_as(one)
    with pytest.raises(ValueError, match="12 DICOM frames are not one plane"):
        dicompages.level_pages(one)


def test_cut_off_frames_are_refused(tmp_path: Path) -> None:
    path = write_series(tmp_path, painted(600, 400), SERIES, ("1.dcm",))[0]
    rewritten(path, "none")
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(ValueError, match="fragments"):
        dicompages.level_pages(path)
