"""Names on pictures: what people write is shown, and what the font lacks is a number, never a box."""

from __future__ import annotations

import numpy as np

from mhim.mil import captions, heatmap


def strip(title: str) -> np.ndarray:
    return heatmap.legend(np.full((40, 500, 3), 255, np.uint8), 4.0, title, "0 %", "100 %")[40:]


def test_accents_and_greek_are_shown_as_they_are() -> None:
    for text in ("é", "µ", "Größe", "ядро", "α≤β"):
        assert captions.shown(text) == text
    assert not np.array_equal(strip("caf\u00e9"), strip("cafe"))
    assert not np.array_equal(strip("5 µm"), strip("5 um"))


def test_what_the_font_lacks_is_its_number() -> None:
    assert captions.shown("肿瘤 a\n\t") == "[U+80BF][U+7624] a[U+000A][U+0009]"
    assert not np.array_equal(strip("肿"), strip("瘤"))


def test_a_caption_stays_inside_its_picture() -> None:
    picture = np.full((60, 80, 3), 255, np.uint8)
    for x, y in ((0, 0), (-20, 30), (70, 59), (5, 200), (5, -50)):
        captions.write(picture, "Wide words", x, y, 12)
    assert picture.shape == (60, 80, 3)
    below = np.full((60, 80, 3), 255, np.uint8)
    captions.write(below, "Ewe", 4, 30, 12)
    rows, columns = np.nonzero((below < 128).all(-1))
    assert (rows.max(), columns.min() >= 4) == (29, True)  # it stands on y
    assert 29 - rows.min() + 1 in (8, 9)  # capitals have 73 % of 12 px
