"""One encoder of pictures: colours in their order, quality and alpha as asked."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from mhim.extract import SlideError
from mhim.extract.images import encoded, viewed_jpeg


def picture() -> np.ndarray:
    x = np.linspace(0, 255, 64, dtype=np.uint8)
    return np.stack([np.tile(x, (64, 1)), np.tile(x[:, None], (1, 64)), np.full((64, 64), 40, np.uint8)], -1)


def test_png_comes_back_exactly_and_so_does_alpha() -> None:
    rgb = picture()
    back = cv2.imdecode(np.frombuffer(encoded(rgb, ".png"), np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(back[..., ::-1], rgb)
    rgba = np.dstack([rgb, rgb[..., 0]])
    back = cv2.imdecode(np.frombuffer(encoded(rgba, ".png", 3), np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(back[..., [2, 1, 0, 3]], rgba)


def test_jpeg_has_the_bytes_of_its_quality() -> None:
    rgb = picture()
    for level in (75, 90):
        asked = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, level])[1]
        assert encoded(rgb, ".jpg", level) == bytes(asked)
    for data in (encoded(rgb, ".jpg", 90), viewed_jpeg(rgb)):
        back = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert np.abs(back.astype(int) - rgb).mean() < 6


def test_what_cannot_be_encoded_is_told_with_its_size() -> None:
    with pytest.raises(SlideError, match="70000 x 1 px"):
        encoded(np.zeros((1, 70_000, 3), np.uint8), ".jpg")
