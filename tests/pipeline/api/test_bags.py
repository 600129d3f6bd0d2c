"""Bags and labels at hand that cannot be what they were given as: refused, and never something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mhim.configs.errors import UserError
from mhim.pipeline import Work
from mhim.pipeline.api import Bag
from tests.pipeline.api.test_work import SETTINGS, own_bags


@pytest.mark.parametrize(
    "label", [None, float("nan"), "", [3.0, 1], np.array([1]), (3.0, 1, 0), ("3", 1), {"class": 1}], ids=repr
)
def test_a_label_that_would_become_a_class_by_accident_is_refused(tmp_path: Path, label: object) -> None:
    bags, labels = own_bags()
    with pytest.raises(UserError, match=r"bag b00: its label is .* expected a class"):
        Work(tmp_path / "own").train(bags, labels | {"b00": label})  # type: ignore[dict-item]
    assert not (tmp_path / "own" / "features").exists()


def test_labels_of_numpy_are_those_of_python(tmp_path: Path) -> None:
    bags, _ = own_bags()
    plain = {name: (float(k + 1), k % 2) for k, name in enumerate(bags)}
    numpy = {name: (np.float32(k + 1), np.int64(k % 2)) for k, name in enumerate(bags)}
    for folder, labels in (("plain", plain), ("numpy", numpy)):
        with pytest.raises(UserError, match="unknown model 'none'"):
            Work(tmp_path / folder).train(bags, labels, model="none", settings=SETTINGS)  # type: ignore[arg-type]
    tables = [(tmp_path / folder / "features/own/labels.csv").read_text() for folder in ("plain", "numpy")]
    assert tables[0] == tables[1]
    assert "1.0" in tables[0]


def test_patients_of_no_bag_are_refused(tmp_path: Path) -> None:
    """A misspelt bag would stand as a patient of its own, and splits would part what belongs together."""
    bags, labels = own_bags()
    with pytest.raises(UserError, match=r"patients names 'B00' \(1 in all\), which is no bag"):
        Work(tmp_path / "own").train(bags, labels, patients={"B00": "p", "b01": "p"})


@pytest.mark.parametrize(
    ("bags", "message"),
    [
        ([np.zeros((2, 3))], "there is no bag"),
        ({1: np.zeros((2, 3))}, "1 cannot be the name of a bag: it is no text"),
        ({"x": np.array([["a"]])}, "bag x: features are of type <U1"),
        ({"x": np.zeros((2, 3), complex)}, "bag x: features are of type complex128"),
        ({"x": Bag(np.zeros((2, 3)), coords=np.full((2, 2), np.nan))}, "bag x: coords are not all numbers"),
        ({"x": Bag(np.zeros((2, 3)), coords=np.full((2, 2), 2**31))}, "bag x: coords are not all numbers"),
        ({"x": Bag(np.zeros((2, 3)), tile_l0=-1.0)}, "bag x: tile_l0 is -1.0"),
        ({"x": Bag(np.zeros((2, 3)), tile_l0=float("nan"))}, "bag x: tile_l0 is nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bags_that_are_none_are_refused(tmp_path: Path, bags: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Work(tmp_path / "own").train(bags, {})  # type: ignore[arg-type]
