"""What features say of themselves goes into the card: an own encoder may describe itself in any way."""

from __future__ import annotations

import pytest

from mhim.pipeline.store.layout import StoreError
from mhim.pipeline.training.card import Facts


def test_an_own_encoder_may_describe_itself_in_any_way() -> None:
    told = {"encoder": "mine", "tile_px": 256.0, "dim": 8, "pooling": ["cls", 2], "transform": {"size": 224}}
    assert Facts.of(told, "features").plain() == told


def test_what_a_model_is_bound_to_has_its_type() -> None:
    with pytest.raises(StoreError, match=r"features .*: encoder: .*, and 1 more"):
        Facts.of({"encoder": 3, "mpp": 0.5, "dim": 8} | {"mpp": "0.5"}, "features")
