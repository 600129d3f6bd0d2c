"""One writer of CSV: quotes only where needed, floats in full, the same text again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mhim.pipeline.store import tables


def test_the_text_is_that_of_every_version() -> None:
    rows = [
        {"slide": 'a "b", c\nd', "p": 0.1 + 0.2, "n": 3, "none": None},
        {"slide": "é", "p": np.float64(1e-300), "late": float("nan")},
    ]
    assert tables.of_mappings(rows) == (
        'slide,p,n,none,late\n"a ""b"", c\nd",0.30000000000000004,3,,\né,1e-300,,,nan\n'
    )
    assert tables.text_of(("slide", "mpp"), [("x", 0.25), ("y", None)]) == "slide,mpp\nx,0.25\ny,\n"


def test_it_is_read_back_as_text(tmp_path: Path) -> None:
    rows = [{"a": "x,y", "b": 'q"'}, {"a": "line\nline", "b": ""}]
    (tmp_path / "t.csv").write_text(tables.of_mappings(rows), encoding="utf-8")
    assert tables.read(tmp_path / "t.csv") == rows
