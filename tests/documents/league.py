"""The league's tables, made from the stored figures: `tests/benchmarks/league.jsonl`, see `tests/benchmarks/league.py`.

In: one line per set and row, and one per row's cost. Out: Markdown tables. Ranks are over the sets that all rows of the
table have; their intervals are of the stored draws, in which the patients of each set were drawn anew.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mhim.mil import ranks

FIGURES = Path(__file__).resolve().parents[1] / "benchmarks" / "league.jsonl"
SETS = (
    "musk1",
    "protein",
    "digits-1",
    "digits-3",
    "digits-20",
    "painted",
    "breast-efficientnet-lite0",
    "breast-texture",
)
Line = dict[str, Any]


def lines(quick: bool) -> dict[tuple[str, str], Line]:
    """(set, row) -> figures of one of the two leagues."""
    found = [json.loads(line) for line in FIGURES.read_text().splitlines()]
    return {(line["set"], line["row"]): line for line in found if "row" in line and line["quick"] == quick}


def costs() -> dict[str, Line]:
    found = [json.loads(line) for line in FIGURES.read_text().splitlines()]
    return {line["cost"]: line for line in found if "cost" in line}


def names(found: dict[tuple[str, str], Line]) -> tuple[list[str], list[str]]:
    """Sets in their order, and rows by their mean value over the sets that they have, the best first."""
    sets = [s for s in SETS if any(k[0] == s for k in found)]
    rows = sorted({k[1] for k in found})
    whole = [r for r in rows if all((s, r) in found for s in sets)]
    mean = {r: np.mean([found[(s, r)]["value"][0] for s in sets]) for r in whole}
    return sets, sorted(whole, key=lambda r: -mean[r])


def table(lines_: list[list[str]]) -> str:
    header, *rest = lines_
    text = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*text, *("| " + " | ".join(row) + " |" for row in rest)])


def interval(value: list[float | None], sign: bool = False) -> str:
    form = "{:+.3f}" if sign else "{:.3f}"
    mean, low, high = ("?" if v is None else form.format(v).replace("0.", ".", 1) for v in value)
    told = f"{mean} [{low}, {high}]"
    clear = sign and value[1] is not None and value[2] is not None and (value[1] > 0 or value[2] < 0)
    return f"**{told}**" if clear else told


def values(quick: bool) -> str:
    """Rows x sets: the headline with its interval."""
    found = lines(quick)
    sets, rows = names(found)
    return table([["model", *sets], *([f"`{r}`", *(interval(found[(s, r)]["value"]) for s in sets)] for r in rows)])


def against(quick: bool, other: str) -> str:
    """Rows x sets: the paired difference to one row."""
    found = lines(quick)
    sets, rows = names(found)
    made = [
        [f"`{r}`", *(interval(found[(s, r)]["against"][other], True) for s in sets)]
        for r in rows
        if r != other and all(other in found[(s, r)]["against"] for s in sets)
    ]
    return table([["model", *(f"{s}" for s in sets)], *made])


def masking(quick: bool) -> str:
    """MHIM with each student against the student alone."""
    found = lines(quick)
    sets, rows = names(found)
    made = []
    for r in (r for r in rows if r.startswith("mhim_")):
        mine = [found[(s, r)] for s in sets]
        student = r.removeprefix("mhim_")
        fell = f"{sum(line['fell_back'] for line in mine)} of {sum(line['trainings'] for line in mine)}"
        forms = sum((Counter(line.get("forms") or {}) for line in mine), Counter[str]())
        bold = f"{forms['published']} of {forms.total()}" if forms else ""
        for other in (o for o in (student, f"longer_{student}") if any(o in line["against"] for line in mine)):
            cells = [interval(line["against"][other], True) if other in line["against"] else "not run" for line in mine]
            made.append([f"`{r}` - `{other}`", *cells, *((fell, bold) if other == student else ("", ""))])
    return table([["student", *sets, "fell back", "published form kept"], *made])


def standing(quick: bool) -> str:
    """Mean rank with interval, how often better and worse than the two controls, choices, cost."""
    found, cost = lines(quick), costs()
    sets, rows = names(found)
    point = np.array([[found[(s, r)]["value"][0] for r in rows] for s in sets])
    drawn = np.array([[found[(s, r)]["drawn"] for r in rows] for s in sets], dtype=float)  # (S, M, D)
    mean = ranks.ranks(point).mean(0)
    over = ranks.ranks(drawn.transpose(2, 0, 1)).mean(1)  # (D, M)
    low, high = np.quantile(over, [0.025, 0.975], axis=0)
    made = []
    for k in np.argsort(mean):
        row = rows[k]
        mine = [found[(s, row)] for s in sets]
        told = [_won(mine, other) if other != row else "" for other in ("abmil", "mean_linear")]
        default = sum(line["chosen"].get("0", 0) for line in mine), sum(sum(line["chosen"].values()) for line in mine)
        took = cost.get(row)
        made.append(
            [
                f"`{row}`",
                f"{mean[k]:.1f} [{low[k]:.1f}, {high[k]:.1f}]",
                *told,
                f"{default[0]} of {default[1]}",
                str(sum(line["failed"] for line in mine)),
                "not measured" if took is None else f"{took['seconds']:.2f}",
                "not measured" if took is None else f"{took['mib']}",
            ]
        )
    header = ["model", "mean rank", "against `abmil`", "against `mean_linear`", "settings as given chosen", "failed"]
    return table([[*header, "s per bag", "MiB per bag"], *made])


def _won(mine: list[Line], other: str) -> str:
    """On how many sets the interval of the difference lies above and below 0."""
    given = [line["against"][other] for line in mine if other in line["against"]]
    better, worse = (sum(d[k] is not None and sign * d[k] > 0 for d in given) for k, sign in ((1, 1), (2, -1)))
    return f"{better} better, {worse} worse, {len(given) - better - worse} neither"


def protocol(quick: bool) -> str:
    """What was run, and whether the ranks say anything."""
    found = lines(quick)
    sets, rows = names(found)
    first = found[(sets[0], rows[0])]
    point = np.array([[found[(s, r)]["value"][0] for r in rows] for s in sets])
    partial = sorted({r for _, r in found} - set(rows))
    apart = ranks.critical_difference(len(rows), len(sets))
    told = (
        f"{len(rows)} rows on {len(sets)} sets; {first['folds']} folds, {first['seeds']} seed(s), {first['draws']} "
        f"settings per fold, at most {first['epochs']} epochs. Friedman's test of the ranks: "
        f"p = {ranks.friedman(point):.2g}; two mean ranks that differ by less than {apart:.1f} (Nemenyi, .05) are not "
        "told apart by these sets."
    )
    return told + (f" Not on every set yet, and left out: {', '.join(f'`{r}`' for r in partial)}." if partial else "")
