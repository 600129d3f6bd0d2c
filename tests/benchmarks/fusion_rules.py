"""Two questions to late fusion on the data of `fusion.py`: does co-attention add to it, and would an exit to the best
single modality, where that is better out of fold, do less harm?

    python -m tests.benchmarks.fusion_rules exit [--minutes 20]      # bags' row by regression, seconds a draw
    python -m tests.benchmarks.fusion_rules coattn [--minutes 60]    # a network per outer and inner fold
    python -m tests.benchmarks.fusion_rules show

Stored are figures per cohort, setting and seed (`fusion_rules.jsonl`), and nothing of a patient.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhim.configs.schema import TrainConfig
from mhim.mil import tasks
from mhim.mil import train as loop
from mhim.mil.feed import Case
from mhim.mil.fusion import coattn, columns, joined, late, outcome, skill
from mhim.mil.fusion.coattn import Params
from mhim.mil.fusion.joined import JOINT, key
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.training.fused import crossed
from tests.benchmarks import fusion
from tests.benchmarks.fusion import Fold

FIGURES = Path(__file__).with_suffix(".jsonl")
# not tuned, but for what a CPU can: the settings of the slide network of `fusion.py`
TRAIN = TrainConfig(
    task="survival", epochs=8, select="last", patience=0, lr=3e-3, batch_bags=32, standardize=True, optimizer="adamw",
    weight_decay=0.1,
)  # fmt: skip
PARAMS = Params(width=32, hidden=32, layers=0)
BOTH = ("slide", "rna")


def leaves(fold: Fold) -> tuple[late.Late, str]:
    """Late fusion of a fold, and the single modality that is better than it out of fold, "" where none is."""
    target, outside = fold.target[fold.learn], {m: fold.outside[m] for m in BOTH}
    made = fold.fit(BOTH)
    fused = crossed(late.fit, outside, target, "survival", fold.inner, 0)

    def worth(scores: np.ndarray) -> float:
        there = np.flatnonzero(np.isfinite(scores).all(axis=1))
        inner = [np.flatnonzero(np.isin(there, left)) for left in fold.inner]
        return skill.of(scores[there], target[there], "survival", inner).value

    best = max(BOTH, key=lambda m: worth(outside[m]))
    return made, best if worth(outside[best]) > worth(fused) else ""


def exit_of(folds: list[Fold]) -> dict[str, float]:
    """The concordance of each alone, of late fusion, and of late fusion that gives way to a better single one."""
    made = [leaves(f) for f in folds]
    plain = [fusion.fused(f, m, {}) for f, (m, _) in zip(folds, made, strict=True)]
    absent = [
        {m: np.full(len(f.test), m != stays) for m in BOTH} if stays else {}
        for f, (_, stays) in zip(folds, made, strict=True)
    ]
    rests = [fusion.fused(f, m, a) for f, (m, _), a in zip(folds, made, absent, strict=True)]
    # who lacks the single one is answered by the other
    rests = [np.where(np.isfinite(r), r, p) for r, p in zip(rests, plain, strict=True)]
    found = {m: fusion.concordance(folds, [f.given[m][:, 0] for f in folds]) for m in BOTH}
    return found | {
        "fused": fusion.concordance(folds, plain),
        "with exit": fusion.concordance(folds, rests),
        "exits": float(np.mean([bool(stays) for _, stays in made])),
    }


def coattn_of(folds: list[Fold], rows: Rows, bags: np.ndarray, seed: int) -> dict[str, float]:
    """Each alone, the network alone, late fusion, and late fusion with the network as a member."""
    fused, plain, alone, weights = [], [], [], []
    for f in folds:
        outside = {m: f.outside[m] for m in BOTH} | {key(BOTH): np.full((len(f.learn), 1), np.nan)}
        for left in f.inner:
            kept = np.setdiff1d(np.arange(len(f.learn)), left)
            outside[key(BOTH)][left] = _network(f, rows, bags, f.learn[kept], f.learn[left], seed)
        given = _network(f, rows, bags, f.learn, f.test, seed)
        there = np.isfinite(outside["slide"]).all(axis=1) & np.isfinite(outside["rna"]).all(axis=1)
        outside[key(BOTH)][~there] = np.nan
        made = joined.fit(outside, f.target[f.learn], "survival", f.inner)
        risks = np.full(len(f.test), np.nan)
        for i in range(len(f.test)):
            own = {m: f.given[m][i] for m in BOTH if np.isfinite(f.given[m][i]).all()}
            own |= {key(BOTH): given[i]} if len(own) == 2 else {}
            risks[i] = made.score(own)[0]
        fused.append(risks)
        plain.append(fusion.fused(f, f.fit(BOTH), {}))
        alone.append(given[:, 0])
        weights.append(made.patterns[BOTH].weights[JOINT])
    found = {m: fusion.concordance(folds, [f.given[m][:, 0] for f in folds]) for m in BOTH}
    return found | {
        "late": fusion.concordance(folds, plain),
        "network": fusion.concordance(folds, alone),
        "coattn": fusion.concordance(folds, fused),
        "weight of the network": float(np.mean(weights)),
    }


def _network(f: Fold, rows: Rows, bags: np.ndarray, learn: np.ndarray, score: np.ndarray, seed: int) -> np.ndarray:
    """float64 (m, 1): risks of the patients `score` by a network that learnt from `learn`."""
    known = {"rna": columns.fit(rows.of(f.names[learn]), columns.Options(smallest_group=5))}
    values = coattn.numbers(known, {"rna": rows}, list(f.names))
    coords = np.zeros((bags.shape[1], 2), np.int32)

    def case(i: int) -> Case:
        target = (float(f.target[i, 0]), float(f.target[i, 1]))
        return Case(str(i), (str(i),), target, lambda: (bags[i], coords, 1.0), 0.5, values[i])

    cases = [case(i) for i in learn]
    task = tasks.discrete_survival([c.target for c in cases], TRAIN.survival_bins)  # type: ignore[misc]
    with loop.seeded(seed):
        network = coattn.build(bags.shape[2], task.n_out, known, PARAMS)
    for reached in loop.fit(network, cases, [], task, TRAIN, seed):
        state = reached
    found = loop.predict(network, [case(i) for i in score], task, loop.scale_of(state))
    return outcome.scores(task, np.stack([p.logits for p in found]))


def stored() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FIGURES.read_text().splitlines()] if FIGURES.exists() else []


def missing(rule: str) -> Iterator[tuple[str, str, int]]:
    there = {(r["rule"], r["cohort"], r["setting"], r["seed"]) for r in stored()}
    cohorts = ("blca", "coadread") if rule == "exit" else ("blca",)
    settings = ("noise", "strong", "dominant") if rule == "exit" else ("noise", "strong")
    for seed in range(16 if rule == "exit" else 4):
        yield from ((c, s, seed) for c in cohorts for s in settings if (rule, c, s, seed) not in there)


def run(rule: str, minutes: float) -> None:
    torch.set_num_threads(1)
    began, known = time.monotonic(), dict[str, list[Fold]]()
    for name, setting, seed in list(missing(rule)):
        if time.monotonic() - began > 60 * minutes:
            break
        started = time.monotonic()
        patients, rna = fusion.cohort(name)
        rows = fusion.rna_rows(rna, fusion.gene_sets())
        if name not in known:
            known[name] = [Fold(patients, fusion.target_of(patients, "dss"), k) for k in range(5)]
            for f in known[name]:
                f.table("rna", fusion.rna_rows(rna))
        bags = fusion.planted().draw(patients, setting, seed)["bags"]
        for f in known[name]:
            f.pooled(bags)
        found = exit_of(known[name]) if rule == "exit" else coattn_of(known[name], rows, bags, seed)
        made = {"rule": rule, "cohort": name, "setting": setting, "seed": seed}
        made |= {"seconds": round(time.monotonic() - started, 1), **{k: round(v, 4) for k, v in found.items()}}
        with FIGURES.open("a") as file:
            file.write(json.dumps(made) + "\n")
        print(json.dumps(made), flush=True)


def table(rule: str) -> list[str]:
    """The guide's table of one rule, in Markdown: means over the draws."""
    heads: Mapping[str, tuple[str, ...]] = {
        "exit": ("slide", "rna", "fused", "with exit", "exits"),
        "coattn": ("slide", "rna", "late", "network", "coattn", "weight of the network"),
    }
    made = [f"| cohort | bags | draws | {' | '.join(heads[rule])} |", "|---" * (3 + len(heads[rule])) + "|"]
    rows = [r for r in stored() if r["rule"] == rule]
    for name, setting in dict.fromkeys((r["cohort"], r["setting"]) for r in rows):
        own = [r for r in rows if (r["cohort"], r["setting"]) == (name, setting)]
        mean = [f"{np.mean([r[k] for r in own]):.3f}" for k in heads[rule]]
        made.append(f"| {name.upper()} | {setting} | {len(own)} | {' | '.join(mean)} |")
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["exit", "coattn", "show"])
    parser.add_argument("--minutes", type=float, default=20.0)
    given = parser.parse_args()
    if given.what == "show":
        print("\n".join([*table("exit"), "", *table("coattn")]))
    else:
        run(given.what, given.minutes)
