"""What every segmenter in extract/tissue/ must do, the ones added later included."""

from __future__ import annotations

import numpy as np
import pytest

from mhim.configs import lookup
from tests.extract.slides import tissue_rgb

NAMES = lookup.names("mhim.extract.tissue")
WEIGHTLESS = [n for n in NAMES if not getattr(lookup.find("mhim.extract.tissue", n), "NEEDS_WEIGHTS", False)]


def image() -> np.ndarray:
    """The disc at 8 µm/px, 1 mm across, grainy."""
    return tissue_rgb(200, 260).copy()


@pytest.mark.parametrize("name", NAMES)
def test_it_refuses_an_unknown_setting_by_name(name: str) -> None:
    module = lookup.find("mhim.extract.tissue", name)
    with pytest.raises(lookup.LookupFailed, match="no_such_key"):
        lookup.params(module, {"no_such_key": 1})


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_mask_of_the_image_and_the_same_each_time(name: str) -> None:
    module = lookup.find("mhim.extract.tissue", name)
    rgb = image()
    before = rgb.copy()
    mask = module.segment(rgb, 8.0, module.Params())
    assert mask.dtype == bool
    assert mask.shape == rgb.shape[:2]
    assert np.array_equal(mask, module.segment(rgb, 8.0, module.Params()))
    assert np.array_equal(rgb, before), "the input is left as it is"
    y, x = np.mgrid[:200, :260]
    truth = (x - 130) ** 2 + (y - 100) ** 2 < 84**2
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8


@pytest.mark.parametrize("name", WEIGHTLESS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 5)])
def test_any_shape(name: str, shape: tuple[int, int]) -> None:
    module = lookup.find("mhim.extract.tissue", name)
    assert module.segment(np.full((*shape, 3), 130, np.uint8), 8.0, module.Params()).shape == shape


@pytest.mark.parametrize("name", WEIGHTLESS)
@pytest.mark.parametrize("ground", [(255, 255, 255), (243, 243, 243), (230, 224, 210)])
def test_bare_glass_holds_no_tissue(name: str, ground: tuple[int, int, int]) -> None:
    module = lookup.find("mhim.extract.tissue", name)
    rng = np.random.default_rng(0)
    glass = np.clip(np.array(ground) + rng.normal(0, 1, (200, 200, 1)), 0, 255).astype(np.uint8)
    mask = module.segment(glass, 8.0, module.Params())
    tinted = ground[0] - ground[2] >= 8
    assert mask.mean() < 0.02 or (name == "otsu" and tinted), "otsu alone takes a tint for tissue"


@pytest.mark.parametrize("ground", [(255, 255, 255), (225, 228, 235), (240, 232, 215)])
@pytest.mark.parametrize("od", [(0.10, 0.35, 0.15), (0.03, 0.12, 0.05), (0.25, 0.20, 0.10), (0.15, 0.32, 0.45)])
def test_stain_finds_strong_pale_blue_and_brown_tissue_on_any_ground(
    ground: tuple[int, int, int], od: tuple[float, float, float]
) -> None:
    from mhim.extract.tissue import stain

    rng = np.random.default_rng(1)
    y, x = np.mgrid[:300, :300]
    truth = (x - 150) ** 2 + (y - 150) ** 2 < 80**2
    light = np.exp(-np.array(od) * truth[..., None] * rng.uniform(0.8, 1.2, (300, 300, 1)))
    rgb = np.clip(np.array(ground) * light + rng.normal(0, 1, (300, 300, 1)), 0, 255).astype(np.uint8)
    mask = stain.segment(rgb, 8.0, stain.Params())
    assert (mask & truth).sum() / (mask | truth).sum() > 0.93


def test_stain_sees_fat_by_its_membranes() -> None:
    from mhim.extract.tissue import stain

    rgb = np.full((300, 300, 3), 244, np.float32)
    rgb[60:240:8, 60:240] = (225, 190, 215)
    rgb[60:240, 60:240:8] = (225, 190, 215)
    mask = stain.segment(rgb.astype(np.uint8), 8.0, stain.Params())
    assert mask[80:220, 80:220].mean() > 0.98
    assert mask[:40].sum() == 0


def test_stain_finds_the_same_in_bands_and_no_fat_beyond_its_membranes(monkeypatch: pytest.MonkeyPatch) -> None:
    from mhim.extract.tissue import stain

    rgb = np.full((1000, 300, 3), 244, np.uint8)
    for top in (100, 420, 700):
        rgb[top : top + 200 : 8, 60:240] = rgb[top : top + 200, 60:240:8] = (225, 190, 215)
    whole = stain.segment(rgb, 8.0, stain.Params())
    monkeypatch.setattr(stain, "_BAND_PX", 1)
    assert np.array_equal(stain.segment(rgb, 8.0, stain.Params()), whole)
    assert whole[110:290, 70:230].mean() > 0.98
    assert whole[:, :58].sum() + whole[:, 240:].sum() + whole[:98].sum() == 0
