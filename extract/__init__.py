"""slide -> tissue -> tiles -> features: everything that touches pixels. Knows configs; never mil or pipeline.

The values that cross the room's border:

- `SlideJob`: one slide with its tiles, as `features.py` reads it.
- errors: a subclass of `SlideError` concerns one slide only, is recorded, and never stops a cohort.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhim.configs.errors import UserError
from mhim.extract.units import Mpp


class SlideError(UserError):
    """Something is wrong with one slide; the message says what, and what to do about it."""


class UnreadableSlide(SlideError):
    """The file cannot be opened or decoded as a slide."""


class SeveralPlanes(UnreadableSlide):
    """The file is sound, but no single RGB picture: channels, focal planes or time points."""


class MissingMpp(SlideError):
    """The slide opens, but nothing tells its µm per pixel."""


@dataclass(frozen=True)
class SlideJob:
    """One slide and the tiles to read from it.

    coords_l0: int32 (N, 2), top-left corners in level-0 px, x then y.
    tile_px: edge of the tile handed to the encoder, px at `mpp`.
    mpp: µm per px of that tile. slide_mpp: µm per px of level 0, (x, y).
    """

    path: Path
    coords_l0: np.ndarray
    tile_px: int
    mpp: Mpp
    slide_mpp: tuple[Mpp, Mpp]
