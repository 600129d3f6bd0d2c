"""Whom a report of several targets shows first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mhim.pipeline.pictures import of_several
from mhim.pipeline.pictures.of_several import Section


def section(target: str, *rows: tuple[str, float, bool]) -> Section:
    """rows: patient, how wrong in the target's own unit, and whether it was decided wrongly; the worst first."""
    kind: Any = SimpleNamespace(
        measure=SimpleNamespace(said=lambda row: SimpleNamespace(wrong=row["wrong"])), caption=lambda row: ""
    )
    made = [{"patient": p, "slide": p, "mistake": mistake, "wrong": wrong} for p, mistake, wrong in rows]
    found: Any = None
    return Section(target, kind, made, found, {})


def test_no_unit_decides_who_stands_first() -> None:
    er = section("er", ("a", 0.9, False), ("b", 0.5, False), ("c", 0.1, False))
    size = section("size_um", ("c", 5000.0, False), ("b", 4900.0, False), ("a", 1.0, False))
    assert [one.slides for one in of_several.slides([er, size])] == [["a"], ["c"], ["b"]]
    er = section("er", ("b", 0.6, True), ("a", 0.4, False), ("c", 0.1, False))
    assert [one.slides for one in of_several.slides([er, size])] == [["b"], ["c"], ["a"]]
