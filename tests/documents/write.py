"""Writes what the documents hold that is made from the code or from stored results.

    python -m tests.documents.write

`configs/README.md` is made as a whole. In other documents, what stands between `<!-- generated: NAME -->` and
`<!-- end -->` is made by the function of that name below.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import choice, fusion, outcomes
from tests.documents import commands, league, settings, tables

ROOT = Path(__file__).resolve().parents[2]
WHOLE = "configs/README.md"
PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PARTS: dict[str, Callable[[], str]] = {
    "choice-10": lambda: choice.table(10),
    "choice-20": lambda: choice.table(20),
    "choice-30": lambda: choice.table(30),
    "choice-100": lambda: choice.table(100),
    "commands": commands.commands,
    "fusion": lambda: "\n".join(fusion.table("pooled")),
    "fusion-linear": lambda: "\n".join(fusion.table("linear")),
    "fusion-mil": lambda: "\n".join(fusion.table("mil")),
    "fusion-tables": lambda: "\n".join(fusion.table_of_tables()),
    "league-protocol": lambda: league.protocol(True),
    "league-standing": lambda: league.standing(True),
    "league-values": lambda: league.values(True),
    "league-abmil": lambda: league.against(True, "abmil"),
    "league-linear": lambda: league.against(True, "mean_linear"),
    "league-masking": lambda: league.masking(True),
    "models": tables.models,
    "masking-abmil": lambda: tables.masking("abmil"),
    "masking-dsmil": lambda: tables.masking("dsmil"),
    "masking-transmil": lambda: tables.masking("transmil"),
    "masking-kinds": tables.kinds,
    "masking-landmarks": tables.landmarks,
    "outcomes": outcomes.table,
}
SKIPPED = {".git", ".venv", "build", "dist", "work", "node_modules", ".types"}


def documents() -> list[Path]:
    """Every Markdown file of the project, in order of its path."""
    found = [p for p in ROOT.rglob("*.md") if not SKIPPED & set(p.relative_to(ROOT).parts[:-1])]
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def made(path: Path) -> str:
    """The text of a document as it should be."""
    if path == ROOT / WHOLE:
        return settings.page()
    return PART.sub(lambda m: f"{m[1]}{PARTS[m['name']]()}\n{m[3]}", path.read_text())


def main() -> None:
    for path in [*documents(), ROOT / WHOLE]:
        text = made(path)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
