"""Does masking ever hurt? Plain student, published MHIM and its guarded form, side by side on the same folds.

    python -m tests.benchmarks.masking run RESULTS.jsonl [--sets digits-3-40] [--students abmil] [--variants ...]
    python -m tests.benchmarks.masking table RESULTS.jsonl

Sets: digits-K-n[-noise]: n training bags of hand-written digits, positives hold K nines among 50 to 120 images, with
normal noise of that share of the grey scale; 100 test bags of images that no training bag holds. With --mil FOLDER,
musk1 and protein with their given folds. With --demo FOLDER, `demo`: the slides of a cohort that `pipeline demo --to
FOLDER` painted, tiled and extracted, in folds of patients; demo-n: only n training slides of each fold, half of them
with tumour. Per set: 5 folds x 3 seeds. Nothing is selected on a test
fold: fixed epochs, last epoch, one set of hyper-parameters for all. Plain, teacher and student of a fold share the
seed, so every difference is paired. `run` goes on where it stopped.

Two more columns say what the fallback does: where the alarm (the student's training loss in inference mode, compared
with the plain model's) rings, the plain model's result is taken, as `pipeline train` does.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold

from mhim.configs import lookup
from mhim.configs.schema import TrainConfig
from mhim.mil import metrics, tasks, train
from mhim.mil.feed import Case
from mhim.mil.parts.mhim_settings import PUBLISHED
from mhim.pipeline.exchange.digits import draw_bag
from mhim.pipeline.store import layout, reading

WIDTH = 128
# Adam's rate of the published settings, 2e-4 at width 512, carried over to this width.
CONFIG = TrainConfig(epochs=40, lr=8e-4, patience=0, select="last")
STUDENTS: dict[str, dict[str, Any]] = {
    "abmil": {"width": WIDTH, "attention_width": 64},
    "dsmil": {"width": WIDTH},
    # bags of 2 to 120 instances: half the width, as published, would be more landmarks than most have instances
    "transmil": {"width": WIDTH, "landmarks": 16},
}
PAPER = PUBLISHED
OFF: dict[str, Any] = {
    "mask_ratio_h": 0.0,
    "keep_ratio": 1.0,
    "consistency": "none",
    "merge": "none",
    "merge_at_test": False,
}
# tokens that are means of the merged instances, agreement in class probabilities, a frozen teacher
MEANS: dict[str, Any] = {
    "merge": "mean",
    "merge_at_test": False,
    "consistency": "probability",
    "teacher": "frozen",
    "teacher_mode": "eval",
}
START: dict[str, Any] = {"student_start": "teacher", "min_kept": 1}
CAP: dict[str, Any] = {"share_max": 0.1}
EVIDENCE: dict[str, Any] = {"mask": "evidence"}
KINDS: dict[str, Any] = {"kinds": 8, "evidence_few": 4.0}
FRESH: dict[str, Any] = {"student_start": "fresh"}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "paper": PAPER,
    "default": {},  # the guarded form; the program's default keeps either `paper` or this
    "probability": {"consistency": "probability"},
    # the mask by evidence: as the default starts it, with kinds of tissue, and with a fresh student
    "evidence": EVIDENCE,
    "evidence+fresh": EVIDENCE | FRESH,
    "evidence+kinds": EVIDENCE | KINDS,
    "evidence+kinds+fresh": EVIDENCE | KINDS | FRESH,
    "default+fresh": FRESH,
    # the published form with this mask in place of its own, and without any hard mask
    "paper+evidence": PAPER | EVIDENCE,
    "paper+evidence+kinds": PAPER | EVIDENCE | KINDS,
    "evidence+few 1+fresh": EVIDENCE | FRESH | {"evidence_few": 1.0},
    "paper 0.1": PAPER | {"mask_ratio_h": 0.1},
    "paper+no mask": PAPER | {"mask_ratio_h": 0.0},
    "evidence+fresh+bare": EVIDENCE | FRESH | {"merge_at_test": False},
    # fixed rates, uncapped, everything else as by default
    **{f"rate {rate:g}": {"mask_ratio_h": rate, "share_max": 1.0} for rate in (0.01, 0.03, 0.1, 0.3)},
    # from the published form to the default, one part after the other
    "paper+start": PAPER | START,
    "paper+start+cap": PAPER | START | CAP,
    "paper+start+test": PAPER | START | {"merge_at_test": True},
    "paper+start+test+cap": PAPER | START | CAP | {"merge_at_test": True},
    "paper+start+test+cap+frozen": PAPER
    | START
    | CAP
    | {"merge_at_test": True, "teacher": "frozen", "teacher_mode": "eval"},
    # the other repair that was tried, whole and in parts
    "means": MEANS,
    "means, fresh": MEANS | {"student_start": "fresh"},
    "means+mca at test": MEANS | {"merge": "mca", "merge_at_test": True},
    "means+mca at test, fresh": MEANS | {"merge": "mca", "merge_at_test": True, "student_start": "fresh"},
    # the same number of steps more, without any masking: what merely training on gives
    "trained on": OFF,
}
DIGITS = ["digits-1-120", "digits-3-40", "digits-20-20-0.3"]
Bags = dict[str, tuple[int, np.ndarray]]


def read_set(name: str, mil: Path | None, demo: Path | None = None) -> tuple[Bags, list[tuple[list[str], list[str]]]]:
    """bag -> (label, features), and (train, test) bags of each fold."""
    if name.startswith("demo"):
        assert demo is not None, "demo needs --demo FOLDER"
        bags, folds = demo_bags(demo)
        if name == "demo":
            return bags, folds
        each = int(name.removeprefix("demo-")) // 2
        return bags, [
            ([b for label in (0, 1) for b in [b for b in train if bags[b][0] == label][:each]], test)
            for train, test in folds
        ]
    if name.startswith("two-"):
        plenty, scarce, n = map(int, name.removeprefix("two-").split("-"))
        return digit_bags(plenty, n, 0.0, scarce)
    if name.startswith("digits-"):
        witnesses, n, *noise = name.removeprefix("digits-").split("-")
        return digit_bags(int(witnesses), int(n), float(noise[0]) if noise else 0.0)
    assert mil is not None, f"{name} needs --mil FOLDER"
    table = np.loadtxt(mil / f"{name}.csv", delimiter=",")
    given = {
        str(int(b)): (int(table[table[:, 1] == b][0, 0]), table[table[:, 1] == b][:, 2:].astype(np.float32))
        for b in np.unique(table[:, 1])
    }
    folds = [f for f in json.loads((mil / f"{name}_folds.json").read_text())["folds"] if f["rep"] == 0]
    return given, [([str(b) for b in f["train_bag_ids"]], [str(b) for b in f["test_bag_ids"]]) for f in folds]


def digit_bags(witnesses: int, n: int, noise: float, scarce: int = 0) -> tuple[Bags, list[tuple[list[str], list[str]]]]:
    """Five folds of images; per fold n training bags of the other folds' images and 100 test bags of its own.

    scarce: so many threes are in the positive training bags besides the nines, and in no negative one; the positive
    test bags hold the nines or the threes in turn, so that a model must have learnt both."""
    from sklearn.datasets import load_digits

    images, digit = load_digits(return_X_y=True)
    rng = np.random.default_rng([witnesses, n, scarce] if scarce else [witnesses, n])
    # a spread of about 1.5, at which plain training fits its bags within the epochs; as 0..1 it does not
    images = images / 4.0 + 4.0 * noise * rng.normal(size=images.shape)
    home = rng.permutation(len(images)) % 5
    bags: Bags = {}
    folds = []
    for fold in range(5):
        sides: list[list[str]] = []
        for side, mine, count in (("train", home != fold, n), ("test", home == fold, 100)):
            nines, threes = np.flatnonzero(mine & (digit == 9)), np.flatnonzero(mine & (digit == 3))
            others = np.flatnonzero(mine & (digit != 9) & ((digit != 3) | (scarce == 0)))
            names = [f"{side}{fold}-{i}" for i in range(count)]
            for i, bag in enumerate(names):
                chosen = draw_bag(rng, nines if i % 2 else nines[:0], others, witnesses)
                if scarce and i % 2:
                    only = side == "test" and (i // 2) % 2  # this bag holds threes alone
                    if only:
                        chosen = draw_bag(rng, nines[:0], others, witnesses)
                    if side == "train" or only:
                        more = rng.choice(threes, scarce, replace=False)
                        chosen = rng.permutation(np.concatenate([chosen[:-scarce], more]))
                bags[bag] = (i % 2, images[chosen].astype(np.float32))
            sides.append(names)
        folds.append((sides[0], sides[1]))
    return bags, folds


def demo_bags(folder: Path) -> tuple[Bags, list[tuple[list[str], list[str]]]]:
    """The labelled slides of a demo cohort, a bag each; no patient is on both sides of a fold."""
    work = layout.Work(folder / "work")
    bags: Bags = {}
    patients = []
    with open(folder / "labels.csv", newline="") as f:
        for row in csv.DictReader(f):
            made = work.feature_store("texture", row["slide"])
            if row["label"] and made.exists():
                x = np.asarray(reading.read_array(made, "features"), np.float32)
                bags[row["slide"]] = (int(row["label"] == "tumour"), x)
                patients.append(row["patient"])
    names = list(bags)
    dealt = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    sides = dealt.split(names, [bags[b][0] for b in names], patients)
    return bags, [([names[i] for i in a], [names[i] for i in b]) for a, b in sides]


def cases(bags: Bags, ids: list[str]) -> list[Case]:
    def case(bag: str) -> Case:
        label, x = bags[bag]
        coords = np.stack([np.arange(len(x)), np.zeros(len(x))], 1).astype(np.int32)
        return Case(bag, (bag,), label, lambda: (x, coords, 1.0))

    return [case(b) for b in ids]


def one(
    student: str,
    params: dict[str, Any] | None,
    bags: Bags,
    fold: tuple[list[str], list[str]],
    seed: int,
    plain: dict[str, torch.Tensor] | None,
    config: TrainConfig,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train once; AUC on the test fold, training loss in inference mode, and the weights."""
    training, test = cases(bags, fold[0]), cases(bags, fold[1])
    task = tasks.classification(("0", "1"), [c.target for c in training if c.target is not None])
    name = student if params is None else "mhim"
    raw = STUDENTS[student] if params is None else {"student": student, "student_params": STUDENTS[student], **params}
    module = lookup.find("mhim.mil.models", name)
    width = next(iter(bags.values()))[1].shape[1]
    began = time.perf_counter()
    with train.seeded(seed):
        model = module.build(width, 2, lookup.params(module, raw))
    if plain is not None:
        model.start_from(plain)
    state: train.State = {}
    for reached in train.fit(model, training, [], task, config, seed):
        state = reached
    scale = train.scale_of(state)

    def judged(of: list[Case]) -> tuple[float, float]:
        found = list(train.predict(model, of, task, scale))
        logits = torch.from_numpy(np.stack([p.logits for p in found]).astype(np.float64))
        labels = np.array([c.target for c in of])
        loss = float(task.loss(logits, torch.from_numpy(labels)))
        return metrics.auc(labels, task.probabilities(logits).numpy()), loss

    result = {"auc": judged(test)[0], "train_loss": judged(training)[1], "seconds": time.perf_counter() - began}
    return result, state["model"]


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    out = Path(args.results)
    done = {tuple(r["key"]) for r in read(out)} if out.exists() else set()
    kept = out.with_suffix(".plain")
    kept.mkdir(parents=True, exist_ok=True)
    sets = {name: read_set(name, args.mil, args.demo) for name in args.sets}
    # seeds outermost: when time is short, a table over fewer seeds stands earlier
    seeds = range(args.first_seed, args.seeds)
    for seed, variant, name, student in product(seeds, args.variants, args.sets, args.students):
        bags, folds = sets[name]
        for k, fold in enumerate(folds):
            key = (name, student, variant, seed, k)
            if key in done or k not in args.folds:
                continue
            file = kept / f"{name}-{student}-{seed}-{k}.pt"
            params = VARIANTS[variant]
            # grey values share one scale; standardising the nearly constant border would blow up its rare dots
            config = CONFIG.model_copy(update={"standardize": not name.startswith(("digits", "two"))})
            if params is not None and not file.exists():  # results are kept longer than weights
                torch.save(one(student, None, bags, fold, seed, None, config)[1], file)
            plain = torch.load(file, weights_only=True) if params is not None else None
            result, weights = one(student, params, bags, fold, seed, plain, config)
            if params is None:
                torch.save(weights, file)
            with open(out, "a") as f:
                f.write(json.dumps({"key": key, **result}) + "\n")
            print(*key, *(f"{name}={v:.3f}" for name, v in result.items()), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(results: list[dict[str, Any]], alarm: float) -> Iterator[tuple[str, str, str, str]]:
    """(set, student, variant, text) with mean AUC ± sd, and the paired difference to plain ± its standard error."""
    found = {tuple(r["key"]): r for r in results}
    groups = sorted({k[:3] for k in found}, key=lambda g: (g[0], g[1], list(VARIANTS).index(g[2])))
    for name, student, variant in groups:
        keys = [k for k in found if k[:3] == (name, student, variant)]
        own = np.array([found[k]["auc"] for k in keys])
        text = f"{own.mean():.3f} ± {own.std(ddof=1):.3f}" if len(own) > 1 else f"{own.mean():.3f}"
        if variant != "plain":
            plain = [found[(name, student, "plain", *k[3:])] for k in keys]
            base = np.array([p["auc"] for p in plain])
            limits = [p["train_loss"] + alarm for p in plain]
            rings = np.array([found[k]["train_loss"] > limit for k, limit in zip(keys, limits, strict=True)])
            for what, value in (("", own - base), (" with fallback", np.where(rings, base, own) - base)):
                error = value.std(ddof=1) / np.sqrt(len(value)) if len(value) > 1 else float("nan")
                text += f" | {value.mean():+.3f} ± {error:.3f}{what}"
            text += f" | alarm {rings.sum()}/{len(rings)}"
        yield name, student, variant, f"{text} (n={len(own)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("results")
    parser.add_argument("--mil", type=Path, help="folder with musk1.csv, musk1_folds.json, protein.csv ...")
    parser.add_argument("--demo", type=Path, help="folder of a painted cohort, tiled and extracted with texture")
    parser.add_argument("--sets", type=lambda v: v.split(","), default=DIGITS)
    parser.add_argument("--students", type=lambda v: v.split(","), default=["abmil", "dsmil", "transmil"])
    parser.add_argument("--variants", type=lambda v: v.split(","), default=["plain", "paper", "default"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="leave out the seeds before; for work side by side")
    parser.add_argument("--folds", type=lambda v: [int(k) for k in v.split(",")], default=list(range(5)))
    parser.add_argument("--alarm", type=float, default=0.1)
    args = parser.parse_args()
    if args.what == "run":
        run(args)
        return
    for row in rows_of(read(Path(args.results)), args.alarm):
        print(*row, sep=" | ")


if __name__ == "__main__":
    main()
