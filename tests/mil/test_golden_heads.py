"""The recipe of the recorded heads: what is drawn from each seed here is what the numbers were recorded with."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.mil.recorded import HEADS, arrays, sha256

INDEX = json.loads((HEADS / "index.json").read_text())


def test_each_case_has_its_file():
    assert len(INDEX) == 48
    assert {path.stem for path in HEADS.glob("*.npz")} == set(INDEX)


@pytest.mark.parametrize("name", INDEX)
def test_the_draws_are_the_recorded_ones(name):
    told, stored = INDEX[name], arrays(HEADS, name)
    rng = np.random.default_rng(told["seed"])
    weights = {
        key: (offset + scale * rng.standard_normal(shape)).astype(np.float32)
        for key, shape, scale, offset in told["keys"]
    }
    assert list(weights) == sorted(weights)
    flat = np.concatenate([w.astype(np.float64).ravel() for w in weights.values()])
    np.testing.assert_allclose([flat.sum(), np.abs(flat).sum(), flat[0], flat[-1]], told["weight_check"], rtol=1e-12)
    x = rng.standard_normal((1, told["instances"], told["in_dim"])).astype(np.float32)
    assert sha256(x) == told["x_sha256"]
    wide = x.astype(np.float64)
    np.testing.assert_allclose([wide.sum(), np.abs(wide).sum()], told["x_check"], rtol=1e-12)
    assert rng.integers(told["classes"]) == told["label"] == stored["label"]
    for draw, shape in told["extra_draws"].items():
        if draw == "rand":
            np.testing.assert_array_equal(rng.random(shape), stored[draw])
        elif draw.endswith("_order"):
            np.testing.assert_array_equal(rng.permutation(shape[0]), stored[draw])
    if "adjacency" not in told["extra_draws"]:  # that one's own draws come in between
        np.testing.assert_array_equal(rng.permutation(told["instances"]), stored["perm"])
    for key, gradient in told["grad"].items():
        if gradient is not None:
            first = weights[key].size <= 8  # then the head is all of it
            head = stored[f"gradhead__{key}"]
            assert head.shape == (min(8, weights[key].size),)
            if first:
                found = [head.sum(), np.abs(head).sum(), np.linalg.norm(head)]
                np.testing.assert_allclose(found, gradient, rtol=1e-9, atol=1e-14)
