"""Groups of a table's number columns: sets of genes from a `.gmt` file, or columns whose names begin alike.

In: the names of columns and `tables.groups`. Out: name -> columns that are there, and what is told. A `.gmt` file has
one set a line, apart by tabs: its name, a remark, its genes. Names are compared whole, capitals and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mhim.configs.schema import TablesConfig
from mhim.pipeline.cohort.labels import cells as label_cells
from mhim.pipeline.cohort.labels.rows import CohortError, counted, same, some


def read(
    name: str, columns: Sequence[str], settings: TablesConfig, path: Path
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The groups of the table `name`, of the file `path`, and what is told of them. Raises CohortError."""
    wanted = settings.groups.get(name, ())
    found: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    here = set(columns)
    for one in wanted:
        if one.casefold().endswith((".gmt", ".gmt.gz")):
            sets = gmt(Path(one))
            symbols = {s for members in sets.values() for s in members}
            if symbols and not symbols & here:
                raise CohortError(
                    f"tables.groups.{name}: none of the {len(symbols)} symbols of {one} is a column of {path}: it has "
                    f"{some(columns)}, they are {some(sorted(symbols))}; are these other ids of genes?"
                )
            notes += _of_sets(Path(one).name, symbols, here)
        else:
            sets = {one.rstrip("_.-: "): tuple(c for c in columns if c.startswith(one))}
            if not next(iter(sets.values())):
                raise CohortError(
                    f"tables.groups.{name}: no number column of {path} begins with {one!r}: {some(columns)}"
                )
        twice = sorted(found.keys() & sets.keys())
        if twice:
            raise CohortError(f"tables.groups.{name}: the group {twice[0]!r} stands twice: in {one} and before it")
        found |= {k: tuple(sorted(here & set(members))) for k, members in sets.items()}
    small = sorted(k for k, members in found.items() if len(members) < settings.smallest_group)
    if small:
        notes.append(
            f"groups of {name} with fewer than {settings.smallest_group} columns at hand, left out: {some(small)} "
            f"({len(small)} of {len(found)}; tables.smallest_group)"
        )
    kept = {k: members for k, members in sorted(found.items()) if k not in small}
    if wanted and not kept:
        raise CohortError(f"tables.groups.{name}: no group is left; {notes[-1]}")
    if kept:
        grouped = {c for members in kept.values() for c in members}
        notes.append(
            f"{name}: {counted(len(kept), 'group')}; number columns in none: {len(here - grouped)} of {len(here)}"
        )
    return kept, notes


def gmt(path: Path) -> dict[str, tuple[str, ...]]:
    """Sets of a `.gmt` file: name -> genes, each once, in order. Raises CohortError with the line that is wrong."""
    text, _ = label_cells.decode(label_cells.content(path), "auto", path, "tables")
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = [same(part.strip()) for part in line.split("\t")]
        if not rest:
            raise CohortError(f"{path}, line {number}: no tab: a line is a name, a remark and genes, apart by tabs")
        if name in found:
            raise CohortError(f"{path}, line {number}: the set {name!r} stands twice")
        found[name] = tuple(dict.fromkeys(g for g in rest[1:] if g))
    if not found:
        raise CohortError(f"{path} holds no set")
    return found


def _of_sets(file: str, symbols: set[str], here: set[str]) -> list[str]:
    lost = sorted(symbols - here)
    return (
        [
            f"{file}: {len(lost)} of its {counted(len(symbols), 'symbol')} "
            f"{'is no column' if len(lost) == 1 else 'are no columns'}: {some(lost)}"
        ]
        if lost
        else []
    )
