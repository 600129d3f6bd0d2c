"""Patch encoders: one file each (or one file for a family listed as data). Pixels in, one vector per tile out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Encoder:
    """A ready encoder.

    encode: uint8 (B, tile_px, tile_px, 3) -> float32 (B, dim), a numpy array on the host. Deterministic.
    dim: width of a feature. tile_px, mpp: tile size (px) and resolution (µm/px) it was trained at; None: any.
    weights_id: SHA-256 of the weights, or the version of a weight-free encoder.
    info: pooling, transform, precision, licence ...: stored with the features.
    """

    name: str
    encode: Callable[[np.ndarray], np.ndarray]
    dim: int
    tile_px: int | None
    mpp: float | None
    weights_id: str
    info: dict[str, Any] = field(default_factory=dict)
