"""Small DICOM slides for the tests, as a converter writes them: one instance per level, and the objects beside them."""

from __future__ import annotations

from pathlib import Path

import cv2
import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from tests.extract.slides import MPP

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
ANNOTATIONS = "1.2.840.10008.5.1.4.1.1.91.1"  # Microscopy Bulk Simple Annotations Storage
TILE = 256


def write_series(
    folder: Path,
    rgb: np.ndarray,
    series: str,
    names: tuple[str, ...] = ("1.dcm", "2.dcm"),
    label: str = "",
    mpp: float = MPP,
) -> list[Path]:
    """rgb: uint8 (h, w, 3). One instance per name, each level half as wide as the one before; and a label image."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for n, name in enumerate(names):
        size = (rgb.shape[1] >> n, rgb.shape[0] >> n)
        level = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) if n else rgb
        kind = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"] if n else ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        made.append(write_instance(folder / name, level, series, f"{series}.{n + 1}", kind, mpp * 2**n))
    if label:
        kind = ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]
        made.append(write_instance(folder / label, rgb[:160, :200], series, f"{series}.99", kind, mpp))
    return made


def write_instance(
    path: Path,
    rgb: np.ndarray,
    series: str,
    uid: str,
    image_type: list[str],
    mpp: float = MPP,
    lossless: bool = False,
    **more: object,
) -> Path:
    """One whole-slide instance in JPEG, or lossless JPEG 2000, tiles of 256 px. more: further attributes by keyword."""
    h, w = rgb.shape[:2]
    data = _head(WHOLE_SLIDE, uid, str(JPEG2000Lossless if lossless else JPEGBaseline8Bit))
    data.ImageType = image_type
    data.Modality = "SM"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = f"{series}.7", series, f"{series}.8"
    data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows, data.TotalPixelMatrixFocalPlanes = w, h, 1
    data.NumberOfOpticalPaths = 1
    tile_h, tile_w = (TILE, TILE) if image_type[2] == "VOLUME" else (h, w)  # others are one frame
    data.Rows, data.Columns = tile_h, tile_w
    data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
    data.PhotometricInterpretation = "RGB" if lossless else "YBR_FULL_422"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.DimensionOrganizationType = "TILED_FULL"
    spacing = Dataset()
    spacing.PixelSpacing = [mpp / 1000, mpp / 1000]
    shared = Dataset()
    shared.PixelMeasuresSequence = [spacing]
    data.SharedFunctionalGroupsSequence = [shared]
    for name, value in more.items():
        setattr(data, name, value)
    padded = np.full((-(-h // tile_h) * tile_h, -(-w // tile_w) * tile_w, 3), 243, np.uint8)
    padded[:h, :w] = rgb
    frames = [
        imagecodecs.jpeg2k_encode(cut, codecformat="j2k", reversible=True, mct=False)
        if lossless else imagecodecs.jpeg_encode(cut, level=90)
        for cut in (padded[y : y + tile_h, x : x + tile_w].copy()
        for y in range(0, h, tile_h) for x in range(0, w, tile_w))
    ]  # fmt: skip
    data.NumberOfFrames = len(frames)
    data.PixelData = encapsulate([bytes(f) for f in frames])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)
    return path


def write_annotations(path: Path, series: str) -> Path:
    """An object of annotations: no pixels, no slide."""
    data = _head(ANNOTATIONS, f"{series}.1", "1.2.840.10008.1.2.1")
    data.SeriesInstanceUID, data.Modality = series, "ANN"
    data.save_as(path, enforce_file_format=True)
    return path


def _head(kind: str, uid: str, syntax: str) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = kind, uid, syntax
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = kind, uid
    return data
