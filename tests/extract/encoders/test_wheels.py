"""Encoders whose weights an installed Python package brings: found without a network, and right."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from mhim.configs.schema import ExtractConfig
from mhim.extract import encoders, weights
from mhim.extract.encoders import _families

NAME = "efficientnet-lite0"
BOTH = (NAME, "efficientnet-lite2")
PALACE = 698  # of the thousand classes of ImageNet; 442 bell cote, 663 monastery


def file_of(name: str) -> Path:
    wheel = encoders.rows()[name].wheel
    pytest.importorskip(wheel.partition("/")[0], reason="needs the extra cnn")
    found = weights.installed(wheel)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def file() -> Path:
    return file_of(NAME)


def photograph(px: int = 224) -> np.ndarray:
    """uint8 (1, px, px, 3): the middle of scikit-learn's picture of a palace."""
    image = load_sample_image("china.jpg")
    h, w = image.shape[:2]
    return cv2.resize(image[:, (w - h) // 2 : (w + h) // 2], (px, px), interpolation=cv2.INTER_AREA)[None]


@pytest.mark.parametrize("name", BOTH)
def test_the_network_knows_a_palace(name: str) -> None:
    """Every tensor is in its place: with the classifier that the encoder leaves out, the picture is named."""
    row = encoders.rows()[name].model_copy(update={"kwargs": {}})
    network = _families.network(row)
    _families.fill(network, file_of(name), row)
    x = (torch.from_numpy(photograph(row.input_px)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        p = network(x)[0].softmax(0)
    assert int(p.argmax()) == PALACE
    assert p[[PALACE, 442, 663]].sum() > 0.4  # of a thousand classes


@pytest.mark.parametrize("name", BOTH)
def test_it_is_built_offline_and_its_weights_are_told_by_their_hash(name: str) -> None:
    file = file_of(name)
    config = ExtractConfig(encoder=name, offline=True)
    encoder = encoders.build(config)
    features = encoder.encode(np.repeat(photograph(), 3, axis=0))
    assert features.shape == (3, 1280)
    assert (features >= 0).all()  # what leaves the last ReLU6
    assert np.isfinite(features).all()
    assert encoder.weights_id == weights.sha256(file) == encoders.identity(config)["weights_id"]


def test_a_file_of_the_user_comes_first(file: Path, tmp_path: Path) -> None:
    other = tmp_path / f"{NAME}.pth"
    other.write_bytes(b"not this one")
    assert weights.locate(NAME, "", (), str(tmp_path), True, encoders.rows()[NAME].wheel) == other


def test_where_the_package_is_missing_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = encoders.rows()[NAME]
    monkeypatch.setitem(encoders.rows(), NAME, row.model_copy(update={"wheel": "no_such_package/models/x.pth"}))
    with pytest.raises(weights.WeightsError, match=r"pip install mhim-pipeline\[cnn\]"):
        encoders.build(ExtractConfig(encoder=NAME, offline=True))


def test_no_code_of_the_package_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_of_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('run')\n")
    (package / "models" / "x.pth").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert weights.installed("package_of_weights/models/x.pth") == package / "models" / "x.pth"
    assert weights.installed("package_of_weights/models/y.pth") is None
