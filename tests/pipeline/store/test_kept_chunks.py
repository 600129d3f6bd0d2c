"""Chunks kept of an unfinished slide: gaps and damage end them, and cost nothing but time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.store.kept_chunks import keep, kept


def test_what_was_kept_is_read_up_to_the_first_gap(tmp_path: Path) -> None:
    assert list(kept(tmp_path / "nothing")) == []
    chunks = [np.full((4, 3), k, np.float16) for k in range(3)]
    for k, chunk in enumerate(chunks):
        keep(tmp_path, 4 * k, chunk)
    found = list(kept(tmp_path))
    assert [first for first, _ in found] == [0, 4, 8]
    assert all((a == b).all() for (_, a), b in zip(found, chunks, strict=True))
    (tmp_path / f"{4:012d}.npy").unlink()
    assert [first for first, _ in kept(tmp_path)] == [0]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00cut", b"\0" * 100])
def test_a_damaged_chunk_is_made_again(damage: bytes, tmp_path: Path) -> None:
    for first in (0, 4, 8):
        keep(tmp_path, first, np.ones((4, 3), np.float16))
    (tmp_path / f"{4:012d}.npy").write_bytes(damage)
    assert [first for first, _ in kept(tmp_path)] == [0]
    keep(tmp_path, 4, np.ones((4, 3), np.float16))
    assert [first for first, _ in kept(tmp_path)] == [0, 4, 8]
