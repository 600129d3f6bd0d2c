"""The palettes: even in lightness, also to the colour-blind, and what a colour bar says stands where the colours do."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from skimage.color import rgb2lab

from mhim.mil import heatmap

# Linear RGB as seen without one kind of cone (Machado et al. 2009, severity 1).
BLIND = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(name: heatmap.Palette, eyes: str = "normal") -> np.ndarray:
    """CIELAB of the 256 colours, as these eyes see them."""
    s = heatmap.palette(name) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4) @ np.asarray(BLIND[eyes]).T
    linear = linear.clip(0, 1)
    return rgb2lab(np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)[None])[0]


def test_the_old_palette_is_not_even() -> None:
    """What is measured here tells them apart: 21, 51, 74, 74, 38."""
    lightness = lab("classic")[[0, 64, 128, 191, 255], 0]
    assert np.abs(lightness - [21, 51, 74, 74, 38]).max() < 1.1


@pytest.mark.parametrize("eyes", sorted(BLIND))
@pytest.mark.parametrize("name", heatmap.EVEN)
def test_lightness_rises_in_equal_steps_to_all_eyes(name: heatmap.Palette, eyes: str) -> None:
    lightness = lab(name, eyes)[:, 0]
    eighths = np.diff(lightness[[0, 32, 64, 96, 128, 160, 192, 224, 255]])
    assert eighths.min() > 0
    assert lightness[-1] - lightness[0] > 60
    straight = np.linspace(lightness[0], lightness[-1], 256)
    assert np.abs(lightness - straight).max() < (0.08 if eyes == "normal" else 0.14) * np.ptp(lightness)


@pytest.mark.parametrize("eyes", sorted(BLIND))
def test_the_diverging_one_is_pale_in_the_middle_and_its_sides_differ(eyes: str) -> None:
    seen = lab(heatmap.DIVERGING, eyes)
    low, high = seen[127::-1], seen[128:]
    for side in (low, high):
        assert np.diff(side[::16, 0]).max() < 0
        assert side[0, 0] - side[-1, 0] > 35
    assert np.abs(low[:, 0] - high[:, 0]).max() < (
        5 if eyes == "normal" else 15
    )  # no side weighs more; red is dark to protans
    assert np.linalg.norm(low[-1] - high[-1]) > 25  # nor is taken for the other


def test_every_palette_has_256_colours() -> None:
    for name in get_args(heatmap.Palette):
        assert heatmap.palette(name).shape == (256, 3)
        assert len(np.unique(heatmap.palette(name), axis=0)) > 200


SIGNED = np.array([-4.0, -2.0, -1.0, 0.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("how", "signed"), [("percentile", False), ("percentile", True), ("raw", False), ("raw", True)]
)
def test_a_score_at_a_position_has_the_colour_of_that_position(how: heatmap.How, signed: bool) -> None:
    at = np.linspace(0, 1, 21)
    told = heatmap.at_positions(SIGNED, how, signed, at.tolist())
    placed = heatmap.scaled(SIGNED, how, signed).values
    assert not any(v is None for v in told)
    assert (np.diff(np.array(told, float)) >= 0).all()
    for score, place in zip(SIGNED, placed, strict=True):
        if how == "raw" or not signed:
            assert np.interp(place, at, np.array(told, float)) == pytest.approx(score, abs=0.26)
        else:
            assert np.sign(heatmap.at_positions(SIGNED, how, True, [float(place)])[0] or 0) == np.sign(score)


def test_ends_and_sides_without_tiles() -> None:
    assert heatmap.at_positions(SIGNED, "raw", True, (0, 0.5, 1)) == [-4, 0, 4]
    assert heatmap.at_positions(SIGNED, "percentile", False, (0, 1)) == [-4, 3]
    assert heatmap.at_positions(np.array([0.5, 2.0]), "percentile", True, (0, 0.5, 1)) == [None, 0.0, 2.0]
    assert heatmap.at_positions(SIGNED, "share", False, (0, 0.25)) == [0, 0.25]
    assert heatmap.at_positions(np.zeros(0), "raw", False, (0, 1)) == [None, None]
