"""How often does each rule of `train.choice` keep MHIM's student, and what does a wrong choice cost?

    python -m tests.benchmarks.choice            # what is not there yet; goes on where it stopped
    python -m tests.benchmarks.choice --draws 200 --to /tmp/quick.jsonl

Two models answer for n validation patients, half of them positive. Their scores are normal, of which the area under the
ROC curve of all patients follows exactly: that of the plain model is .80, the student's differs by what the row says,
and that of every single training varies around it with sd .03 (over trainings of the stored results of
`masking.py` the differences vary by .03 to .13, the noise of their tests included). Both models keep the best of ten
epochs on the same validation patients, by which their figures there are too good; the student starts from the plain
model's and its scores correlate with them by .8. The inner folds are four, of the training and validation patients
(5 n), whom neither model of a pair has seen. Regret is how much lower the area of the kept model is than that of
the better one. A line a number of patients and difference is written beside.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

RESULTS = Path(__file__).with_suffix(".jsonl")
PATIENTS = (10, 20, 30, 100)
DIFFERENCES = (-0.10, -0.05, -0.03, 0.0, 0.03, 0.05, 0.10)
PLAIN, SPREAD = 0.80, 0.03  # area of the plain model; sd of the difference over trainings
ALIKE, EPOCHS, EPOCHS_ALIKE = 0.8, 10, 0.9  # correlation of the scores; epochs to choose from, and theirs
FOLDS = 4
DRAWS, BLOCK = 4000, 200
RULES = {
    "point": "validation, ties to the student (`point`)",
    "tie": "validation, ties to the plain model",
    "margin": "validation, 1 standard error (`margin`, and `inner` from 30 on)",
    "margin_2": "validation, 2 standard errors",
    "inner_0": "inner folds, no margin",
    "inner": "inner folds, 1 standard error (`inner` below 30)",
    "plain": "always the plain model",
    "student": "always the student",
}


@dataclass(frozen=True)
class Weighed:
    """Differences of the area (R,), student less plain, and their standard errors (R,)."""

    value: np.ndarray
    error: np.ndarray


def scores(positive: np.ndarray, area: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """(R, ..., n) scores whose area is `area` (R,) in all patients. positive: bool (n,); noise: (R, ..., n), unit."""
    shift = np.sqrt(2.0) * norm.ppf(area)
    return noise + positive * shift.reshape(-1, *(1,) * (noise.ndim - 1))


def areas(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The area under the ROC curve (...,) of scores (..., n), and (..., n) what it is without each patient."""
    over = (score[..., positive][..., :, None] > score[..., ~positive][..., None, :]).astype(np.float32)
    up, down = over.mean(-1), over.mean(-2)
    area = up.mean(-1)
    m, n = up.shape[-1], down.shape[-1]
    without = np.empty(score.shape)
    without[..., positive] = (m * area[..., None] - up) / (m - 1)
    without[..., ~positive] = (n * area[..., None] - down) / (n - 1)
    return area, without


def weigh(positive: np.ndarray, plain: np.ndarray, student: np.ndarray) -> Weighed:
    """As `mhim.mil.preference.weigh`, of many draws at once. plain, student: (R, n)."""
    (a, a_without), (b, b_without) = areas(positive, plain), areas(positive, student)
    off = b_without - a_without
    n = off.shape[1]
    return Weighed(b - a, np.sqrt((n - 1) / n * ((off - off.mean(1, keepdims=True)) ** 2).sum(1)))


def best(positive: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(R,) the epoch of scores (R, E, n) that validation prefers; the first of equals."""
    found: np.ndarray = areas(positive, score)[0].argmax(1)
    return found


def classes(n: int) -> np.ndarray:
    """bool (n,), every other patient positive."""
    return np.arange(n) % 2 == 1


def block(rng: np.random.Generator, n: int, difference: float, size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of `size` draws: whether each rule keeps the student, bool (R,); and the true difference (R,)."""

    def pair_of_areas() -> tuple[np.ndarray, np.ndarray]:
        plain = np.full(size, PLAIN)
        return plain, np.clip(plain + difference + SPREAD * rng.normal(size=size), 0.501, 0.999)

    positive, rows = classes(n), np.arange(size)
    plain, student = pair_of_areas()
    shared, own = rng.normal(size=(size, 1, n)), rng.normal(size=(size, EPOCHS, n))
    noise = np.sqrt(EPOCHS_ALIKE) * shared + np.sqrt(1 - EPOCHS_ALIKE) * own
    kept = noise[rows, best(positive, scores(positive, plain, noise))]
    # epochs of the student: correlated by ALIKE with the plain model that was chosen, by EPOCHS_ALIKE with each other
    apart = (1 - EPOCHS_ALIKE) / (1 - ALIKE)
    fresh = np.sqrt(1 - apart) * rng.normal(size=(size, 1, n)) + np.sqrt(apart) * rng.normal(size=(size, EPOCHS, n))
    trained = scores(positive, student, np.sqrt(ALIKE) * kept[:, None] + np.sqrt(1 - ALIKE) * fresh)
    chosen = trained[rows, best(positive, trained)]
    validation = weigh(positive, scores(positive, plain, kept), chosen)
    inner = inner_folds(rng, n, size, pair_of_areas)
    found = {
        "point": validation.value >= 0,
        "tie": validation.value > 0,
        "margin": (validation.value > validation.error) & (validation.value > 0),
        "margin_2": (validation.value > 2 * validation.error) & (validation.value > 0),
        "inner_0": inner.value > 0,
        "inner": (inner.value > inner.error) & (inner.value > 0),
        "plain": np.zeros(size, dtype=bool),
        "student": np.ones(size, dtype=bool),
    }
    return found, student - plain


def inner_folds(rng: np.random.Generator, n: int, size: int, pair_of_areas: Any) -> Weighed:
    """The evidence of the inner folds: their differences by the number of patients, each of a pair of models."""
    held = [len(part) for part in np.array_split(np.arange(5 * n), FOLDS)]
    value, variance = np.zeros(size), np.zeros(size)
    for count in held:
        positive = classes(count)
        plain, student = pair_of_areas()
        shared = rng.normal(size=(size, count))
        noise = np.sqrt(ALIKE) * shared + np.sqrt(1 - ALIKE) * rng.normal(size=(size, count))
        found = weigh(positive, scores(positive, plain, shared), scores(positive, student, noise))
        value += count / sum(held) * found.value
        variance += (count / sum(held)) ** 2 * found.error**2
    return Weighed(value, np.sqrt(variance))


def measure(n: int, difference: float, draws: int) -> dict[str, Any]:
    """One line of the results: how often each rule keeps the student, and its mean regret."""
    kept = dict.fromkeys(RULES, 0.0)
    regret = dict.fromkeys(RULES, 0.0)
    for start in range(0, draws, BLOCK):
        rng = np.random.default_rng([n, round(1000 * (difference + 1)), start])
        found, truth = block(rng, n, difference, min(BLOCK, draws - start))
        for rule, keeps in found.items():
            kept[rule] += float(keeps.sum()) / draws
            lost = np.where(keeps, np.maximum(-truth, 0), np.maximum(truth, 0))
            regret[rule] += float(lost.sum()) / draws
    return {"patients": n, "difference": difference, "draws": draws, "kept": kept, "regret": regret}


def rows(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The stored lines."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(n: int) -> str:
    """For the guide: per rule how often the student is kept and the regret, by the true difference."""
    found = {r["difference"]: r for r in rows() if r["patients"] == n}
    wanted = [d for d in DIFFERENCES if d in found]

    def text(value: float) -> str:
        return f"{value:.3f}".replace("0.", ".", 1)

    heads = [f"{d:+.2f}".replace("0.", ".", 1) if d else "0" for d in wanted]
    lines = [f"| {n} validation patients | {' | '.join(heads)} | mean regret |", "|" + "---|" * (len(wanted) + 2)]
    for rule, called in RULES.items():
        cells = [f"{100 * found[d]['kept'][rule]:.0f} % ({text(found[d]['regret'][rule])})" for d in wanted]
        mean = float(np.mean([found[d]["regret"][rule] for d in wanted]))
        lines.append(f"| {called} | {' | '.join(cells)} | {text(mean)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args()
    done = {(r["patients"], r["difference"]) for r in rows(args.to)}
    for n, difference in product(PATIENTS, DIFFERENCES):
        if (n, difference) in done:
            continue
        line = measure(n, difference, args.draws)
        with open(args.to, "a") as f:
            f.write(json.dumps(line) + "\n")
        print(n, difference, {k: f"{v:.2f}" for k, v in line["kept"].items()}, flush=True)


if __name__ == "__main__":
    main()
