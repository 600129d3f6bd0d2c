"""Whole chunks of a slide's features, kept in its private folder while it is being encoded: a killed run goes on there.

Each is a file named by its first tile, written atomically. One that is damaged ends what is kept; it is made again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mhim.pipeline.store import writing


def kept(partial: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first tile, features (n, dim)) of each chunk that is there, without gaps from the first on."""
    start = 0
    for file in sorted(partial.glob("*.npy")):
        if file.name != f"{start:012d}.npy":
            return
        try:
            chunk = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            file.unlink(missing_ok=True)
            return
        yield start, chunk
        start += len(chunk)


def keep(partial: Path, first: int, chunk: np.ndarray) -> None:
    """Keep the features (n, dim) of the tiles from `first` on."""
    buffer = io.BytesIO()  # numpy's own writing to a file hides why it failed
    np.save(buffer, chunk, allow_pickle=False)
    writing.write_atomic(partial / f"{first:012d}.npy", buffer.getvalue())
