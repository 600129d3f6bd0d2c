"""Files built to each program's layout come in with the right corners, and go out and in again unchanged."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import bridges, store
from pipeline.cohort import CohortError

h5py = pytest.importorskip("h5py")
N, D = 37, 12


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)


@pytest.fixture
def corners() -> np.ndarray:
    return np.stack([np.arange(N) * 512, np.arange(N) * 512 + 40], axis=1).astype(np.int64)


def h5(path: Path, arrays: dict[str, np.ndarray], attrs: dict[str, Any] | None = None, on: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
        (file[on] if on else file).attrs.update(attrs or {})
    return path


def load(work: store.Work, slide: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    path = work.feature_store("imported", slide)
    return store.read_array(path, "features"), store.read_array(path, "coords"), store.read_attrs(path)


def test_clam_h5_and_pt(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    h5(tmp_path / "f" / "h5_files" / "a.h5", {"features": features, "coords": corners})
    for slide in ("a", "b"):  # `a` twice, as CLAM writes it; `b` as pt only
        (tmp_path / "f" / "pt_files").mkdir(exist_ok=True)
        torch.save(torch.from_numpy(features), tmp_path / "f" / "pt_files" / f"{slide}.pt")
    work = store.Work(tmp_path / "work")
    assert bridges.import_folder(tmp_path / "f", work, "imported") == ["a", "b"]
    got, coords, attrs = load(work, "a")
    np.testing.assert_array_equal(got, features)
    np.testing.assert_array_equal(coords, corners)
    assert coords.dtype == np.int32
    assert attrs["mpp"] == 0, "unknown stays unknown"
    assert attrs["imported"]["layout"] == "clam"
    got, _, attrs = load(work, "b")
    np.testing.assert_array_equal(got, features)
    assert attrs["coords_frame"].startswith("none")


def test_trident(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    said = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "target_magnification": 20,
        "level0_magnification": 40,
        "name": "a",
    }
    h5(tmp_path / "f" / "a.h5", {"features": features[None], "coords": corners}, said, on="coords")
    work = store.Work(tmp_path / "work")
    bridges.import_folder(tmp_path / "f", work, "imported")
    got, coords, attrs = load(work, "a")
    np.testing.assert_array_equal(got, features)
    np.testing.assert_array_equal(coords, corners)
    assert (attrs["tile_px"], attrs["tile_l0"], attrs["mpp"]) == (256, [512, 512], 0)
    assert attrs["imported"]["layout"] == "trident"
    assert attrs["imported"]["target_magnification"] == 20
    assert "tile_l0_source" not in attrs
    unknown = {**said, "patch_size_level0": "None"}
    h5(tmp_path / "g" / "b.h5", {"features": features, "coords": corners}, unknown, "coords")
    bridges.import_folder(tmp_path / "g", work, "imported")
    _, _, attrs = load(work, "b")
    assert attrs["tile_l0"] == [512, 512], "from the corners themselves"
    assert attrs["tile_l0_source"].startswith("smallest distance")


def test_clam_coordinate_attributes(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    """256 px at a level four times coarser are 1024 px of level 0."""
    said = {"patch_size": 256, "patch_level": 1, "downsample": np.array([4.0, 4.0]), "name": "a"}
    h5(tmp_path / "f" / "a.h5", {"features": features, "coords": corners}, said, "coords")
    work = store.Work(tmp_path / "work")
    bridges.import_folder(tmp_path / "f", work, "imported")
    _, _, attrs = load(work, "a")
    assert (attrs["imported"]["layout"], attrs["tile_px"], attrs["tile_l0"]) == ("clam", 256, [1024, 1024])


@pytest.mark.parametrize("slide_mpp", [0.25, None])
def test_stamp(tmp_path: Path, features: np.ndarray, slide_mpp: float | None) -> None:
    """256 µm in 224 px; corners in µm become level-0 px of the slide, or px of the tile where its mpp is unknown."""
    um = np.stack([np.arange(N) * 256.0, np.arange(N) * 256.0], axis=1)
    said = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "x", "stamp_version": "2.5.0"}
    h5(tmp_path / "f" / "a.h5", {"feats": features.astype(np.float16), "coords": um}, said)
    work = store.Work(tmp_path / "work")
    bridges.import_folder(tmp_path / "f", work, "imported", lambda slide: slide_mpp)
    got, coords, attrs = load(work, "a")
    assert got.dtype == np.float16
    scale = slide_mpp or 256 / 224
    np.testing.assert_array_equal(coords, np.rint(um / scale))
    assert attrs["mpp"] == pytest.approx(256 / 224)
    assert attrs["tile_l0"][0] == pytest.approx(256 / scale)
    assert ("coords_frame" in attrs["imported"]) == (slide_mpp is None)


def test_older_stamp_and_slide_features(tmp_path: Path, features: np.ndarray) -> None:
    """Version 2.0 names the size `tile_size`; before 2 there is no unit, and none is made up."""
    um = np.stack([np.arange(N) * 256.0, np.arange(N) * 256.0], axis=1)
    work = store.Work(tmp_path / "work")
    h5(tmp_path / "f" / "a.h5", {"feats": features, "coords": um}, {"unit": "um", "tile_size": 256.0})
    bridges.import_folder(tmp_path / "f", work, "imported", lambda slide: 0.5)
    _, coords, attrs = load(work, "a")
    np.testing.assert_array_equal(coords, um * 2)
    assert attrs["tile_l0"] == [512, 512]
    h5(tmp_path / "g" / "b.h5", {"feats": features, "coords": um / 256 * 224}, {"extractor": "xiyuewang-ctranspath"})
    bridges.import_folder(tmp_path / "g", work, "imported", lambda slide: 0.5)
    _, coords, attrs = load(work, "b")
    np.testing.assert_array_equal(coords, um / 256 * 224)
    assert attrs["imported"]["coords_frame"].startswith("unknown")
    assert attrs["mpp"] == 0
    h5(tmp_path / "h" / "c.h5", {"feats": features[:1]}, {"feat_type": "slide"})
    with pytest.raises(CohortError, match="whole slide"):
        bridges.import_folder(tmp_path / "h", work, "imported")


def test_atlaspatch(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    five = np.concatenate([corners, np.full((N, 2), 512), np.zeros((N, 1), int)], axis=1)
    arrays = {"coords": five, "features/uni_v1": features}
    said = {
        "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
        "overlap": 0, "level0_width": 9000, "level0_height": 8000, "wsi_path": "/slides/a.svs", "num_patches": N,
    }  # fmt: skip
    h5(tmp_path / "f" / "a.h5", {**arrays, "passports": np.full(N, b"a__x0_y0", "S160")}, said)
    work = store.Work(tmp_path / "work")
    bridges.import_folder(tmp_path / "f", work, "imported")
    got, coords, attrs = load(work, "a")
    np.testing.assert_array_equal(got, features)
    np.testing.assert_array_equal(coords, corners)
    assert attrs["imported"]["inner"] == "uni_v1"
    assert (attrs["imported"]["layout"], attrs["tile_px"], attrs["tile_l0"]) == ("atlaspatch", 256, [512, 512])
    h5(tmp_path / "g" / "a.h5", {**arrays, "features/other": features + 1})
    with pytest.raises(CohortError, match="other, uni_v1; say which"):
        bridges.import_folder(tmp_path / "g", store.Work(tmp_path / "w2"), "imported")
    bridges.import_folder(tmp_path / "g", store.Work(tmp_path / "w2"), "imported", inner="other")
    np.testing.assert_array_equal(load(store.Work(tmp_path / "w2"), "a")[0], features + 1)


def test_plain_folders(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    (tmp_path / "f").mkdir()
    np.save(tmp_path / "f" / "a.npy", features)
    torch.save({"feats": torch.from_numpy(features), "coords": torch.from_numpy(corners)}, tmp_path / "f" / "b.pt")
    work = store.Work(tmp_path / "work")
    assert bridges.import_folder(tmp_path / "f", work, "imported") == ["a", "b"]
    np.testing.assert_array_equal(load(work, "a")[0], features)
    np.testing.assert_array_equal(load(work, "b")[1], corners)
    before = {p: p.read_bytes() for p in work.root.rglob("*") if p.is_file()}
    bridges.import_folder(tmp_path / "f", work, "imported")
    assert before == {p: p.read_bytes() for p in work.root.rglob("*") if p.is_file()}, "same files again change nothing"
    np.save(tmp_path / "f" / "a.npy", features + 1)
    with pytest.raises(CohortError, match="holds other features already"):
        bridges.import_folder(tmp_path / "f", work, "imported")


@pytest.mark.parametrize("layout", bridges.FORMATS)
def test_round_trip(tmp_path: Path, features: np.ndarray, corners: np.ndarray, layout: str) -> None:
    """Out in the other program's layout, and in again: every number and corner as it was."""
    work = store.Work(tmp_path / "work")
    for slide, size in (("sub/a.svs", N), ("b", 5)):
        writer = store.StoreWriter(
            work.feature_store("mine", slide),
            {
                "encoder": "mine",
                "mpp": 0.5,
                "slide_mpp": [0.25, 0.25],
                "tile_px": 256,
                "tile_l0": 512.0,
                "size_l0": [9, 8],
            },
        )
        writer.write("features", features[:size].astype(np.float16))
        writer.write("coords", corners[:size].astype(np.int32))
    assert list(bridges.export(work.features("mine"), tmp_path / "out", layout)) == ["b", "sub/a.svs"]
    back = store.Work(tmp_path / "back")
    assert sorted(bridges.import_folder(tmp_path / "out", back, "imported")) == ["a.svs", "b"]
    got, coords, attrs = load(back, "a.svs")
    np.testing.assert_array_equal(got, features.astype(np.float16))
    np.testing.assert_array_equal(coords, corners)
    assert attrs["imported"]["layout"] == layout
    if layout == "trident":
        assert attrs["tile_px"] == 256
        assert attrs["tile_l0"] == [512, 512]
        assert attrs["imported"]["target_magnification"] == 20
    else:
        flat = torch.load(tmp_path / "out" / "pt_files" / "b.pt", weights_only=True)
        np.testing.assert_array_equal(flat.numpy(), features[:5].astype(np.float16))


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("sprung",)


def test_bad_files_are_named(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    work = store.Work(tmp_path / "work")
    bad = features.copy()
    bad[3, 2] = np.nan

    def text(path: Path) -> None:
        path.write_text("no file of this kind")

    cases: dict[str, tuple[Callable[[Path], object], str]] = {
        "nan.npy": (lambda p: np.save(p, bad), "tile 3"),
        "flat.npy": (lambda p: np.save(p, features[0]), "shape"),
        "objects.npy": (lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "plain array"),
        "trap.pt": (lambda p: p.write_bytes(pickle.dumps(_Trap())), "refused"),
        "text.h5": (text, "HDF5"),
        "other.h5": (lambda p: h5(p, {"x": features}), "has x"),
        "rows.h5": (lambda p: h5(p, {"features": features, "coords": corners[:5]}), "37 tiles"),
    }
    for name, (make, message) in cases.items():
        file = tmp_path / name
        make(file)
        with pytest.raises(CohortError, match=message) as caught:
            bridges.import_folder(file, work, "imported")
        assert name in str(caught.value)
    with pytest.raises(CohortError, match=r"no .* file in it"):
        bridges.import_folder(tmp_path / "nowhere", work, "imported")
    assert not list(work.root.rglob("*.zarr"))
