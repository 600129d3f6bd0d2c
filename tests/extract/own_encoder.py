"""A user's own encoder, complete: the mean colour of each tile, and its spread.

Run with `pipeline extract --encoder own_encoder.mean_colour` from the folder of this file (or with it on PYTHONPATH);
`--set extract.encoder_params='{spread: false}'` reaches the function as a keyword.
"""

from __future__ import annotations

import numpy as np

from mhim.extract.encoders import Encoder


def mean_colour(spread: bool = True) -> Encoder:
    """Six numbers per tile (three without `spread`), from any tile size at any mpp."""

    def encode(tiles: np.ndarray) -> np.ndarray:  # uint8 (B, H, W, 3) -> float32 (B, dim)
        pixels = tiles.astype(np.float32) / 255
        parts = [pixels.mean((1, 2)), pixels.std((1, 2))] if spread else [pixels.mean((1, 2))]
        return np.concatenate(parts, axis=1)

    return Encoder(
        name="mean_colour", encode=encode, dim=6 if spread else 3, tile_px=None, mpp=None, weights_id="mean-colour-1"
    )
