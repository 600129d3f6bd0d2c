"""Files built to each program's layout come in with the right corners, and go out and in again unchanged."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.exchange import features_in
from mhim.pipeline.store import layout, reading

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


def load(work: layout.Work, slide: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    path = work.feature_store("imported", slide)
    return reading.read_array(path, "features"), reading.read_array(path, "coords"), reading.read_attrs(path)


def test_clam_h5_and_pt(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    h5(tmp_path / "f" / "h5_files" / "a.h5", {"features": features, "coords": corners})
    for slide in ("a", "b"):  # `a` twice, as CLAM writes it; `b` as pt only
        (tmp_path / "f" / "pt_files").mkdir(exist_ok=True)
        torch.save(torch.from_numpy(features), tmp_path / "f" / "pt_files" / f"{slide}.pt")
    work = layout.Work(tmp_path / "work")
    assert features_in.import_folder(tmp_path / "f", work, "imported") == ["a", "b"]
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
    work = layout.Work(tmp_path / "work")
    features_in.import_folder(tmp_path / "f", work, "imported")
    got, coords, attrs = load(work, "a")
    np.testing.assert_array_equal(got, features)
    np.testing.assert_array_equal(coords, corners)
    assert (attrs["tile_px"], attrs["tile_l0"], attrs["mpp"]) == (256, [512, 512], 0)
    assert attrs["imported"]["layout"] == "trident"
    assert attrs["imported"]["target_magnification"] == 20
    assert "tile_l0_source" not in attrs
    unknown = {**said, "patch_size_level0": "None"}
    h5(tmp_path / "g" / "b.h5", {"features": features, "coords": corners}, unknown, "coords")
    features_in.import_folder(tmp_path / "g", work, "imported")
    _, _, attrs = load(work, "b")
    assert attrs["tile_l0"] == [512, 512], "from the corners themselves"
    assert attrs["tile_l0_source"].startswith("smallest distance")


def test_clam_coordinate_attributes(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    """256 px at a level four times coarser are 1024 px of level 0."""
    said = {"patch_size": 256, "patch_level": 1, "downsample": np.array([4.0, 4.0]), "name": "a"}
    h5(tmp_path / "f" / "a.h5", {"features": features, "coords": corners}, said, "coords")
    work = layout.Work(tmp_path / "work")
    features_in.import_folder(tmp_path / "f", work, "imported")
    _, _, attrs = load(work, "a")
    assert (attrs["imported"]["layout"], attrs["tile_px"], attrs["tile_l0"]) == ("clam", 256, [1024, 1024])


@pytest.mark.parametrize("slide_mpp", [0.25, None])
def test_stamp(tmp_path: Path, features: np.ndarray, slide_mpp: float | None) -> None:
    """256 µm in 224 px; corners in µm become level-0 px of the slide, or px of the tile where its mpp is unknown."""
    um = np.stack([np.arange(N) * 256.0, np.arange(N) * 256.0], axis=1)
    said = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "x", "stamp_version": "2.5.0"}
    h5(tmp_path / "f" / "a.h5", {"feats": features.astype(np.float16), "coords": um}, said)
    work = layout.Work(tmp_path / "work")
    features_in.import_folder(tmp_path / "f", work, "imported", lambda slide: slide_mpp)
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
    work = layout.Work(tmp_path / "work")
    h5(tmp_path / "f" / "a.h5", {"feats": features, "coords": um}, {"unit": "um", "tile_size": 256.0})
    features_in.import_folder(tmp_path / "f", work, "imported", lambda slide: 0.5)
    _, coords, attrs = load(work, "a")
    np.testing.assert_array_equal(coords, um * 2)
    assert attrs["tile_l0"] == [512, 512]
    h5(tmp_path / "g" / "b.h5", {"feats": features, "coords": um / 256 * 224}, {"extractor": "xiyuewang-ctranspath"})
    features_in.import_folder(tmp_path / "g", work, "imported", lambda slide: 0.5)
    _, coords, attrs = load(work, "b")
    np.testing.assert_array_equal(coords, um / 256 * 224)
    assert attrs["imported"]["coords_frame"].startswith("unknown")
    assert attrs["mpp"] == 0
    h5(tmp_path / "h" / "c.h5", {"feats": features[:1]}, {"feat_type": "slide"})
    with pytest.raises(CohortError, match="whole slide"):
        features_in.import_folder(tmp_path / "h", work, "imported")


def test_atlaspatch(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    five = np.concatenate([corners, np.full((N, 2), 512), np.zeros((N, 1), int)], axis=1)
    arrays = {"coords": five, "features/uni_v1": features}
    said = {
        "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
        "overlap": 0, "level0_width": 9000, "level0_height": 8000, "wsi_path": "/slides/a.svs", "num_patches": N,
    }  # fmt: skip
    h5(tmp_path / "f" / "a.h5", {**arrays, "passports": np.full(N, b"a__x0_y0", "S160")}, said)
    work = layout.Work(tmp_path / "work")
    features_in.import_folder(tmp_path / "f", work, "imported")
    got, coords, attrs = load(work, "a")
    np.testing.assert_array_equal(got, features)
    np.testing.assert_array_equal(coords, corners)
    assert attrs["imported"]["inner"] == "uni_v1"
    assert (attrs["imported"]["layout"], attrs["tile_px"], attrs["tile_l0"]) == ("atlaspatch", 256, [512, 512])
    h5(tmp_path / "g" / "a.h5", {**arrays, "features/other": features + 1})
    with pytest.raises(CohortError, match="other, uni_v1; say which"):
        features_in.import_folder(tmp_path / "g", layout.Work(tmp_path / "w2"), "imported")
    features_in.import_folder(tmp_path / "g", layout.Work(tmp_path / "w2"), "imported", inner="other")
    np.testing.assert_array_equal(load(layout.Work(tmp_path / "w2"), "a")[0], features + 1)


def test_plain_folders(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    (tmp_path / "f").mkdir()
    np.save(tmp_path / "f" / "a.npy", features)
    torch.save({"feats": torch.from_numpy(features), "coords": torch.from_numpy(corners)}, tmp_path / "f" / "b.pt")
    work = layout.Work(tmp_path / "work")
    assert features_in.import_folder(tmp_path / "f", work, "imported") == ["a", "b"]
    np.testing.assert_array_equal(load(work, "a")[0], features)
    np.testing.assert_array_equal(load(work, "b")[1], corners)
    before = {p: p.read_bytes() for p in work.root.rglob("*") if p.is_file()}
    features_in.import_folder(tmp_path / "f", work, "imported")
    assert before == {p: p.read_bytes() for p in work.root.rglob("*") if p.is_file()}, "same files again change nothing"
    np.save(tmp_path / "f" / "a.npy", features + 1)
    with pytest.raises(CohortError, match="holds other features already"):
        features_in.import_folder(tmp_path / "f", work, "imported")


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("sprung",)


def test_bad_files_are_named(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    work = layout.Work(tmp_path / "work")
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
        "huge.npy": (lambda p: np.save(p, features.astype(np.float64) * 1e39), "divide all files"),
        "text.npy": (lambda p: np.save(p, np.array([["a", "b"]])), "not numbers"),
        "rows.h5": (lambda p: h5(p, {"features": features, "coords": corners[:5]}), "37 tiles"),
    }
    for name, (make, message) in cases.items():
        file = tmp_path / name
        make(file)
        with pytest.raises(CohortError, match=message) as caught:
            features_in.import_folder(file, work, "imported")
        assert name in str(caught.value)
    with pytest.raises(CohortError, match=r"no .* file in it"):
        features_in.import_folder(tmp_path / "nowhere", work, "imported")
    assert not list(work.root.rglob("*.zarr"))


@pytest.mark.parametrize("kind", ["npy", "pt", "h5"])
@pytest.mark.parametrize("shape", [(1, N, D), (N, 1, D), (N, D)])
def test_an_axis_of_one_and_any_usual_name(
    tmp_path: Path, features: np.ndarray, corners: np.ndarray, shape: Any, kind: str
) -> None:
    """Doubles beyond float16 come in as float32, whatever the arrays are called and however they are wrapped."""
    big = (features * 1e5).astype(np.float64).reshape(shape)
    (tmp_path / "f").mkdir()
    if kind == "npy":
        np.save(tmp_path / "f" / "a.npy", big)
    elif kind == "pt":
        torch.save(
            {"embeddings": torch.from_numpy(big), "coordinates": torch.from_numpy(corners[None])},
            tmp_path / "f" / "a.pt",
        )
    else:
        h5(tmp_path / "f" / "a.h5", {"embeddings": big, "coords": corners[None]})
    work = layout.Work(tmp_path / "work")
    features_in.import_folder(tmp_path / "f", work, "imported")
    got, coords, _ = load(work, "a")
    np.testing.assert_array_equal(got, (features * 1e5).astype(np.float64).astype(np.float32))
    if kind != "npy":
        np.testing.assert_array_equal(coords, corners)


def test_a_file_without_tiles_is_an_empty_slide(tmp_path: Path, features: np.ndarray) -> None:
    h5(tmp_path / "f" / "a.h5", {"features": features[:0], "coords": np.zeros((0, 2), np.int64)})
    np.save(tmp_path / "f" / "b.npy", features)
    torch.save(torch.empty(0), tmp_path / "f" / "c.pt")
    work = layout.Work(tmp_path / "work")
    assert features_in.import_folder(tmp_path / "f", work, "imported") == ["a", "b", "c"]
    assert load(work, "a")[2]["empty"] == load(work, "c")[2]["empty"] == features_in.NO_TILES
    usable, damaged = cases._usable(work.features("imported"))
    assert (list(usable), damaged) == (["b"], {})


def test_slide2vec(tmp_path: Path, features: np.ndarray, corners: np.ndarray) -> None:
    """tile_embeddings/<id>.pt, its sidecar, and the coordinates under tiles/, as docs/output-layout tells."""
    root = tmp_path / "run"
    (root / "tiles").mkdir(parents=True)
    (root / "tile_embeddings").mkdir()
    (root / "slide_embeddings").mkdir()
    torch.save(torch.from_numpy(features), root / "tile_embeddings" / "a.pt")
    torch.save(torch.zeros(3), root / "slide_embeddings" / "a.pt")
    said = {"encoder_name": "x", "requested_tile_size_px": 224, "requested_spacing_um": 0.5, "tile_size_lv0": 448}
    (root / "tile_embeddings" / "a.meta.json").write_text(json.dumps(said))
    np.savez(root / "tiles" / "a.coordinates.npz", x=corners[:, 0], y=corners[:, 1])
    work = layout.Work(tmp_path / "work")
    assert features_in.import_folder(root, work, "imported") == ["a"]
    got, coords, attrs = load(work, "a")
    np.testing.assert_array_equal(got, features)
    np.testing.assert_array_equal(coords, corners)
    assert (attrs["mpp"], attrs["tile_px"], attrs["tile_l0"]) == (0.5, 224, [448, 448])
    (root / "tiles" / "a.coordinates.npz").write_bytes(b"damaged")
    with pytest.raises(CohortError, match=r"a\.pt: what slide2vec wrote"):
        features_in.import_folder(root, layout.Work(tmp_path / "again"), "imported")
