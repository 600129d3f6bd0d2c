"""What is written without the zarr library is what the library writes, byte for byte, and what it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from mhim.pipeline.store import reading, writing

ARRAYS = {
    "coords": np.arange(20, dtype=np.int32).reshape(10, 2),
    "fractions": np.linspace(0, 1, 2237, dtype=np.float32),
    "zeros": np.zeros(7, np.float32),
    "minus": np.full(7, -0.0, np.float32),
    "nothing": np.zeros((0, 4), np.float16),
    "mask": np.arange(12, dtype=np.uint8).reshape(4, 3),
    "chunks": np.arange(90000, dtype=np.uint16).reshape(45000, 2),
    "gap": np.repeat(np.array([1, 0, 2], np.int64), 16384),
    "odd": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "truth": np.array([True, False]),
}
ATTRS = {"mpp": 0.5, "vendor": "µ", "bounds": [0, 1], "none": None, "inf": float("inf")}


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_library_would_write_the_same_bytes_and_reads_them(tmp_path: Path) -> None:
    writer = writing.StoreWriter(tmp_path / "ours", ATTRS)
    group = zarr.create_group(str(tmp_path / "theirs"), attributes=ATTRS)
    for name, data in ARRAYS.items():
        writer.write(name, data)
        chunks = (writing.even_chunk(len(data), 16384), *data.shape[1:])
        made = group.create_array(name, shape=data.shape, dtype=data.dtype, chunks=chunks, compressors=None)
        if len(data):
            made[...] = data
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    opened = zarr.open_group(str(tmp_path / "ours"), mode="r")
    assert dict(opened.attrs) == ATTRS
    for name, data in ARRAYS.items():
        assert np.array_equal(opened[name][...], data)
        assert np.array_equal(reading.read_array(tmp_path / "ours", name), data)


def test_an_array_beside_those_of_the_library(tmp_path: Path) -> None:
    writer = writing.StoreWriter(tmp_path / "x", {"a": 1})
    features = writer.create("features", (5, 3), "float16", 4)
    features[...] = np.ones((5, 3))
    writer.write("coords", ARRAYS["coords"])
    writer.write("small", np.ones(3, ">i4"))
    assert reading.array_names(tmp_path / "x") == ["coords", "features", "small"]
    assert reading.read_attrs(tmp_path / "x") == {"a": 1}
    assert reading.read_array(tmp_path / "x", "small").tolist() == [1, 1, 1]
    with pytest.raises(FileExistsError):
        writing.StoreWriter(tmp_path / "x", {})
