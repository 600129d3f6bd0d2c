"""The recorded numbers of other programs (tests/golden/README.md says how each was made)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PUBLISHED, HEADS = GOLDEN / "published", GOLDEN / "heads"


def arrays(folder: Path, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of one file."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def facts(folder: Path, name: str) -> dict[str, Any]:
    """What is told of one file's arrays: its own JSON file, or else its entry in the index."""
    own = folder / f"{name}.json"
    found = json.loads(own.read_text()) if own.exists() else json.loads((folder / "index.json").read_text())[name]
    assert isinstance(found, dict)
    return found


def sha256(array: np.ndarray[Any, Any]) -> str:
    """Of the bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
