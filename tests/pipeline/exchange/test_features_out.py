"""What is exported is loaded here as the named programs are documented to load it, and comes in again whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.exchange import features_in, features_out, imported
from mhim.pipeline.store import layout as store
from mhim.pipeline.store import reading, writing

N, D = 12, 6
FEATURES = np.random.default_rng(0).standard_normal((N, D)).astype(np.float16)
CORNERS = np.stack([np.arange(N) % 4 * 384, np.arange(N) // 4 * 384], axis=1).astype(np.int32)  # tiles of 512, 128 over
ATTRS = {
    "encoder": "mine",
    "mpp": 0.5,
    "slide_mpp": [0.25, 0.25],
    "tile_px": 256,
    "tile_l0": [512.0, 512.0],
    "size_l0": [4000, 3000],
}


def made(tmp_path: Path, slides: dict[str, dict[str, Any]]) -> store.Work:
    work = store.Work(tmp_path / "work")
    for slide, more in slides.items():
        writer = writing.StoreWriter(work.feature_store("mine", slide), {**ATTRS, **more})
        writer.write("features", FEATURES)
        writer.write("coords", CORNERS)
    return work


def out(tmp_path: Path, layout: str) -> Path:
    work = made(tmp_path, {"sub/a.b.SVS": {}, "c": {"overlap_um": 64.0}, "gone.svs": {"empty": "no tissue"}})
    empty: list[str] = []
    found = features_out.export(work.features("mine"), tmp_path / "out", layout, empty=empty)
    assert (list(found), empty) == (["c", "sub/a.b.SVS"], ["gone.svs"])
    return tmp_path / "out"


def test_clam(tmp_path: Path) -> None:
    folder = out(tmp_path, "clam")
    flat = torch.load(folder / "pt_files" / "a.b.pt", weights_only=True)  # '{}.pt'.format(slide_id), into nn.Linear
    assert flat.dtype == torch.float32
    torch.nn.Linear(D, 2)(flat)
    np.testing.assert_array_equal(flat.numpy(), FEATURES.astype(np.float32))
    with h5py.File(folder / "h5_files" / "a.b.h5") as h5:
        np.testing.assert_array_equal(h5["coords"][:], CORNERS)
        assert h5["features"].dtype == np.float32


@pytest.mark.parametrize("name", ["a.b", "c"])
def test_trident(tmp_path: Path, name: str) -> None:
    """Overlap in px of a tile: from the record, or, of features that do not carry it, from their corners."""
    with h5py.File(out(tmp_path, "trident") / f"{name}.h5") as h5:
        said = dict(h5["coords"].attrs)
        np.testing.assert_array_equal(h5["features"][:], FEATURES)
        np.testing.assert_array_equal(h5["coords"][:], CORNERS)
    assert said == {
        "name": name,
        "patch_size": 256,
        "patch_size_level0": 512,
        "overlap": {"a.b": 64, "c": 128}[name],
        "target_magnification": 20.0,
        "level0_magnification": 40.0,
        "level0_width": 4000,
        "level0_height": 3000,
    }


def test_stamp(tmp_path: Path) -> None:
    with h5py.File(out(tmp_path, "stamp") / "a.b.h5") as h5:
        np.testing.assert_array_equal(h5["feats"][:], FEATURES)
        np.testing.assert_array_equal(h5["coords"][:], CORNERS * 0.25)
        assert (h5.attrs["unit"], h5.attrs["tile_size_um"], h5.attrs["tile_size_px"]) == ("um", 128.0, 256)
    work = made(tmp_path / "unknown", {"a": {"slide_mpp": None}})
    with pytest.raises(CohortError, match="STAMP keeps coordinates in µm"):
        list(features_out.export(work.features("mine"), tmp_path / "none", "stamp"))
    assert not (tmp_path / "none").exists()


def test_atlaspatch(tmp_path: Path) -> None:
    with h5py.File(out(tmp_path, "atlaspatch") / "patches" / "a.b.h5") as h5:
        assert list(h5["features"]) == ["mine"]
        np.testing.assert_array_equal(h5["features/mine"][:], FEATURES)
        np.testing.assert_array_equal(h5["coords"][:, :2], CORNERS)
        assert h5["coords"].shape == (N, 5)
        assert h5["coords"].dtype == np.int32
        assert (h5.attrs["patch_size_level0"], h5.attrs["num_patches"]) == (512, N)


def test_slide2vec(tmp_path: Path) -> None:
    folder = out(tmp_path, "slide2vec")
    tiles = torch.load(folder / "tile_embeddings" / "a.b.pt", map_location="cpu", weights_only=True)
    np.testing.assert_array_equal(tiles.numpy(), FEATURES)
    with np.load(folder / "tiles" / "a.b.coordinates.npz") as data:
        np.testing.assert_array_equal(np.stack([data["x"], data["y"]], 1), CORNERS)
        assert (data["x"].dtype, data["tile_index"].dtype) == (np.int64, np.int32)
    said = json.loads((folder / "tile_embeddings" / "a.b.meta.json").read_text())
    assert (said["num_tiles"], said["feature_dtype"], said["tile_size_lv0"]) == (N, "fp16", 512)
    how = json.loads((folder / "tiles" / "a.b.coordinates.meta.json").read_text())
    assert how["slide"]["base_spacing_um"] == 0.25


@pytest.mark.parametrize("layout", features_out.FORMATS)
def test_round_trip(tmp_path: Path, layout: str) -> None:
    folder = out(tmp_path, layout)
    back = store.Work(tmp_path / "back")
    mpp = {"a.b": 0.25, "c": 0.25}
    assert features_in.import_folder(folder, back, "imported", mpp.get) == ["a.b", "c"]
    path = back.feature_store("imported", "a.b")
    np.testing.assert_array_equal(reading.read_array(path, "features"), FEATURES)
    np.testing.assert_array_equal(reading.read_array(path, "coords"), CORNERS)
    attrs = reading.read_attrs(path)
    assert attrs["imported"]["layout"] == layout
    if layout != "clam":
        assert (attrs["tile_px"], attrs["tile_l0"]) == (256, [512, 512])
    assert not imported.unplaced(attrs)


def test_two_slides_that_would_be_one_file_are_refused(tmp_path: Path) -> None:
    work = made(tmp_path, {"x/a.svs": {}, "y/A.tif": {}})
    with pytest.raises(CohortError, match=r"y/A.tif and x/a.svs would both be written as A"):
        list(features_out.export(work.features("mine"), tmp_path / "out", "clam"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(CohortError, match="--format zip"):
        list(features_out.export(work.features("mine"), tmp_path / "out", "zip"))


class _Slide:
    size_l0 = (4000, 3000)
    slide_mpp = (0.25, 0.25)


def test_imported_tiles_are_placed_on_the_slide_at_hand_or_refused() -> None:
    bare = {"weights_id": "imported", "tile_l0": [512, 512], "mpp": 0.0, "imported": {"level0_width": 4000}}
    found = imported.placed(bare, _Slide(), CORNERS, "a.zarr")
    assert (found.slide_mpp, found.size_l0, found.bounds_l0) == ((0.25, 0.25), (4000, 3000), (0, 0, 4000, 3000))
    assert (found.tile_px, found.mpp) == (512, 0.25)
    with pytest.raises(store.StoreError, match="made of a slide of 4100 px"):
        imported.placed({**bare, "imported": {"level0_width": 4100}}, _Slide(), CORNERS, "a.zarr")
    with pytest.raises(store.StoreError, match="outside of this slide"):
        imported.placed(bare, _Slide(), CORNERS + 4000, "a.zarr")
    assert "without coordinates" in imported.unplaced({"coords_frame": "none: the file has no coordinates"})
    assert "--slide-mpp" in imported.unplaced({"imported": {"coords_frame": "px of 1.14 µm"}})
