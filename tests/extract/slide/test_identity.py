"""Identity of a slide: other content is another slide, whatever its container; names and times are no content."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from mhim.extract.slide import identity
from mhim.extract.slide.dicom import WHOLE_SLIDE
from mhim.extract.slide.identity import same, stamp
from tests.extract.slides import tissue_rgb


def slide(path: Path, at: str, **options: object) -> Path:
    """A TIFF with the same disc of tissue at the left or the right."""
    rgb = tissue_rgb(512, 1024)
    shift = -200 if at == "left" else 200
    tifffile.imwrite(path, np.roll(rgb, shift, axis=1), metadata=None, **options)  # type: ignore[arg-type]
    return path


CONTAINERS = {
    "strips": {},
    "strips, packed": {"compression": "deflate"},
    "tiles": {"tile": (256, 256)},
    "tiles, jpeg": {"tile": (256, 256), "compression": "jpeg"},
    "bigtiff": {"bigtiff": True, "tile": (128, 128)},
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
@pytest.mark.parametrize("options", CONTAINERS.values(), ids=CONTAINERS)
def test_other_tissue_is_another_slide(
    options: dict[str, object], whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(identity, "WHOLE_BYTES", 0)
        monkeypatch.setattr(identity, "END_BYTES", 256)
        monkeypatch.setattr(identity, "BLOCKS", 64)
        monkeypatch.setattr(identity, "BLOCK_BYTES", 256)
        monkeypatch.setattr(identity, "COARSE_BYTES", 0)
    one = identity.identity(slide(tmp_path / "a.tif", "left", **options))
    other = identity.identity(slide(tmp_path / "b.tif", "right", **options))
    copy = identity.identity(Path(shutil.copy(tmp_path / "a.tif", tmp_path / "of_another_name.tif")))
    assert same(one, other) is False
    assert same(one, copy) is True


def test_a_change_in_one_column_of_an_uncompressed_picture_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks at equal distances would all fall into the same column where rows are as long as that distance."""
    for name, value in {"WHOLE_BYTES": 0, "END_BYTES": 64, "BLOCKS": 64, "BLOCK_BYTES": 64}.items():
        monkeypatch.setattr(identity, name, value)
    rows = np.zeros((64, 4096), np.uint8)
    (tmp_path / "a").write_bytes(rows.tobytes())
    for start in range(0, 4096, 512):
        changed = rows.copy()
        changed[:, start : start + 512] = 1
        (tmp_path / "b").write_bytes(changed.tobytes())
        assert identity.identity(tmp_path / "a") != identity.identity(tmp_path / "b"), start


def test_a_coarse_level_tells_what_the_blocks_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WHOLE_BYTES": 0, "END_BYTES": 16, "BLOCKS": 4, "BLOCK_BYTES": 1}.items():
        monkeypatch.setattr(identity, name, value)
    found = []
    for spot in (0, 1):
        path = tmp_path / f"{spot}.tif"
        level = np.zeros((64, 64, 3), np.uint8)
        level[20, 20] = spot
        with tifffile.TiffWriter(path) as tif:
            tif.write(np.zeros((1024, 1024, 3), np.uint8), metadata=None, tile=(256, 256), subifds=1)
            tif.write(level, metadata=None, subfiletype=1)
        found.append(identity.identity(path))
    assert found[0] != found[1]


def test_a_slide_of_several_files_counts_them_all_and_not_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.mrxs").write_bytes(b"x")
    (tmp_path / "a").mkdir()
    for k in range(3):
        (tmp_path / "a" / f"Data{k}.dat").write_bytes(bytes([k]) * 100)
    before, before_stamp = identity.identity(tmp_path / "a.mrxs"), stamp(tmp_path / "a.mrxs")
    (tmp_path / "a" / "Data2.dat").write_bytes(b"y" * 100)
    assert identity.identity(tmp_path / "a.mrxs") != before
    assert stamp(tmp_path / "a.mrxs") != before_stamp


def test_a_dicom_slide_is_the_instances_of_its_series(tmp_path: Path) -> None:
    for n, pixels in enumerate((b"a", b"b")):
        write_dicom(tmp_path / f"{n}.dcm", "1.2.3", pixels * 50)
    before = identity.identity(tmp_path / "0.dcm")
    write_dicom(tmp_path / "other_series.dcm", "1.2.34", b"c" * 50)
    (tmp_path / "notes").write_text("no DICOM")
    assert identity.identity(tmp_path / "0.dcm") == before, "another series beside it is another slide"
    os.rename(tmp_path / "1.dcm", tmp_path / "renamed.dcm")
    assert identity.identity(tmp_path / "0.dcm") == before
    assert identity.identity(tmp_path / "other_series.dcm") != before
    write_dicom(tmp_path / "renamed.dcm", "1.2.3", b"d" * 50)
    assert identity.identity(tmp_path / "0.dcm") != before


def write_dicom(path: Path, series: str, pixels: bytes) -> None:
    """The head of an instance of a whole slide, and something in place of its pixels."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    of = Dataset()
    of.SOPClassUID, of.SOPInstanceUID, of.SeriesInstanceUID = WHOLE_SLIDE, f"{series}.1", series
    of.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    of.TotalPixelMatrixColumns = of.TotalPixelMatrixRows = 10
    of.add_new(0x7FE00010, "OB", pixels)
    of.file_meta = FileMetaDataset()
    of.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    of.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize(
    "head", [b"II*\0\xff\xff\xff\x7f", b"II+\0\x08\0\0\0" + b"\xff" * 8, b"MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_damaged_structure_is_still_hashed(head: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 0)
    found = set()
    for last in (0, 1):
        (tmp_path / "x.tif").write_bytes(head + bytes(200_000) + bytes([last]))
        found.add(identity.identity(tmp_path / "x.tif"))
    assert len(found) == 2


def test_what_is_unknown_is_not_judged() -> None:
    assert same(None, "1-5-aa") is None
    assert same("0-5-aa", "1-5-aa") is None
    assert stamp(Path("/no/such/file.svs")) is None
