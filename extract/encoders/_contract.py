"""What an encoder is, and how it may fail: what every file of this folder offers or raises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mhim.configs.errors import UserError
from mhim.configs.schema import ExtractConfig


class EncoderError(UserError, ValueError):
    """An encoder that does not exist, cannot be built here, or does not fit the tiles; the message says what to do."""


class NoGpu(UserError, RuntimeError):
    """A GPU was asked for and there is none to use: no slide can be encoded in this process."""


class GpuFailed(NoGpu):
    """The GPU broke off in the middle of a slide. CUDA stays unusable in this process from then on."""


@dataclass(frozen=True)
class Encoder:
    """A ready encoder.

    encode: uint8 (B, tile_px, tile_px, 3) -> float32 (B, dim), a numpy array on the host. Deterministic, and a row
    depends on its own tile only.
    dim: width of a feature. tile_px, mpp: tile size (px) and resolution (µm/px) it was trained at; None: any.
    weights_id: SHA-256 of the weights, or the version of a weight-free encoder.
    info: pooling, transform, precision, licence ...: stored with the features.
    launch: optional; starts on a batch and returns a function that waits for float32 (B, dim), so that a device works
    while the host goes on. empty: optional; allocates a uint8 buffer that the device reads quickly.
    batch: tiles per call that suit it best, 0 for any. retreats: how often it halved its batch for want of memory.
    threadsafe: True lets the reading threads call `encode` themselves, each on its own tiles.
    """

    name: str
    encode: Callable[[np.ndarray], np.ndarray]
    dim: int
    tile_px: int | None
    mpp: float | None
    weights_id: str
    info: dict[str, Any] = field(default_factory=dict)
    launch: Callable[[np.ndarray], Callable[[], np.ndarray]] | None = None
    empty: Callable[[tuple[int, ...]], np.ndarray] | None = None
    batch: int = 0
    retreats: Callable[[], int] = lambda: 0
    threadsafe: bool = False


def resolved_precision(config: ExtractConfig, own: str) -> str:
    """The arithmetic that `extract.precision` means for an encoder whose own it is `own`."""
    if config.precision != "auto":
        return config.precision
    return own if config.gpu or config.gpus else "float32"
