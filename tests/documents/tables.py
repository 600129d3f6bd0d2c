"""Tables of the documents that are made from what is stored: results of benchmarks, and the models that ship.

In: `tests/benchmarks/masking.jsonl` and the packages of the plug-ins. Out: Markdown tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs import lookup
from mhim.mil.parts.mhim_settings import Params

ROOT = Path(__file__).resolve().parents[2]
ALARM = 0.1  # train.fallback
NOTHING = float(np.log(2))  # loss of an answer that knows nothing, of two classes
WITHIN = float(Params.model_fields["published_within"].default)
SETS = ("musk1", "protein", "digits-1-120", "digits-3-40", "digits-20-20-0.3", "demo-16")
ROWS = (
    ("plain", "plain", False),
    ("published (mhim_v2)", "paper", False),
    ("published + alarm", "paper", True),
    ("guarded", "default", False),
    ("guarded + alarm", "default", True),
    ("**default**", "adaptive", False),
)
KINDS = (
    ("plain", "plain"), ("as many steps more without masks", "trained on"), ("guarded", "default"),
    ("guarded, rate .03 uncapped", "rate 0.03"), ("guarded, rate .1 uncapped", "rate 0.1"),
    ("published, rate .03", "paper"), ("published, rate .1", "paper 0.1"), ("by evidence, fresh", "evidence+fresh"),
    ("by evidence of kinds, fresh", "evidence+kinds+fresh"), ("**default**", "adaptive"),
)  # fmt: skip
Key = tuple[str, str, str, int, int]  # set, student, variant, seed, fold


@cache
def _stored() -> dict[Key, dict[str, Any]]:
    lines = (ROOT / "tests" / "benchmarks" / "masking.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    stored = {(r["key"][0], r["key"][1], r["key"][2], r["key"][3], r["key"][4]): r for r in found}
    # what the default keeps: the published form where its student fits, else the guarded one. Both are stored
    for (name, student, variant, seed, fold), published in list(stored.items()):
        plain, guarded = (stored.get((name, student, v, seed, fold)) for v in ("plain", "default"))
        if variant == "paper" and plain and guarded:
            learnt = max(0.0, NOTHING - plain["train_loss"])
            fits = published["train_loss"] <= plain["train_loss"] + WITHIN * learnt
            kept = published if fits else guarded
            stored[name, student, "adaptive", seed, fold] = kept | {"published": fits}
    return stored


def masking(student: str) -> str:
    """Plain AUC, and what the published form, its alarm and the default make of it, on each set."""
    lines = [_row([student, *SETS]), "|" + "---|" * (len(SETS) + 1)]
    lines += [_row([name, *(_cell(s, student, variant, alarm) for s in SETS)]) for name, variant, alarm in ROWS]
    return "\n".join(lines)


def kinds() -> str:
    """Bags with a plentiful and a scarce kind of evidence; ABMIL by seed, DSMIL."""
    of = [("abmil", (0,)), ("abmil", (1,)), ("dsmil", (0,))]
    heads = [f"{student}, seed {seeds[0]}" for student, seeds in of]
    lines = [_row(["two-20-3-40", *heads]), "|" + "---|" * (len(heads) + 1)]
    for name, variant in KINDS:
        lines.append(_row([name, *(_cell("two-20-3-40", student, variant, False, seeds) for student, seeds in of)]))
    return "\n".join(lines)


def landmarks() -> str:
    """TransMIL with 64 landmarks in place of 16."""
    sets = ("digits-3-40", "digits-20-20-0.3")
    lines = [_row(["transmil, 64 landmarks", *sets]), "|" + "---|" * (len(sets) + 1)]
    for name, variant, alarm in (ROWS[0], ROWS[3]):
        lines.append(_row([name, *(_cell(s, "transmil-64", variant, alarm) for s in sets)]))
    return "\n".join(lines)


def _cell(name: str, student: str, variant: str, alarm: bool, seeds: Sequence[int] = (0, 1, 2)) -> str:
    stored = _stored()
    keys = [k for k in stored if k[:3] == (name, student, variant) and k[3] in seeds]
    if not keys:
        return "not run"
    own = np.array([stored[k]["auc"] for k in keys])
    full = 5 * len(seeds)
    few = "" if len(keys) == full else f" ({len(keys)})"
    if variant == "plain":
        return f"{_text(own.mean())} ± {_text(own.std(ddof=1))}{few}"
    plain = [stored[(k[0], k[1], "plain", k[3], k[4])] for k in keys]
    base = np.array([p["auc"] for p in plain])
    rings = np.array([stored[k]["train_loss"] > p["train_loss"] + ALARM for k, p in zip(keys, plain, strict=True)])
    gain = (np.where(rings, base, own) if alarm else own) - base
    rang = ""
    if alarm and (rings.any() or variant == "paper"):
        rang = f" (rings {rings.sum()}/{len(rings)})"
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    if variant == "adaptive":
        kept = sum(stored[k]["published"] for k in keys)
        rang = f" (published {kept}/{len(keys)})"
    return f"{_text(gain.mean(), sign=True)} ± {_text(error)}{rang or few}"


def _text(value: float, sign: bool = False) -> str:
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    if float(text) == 0:
        return ".000"
    return text.replace("0.", ".", 1)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def models() -> str:
    """Every model that ships: name, and the sentence and paper of its file."""
    lines = ["| name | model |", "|---|---|"]
    for name in lookup.names("mhim.mil.models"):
        first = (lookup.find("mhim.mil.models", name).__doc__ or "").split("\n\n")[0]
        lines.append(f"| `{name}` | {' '.join(first.split()).rstrip('.').replace('|', chr(92) + '|')} |")
    return "\n".join(lines)
