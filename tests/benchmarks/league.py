"""The league: every model on several sets by one protocol, `pipeline benchmark --draws`, and the table of the guide.

    python -m tests.benchmarks.league run WORK [--quick] [--mil FOLDER] [--demo FOLDER] [--breast WORK] [--minutes 480]
    python -m tests.benchmarks.league collect WORK [--quick] [--to league.jsonl]
    python -m tests.benchmarks.league cost [--to league.jsonl]

Every row gets the same number of settings (`train.draws`), chosen per fold on inner validation with the test fold
sealed. Sets: digits-1, -3, -20 (made on the spot); with --mil FOLDER musk1 and protein, whose folds are given; with
--demo FOLDER `painted`, the cohort that `pipeline demo --to FOLDER` painted, tiled and extracted; with --breast WORK
(repeatable) each encoder's features in a work folder of the 58 breast fields, see configs/ucsb_breast.yaml. `run` is
resumable: killed, it goes on, and ends in the same bytes. Stored are figures alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mhim.configs import load
from mhim.configs.schema import Config
from mhim.pipeline.cli import main as main_
from mhim.pipeline.exchange.digits import digits
from mhim.pipeline.results import standings
from mhim.pipeline.results.metrics_file import Metrics
from mhim.pipeline.store import layout

FIGURES = Path(__file__).with_suffix(".jsonl")
# the controls and plain models first: what is there early can be compared
ROWS = [
    "abmil", "mean_linear", "mean", "max", "simlp", "mean_knn", "lse", "mhim_abmil", "gated_abmil", "dsmil",
    "mhim_dsmil", "acmil", "aem", "abmilx", "nnmil", "ibmil", "asmil", "transmil", "mhim_transmil", "ilra", "dtfd",
    "wikg", "longer_abmil",
]  # fmt: skip
# a plain model that trains on from itself, without masks, tokens and consistency: as many steps as MHIM has
LONGER = {
    "published_within": None, "mask_ratio_h": 0.0, "keep_ratio": 1.0, "consistency": "none", "merge": "none",
    "merge_at_test": False,
}  # fmt: skip
STUDENTS = ["gated_abmil", "acmil", "aem", "abmilx", "nnmil", "ilra"]  # others with attention, for --students
DIGITS = {"digits-1": 1, "digits-3": 3, "digits-20": 20}
WIDTH = 64
FULL: dict[str, Any] = {"draws": 3, "folds": 5, "seeds": 2, "epochs": 40, "min_epochs": 20, "patience": 15}
QUICK: dict[str, Any] = {"draws": 2, "folds": 2, "seeds": 1, "epochs": 15, "min_epochs": 5, "patience": 5}


def settings(quick: bool, students: bool) -> dict[str, Any]:
    """The settings of all sets. The rate is about the published 2e-4 at width 512, carried over."""
    rows: dict[str, dict[str, Any]] = {row: {} for row in ROWS}
    rows |= {f"mhim_{s}": {} for s in STUDENTS} if students else {}
    for row in rows:
        if row.startswith("mhim_"):
            rows[row] = {"model": "mhim", "student": row.removeprefix("mhim_")}
        if row.startswith("longer_"):
            rows[row] = {"model": "mhim", "student": row.removeprefix("longer_"), **LONGER}
    # grey values share one scale; whatever else has none is standardised
    train = (QUICK if quick else FULL) | {"lr": 8e-4, "split_by": "auto"}
    return {
        "train": train,
        "benchmark": {"models": rows, "params": {"width": WIDTH, "landmarks": 16, "attention_width": WIDTH}},
        "score": {"bootstrap": 1000},
    }


def table_of(name: str, folder: Path, quick: bool) -> str:
    """A set of bags as `pipeline import` reads it: label, bag, fold, features. quick: two folds."""
    if name in DIGITS:
        return digits(DIGITS[name], *((40, 2) if quick else (100, 5)))
    rows = np.loadtxt(folder / f"{name}.csv", delimiter=",")
    given = [f for f in json.loads((folder / f"{name}_folds.json").read_text())["folds"] if f["rep"] == 0]
    fold_of = {int(b): k % 2 if quick else k for k, f in enumerate(given) for b in f["test_bag_ids"]}
    lines = ["label,bag,fold," + ",".join(f"f{i}" for i in range(rows.shape[1] - 2))]
    for row in rows:
        values = ",".join(f"{v:g}" for v in row[2:])
        lines.append(f"{int(row[0])},b{int(row[1])},{fold_of[int(row[1])]},{values}")
    return "\n".join(lines) + "\n"


def sets(args: argparse.Namespace) -> Iterator[tuple[str, Path, Path, dict[str, Any]]]:
    """(set, work folder, labels, settings), the features made where they are not there yet."""
    for name in [
        *(["musk1"] if args.mil else []),
        "digits-3",
        *(["protein"] if args.mil else []),
        "digits-20",
        "digits-1",
    ]:
        work = args.work / name
        own = settings(args.quick, args.students)
        own["extract"] = {"encoder": "bags"}
        own["train"]["standardize"] = name not in DIGITS
        if not (work / "labels.csv").exists():
            work.mkdir(parents=True, exist_ok=True)
            (work / "bags.csv").write_text(table_of(name, args.mil or Path(), args.quick))
            _pipeline("import", work / "bags.csv", "--encoder", "bags", "--work", work / "w")
            found = next((work / "w").rglob("labels.csv"))
            (work / "labels.csv").write_text(found.read_text())
        yield name, work / "w", work / "labels.csv", own
    slides = [("painted", args.demo / "work", args.demo / "labels.csv", "texture")] if args.demo else []
    for place in args.breast or []:
        folder, _, encoder = str(place).partition(":")
        slides.append((f"breast-{encoder}", Path(folder), args.labels, encoder))
    for name, source, labels, encoder in slides:
        own = settings(args.quick, args.students)
        own["extract"] = {"encoder": encoder}
        own["train"]["standardize"] = True
        work = args.work / name / "w"
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "features").exists():  # runs are written here, never into what a user gave
            (work / "features").symlink_to(source.resolve() / "features")
        yield name, work, labels, own


def _pipeline(*args: object) -> int:
    """A command in this process: starting one takes longer than most of these trainings."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main_.main([str(a) for a in args])
    except SystemExit as end:
        if end.code in (130, 143):  # told to end: the whole ends, not this row alone
            raise
        return end.code if isinstance(end.code, int) else 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Row by row through all sets, so that an early end leaves whole rows; several cells at once, each in a process
    that lives as long as the whole, as starting one per cell would take longer than most of them."""
    began = time.monotonic()
    ready = list(sets(args))
    for name, _, _, own in ready:
        (args.work / name / "settings.yaml").write_text(yaml.safe_dump(own))
    spawn = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(args.workers, spawn, initializer=_end_with_parent) as pool:
        cells = []
        for row in args.rows or settings(args.quick, args.students)["benchmark"]["models"]:
            cells += [pool.submit(cell, row, name, work, labels) for name, work, labels, _ in ready]
        try:
            for each in cells:
                print(each.result(max(0.0, 60 * args.minutes - (time.monotonic() - began))), flush=True)
        except futures.TimeoutError:
            print(f"{args.minutes:g} minutes are over: the same command goes on", flush=True)
        finally:
            _kill(pool)


def cell(row: str, name: str, work: Path, labels: Path) -> str:
    """One row on one set: a command of its own, made in this process."""
    at, cpu = time.monotonic(), time.process_time()
    code = _pipeline(
        "benchmark", "--config", work.parent / "settings.yaml", "--work", work, "--labels", labels, "--models", row,
        "--name", "league", "--workers", 1,
    )  # fmt: skip
    took = f"{time.monotonic() - at:.0f} s, {time.process_time() - cpu:.0f} s of the processor"
    return f"{row} {name} exit {code}, {took}"


def _end_with_parent() -> None:
    """A worker whose parent was killed ends too: its claims are free for the next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _kill(pool: futures.ProcessPoolExecutor) -> None:
    """End the cells under way as a kill would: they go on from their checkpoints."""
    workers = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()


def collect(args: argparse.Namespace) -> None:
    """The figures of all scored runs, one line per set and row."""
    lines = [json.loads(line) for line in args.to.read_text().splitlines()] if args.to.exists() else []
    lines = [line for line in lines if "cost" in line or line["quick"] != args.quick]
    for folder in sorted(p for p in args.work.iterdir() if (p / "settings.yaml").exists()):
        config = load.resolve([str(folder / "settings.yaml")])
        lines += [{"set": folder.name, "quick": args.quick} | line for line in _of_set(folder / "w", config)]
    args.to.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} lines in {args.to}")


def _of_set(work: Path, config: Config) -> Iterator[dict[str, Any]]:
    runs = {}
    for row in config.benchmark.models:
        folder = work / "runs" / f"league-{row}"
        trainings = config.train.folds * config.train.seeds
        if (folder / "metrics.json").exists() and len(Metrics.read(folder).per_fold) == trainings:
            runs[row] = folder
    if len(runs) < 2:
        return
    seconds = _seconds(layout.Work(work))
    taught: dict[str, list[str]] = {}
    for row in runs:
        student = row.removeprefix("mhim_")
        if student != row:
            taught[row] = [r for r in (student, f"longer_{student}") if r in runs]
    refs = tuple(dict.fromkeys([*config.benchmark.against, *(r for each in taught.values() for r in each)]))
    found = standings.standings(runs, config.score, refs)
    for row, one in found.items():
        told = Metrics.read(runs[row])
        kept = [*config.benchmark.against, *taught.get(row, [])]
        by = {r: one.against[r]["difference"] for r in kept if r in one.against}
        counted = told.choices
        yield {
            "row": row,
            "draws": config.train.draws,
            "folds": config.train.folds,
            "seeds": config.train.seeds,
            "epochs": config.train.epochs,
            "patients": told.patients,
            "metric": one.headline,
            "value": [_r(v) for v in (one.value.value, one.value.low, one.value.high)],
            "over": [_r(told.over_folds[one.headline].mean), _r(told.over_folds[one.headline].sd)],
            "against": {r: [_r(d.value), _r(d.low), _r(d.high)] for r, d in by.items()},
            "drawn": [_r(v, 3) for v in one.drawn[:100]],
            "chosen": counted.draws.chosen if counted and counted.draws else {},
            "failed": counted.failed if counted else 0,
            "forms": (counted.forms if counted else None) or {},
            "fell_back": (counted.alarm + counted.validation) if counted else 0,
            "trainings": len(told.per_fold),
            "seconds": round(seconds.get(f"league-{row}", 0.0), 1),
        }


def _seconds(work: layout.Work) -> dict[str, float]:
    """Run -> wall seconds of its trainings, whatever else the machine did; a twin costs none."""
    found: dict[str, float] = {}
    for path in sorted(work.runs.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            verb, _, run = str(event.get("stage", "")).partition(" ")
            if event.get("event") == "item" and verb == "train":
                found[run] = found.get(run, 0.0) + float(event["seconds"])
    return found


def _r(value: float | None, digits_: int = 4) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), digits_)


def cost(args: argparse.Namespace) -> None:
    """Seconds of the processor for one step with a bag of 4,000 x 384, and the memory that it adds, per row; each in a
    process of its own."""
    lines = [json.loads(line) for line in args.to.read_text().splitlines()] if args.to.exists() else []
    lines = [line for line in lines if "cost" not in line]
    for row in dict.fromkeys([*ROWS, *(f"mhim_{s}" for s in STUDENTS)]):
        command = [sys.executable, "-m", "tests.benchmarks.league", "one-cost", row]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
        print(row, done.stdout.strip() or done.stderr.strip()[-200:], flush=True)
        if done.returncode == 0:
            lines.append({"cost": row} | json.loads(done.stdout))
    args.to.write_text("".join(json.dumps(line) + "\n" for line in lines))


def one_cost(row: str) -> None:
    import torch

    from mhim.configs.schema import TrainConfig
    from mhim.mil import tasks
    from mhim.mil.models import Bag
    from mhim.pipeline.training.fold import build_model

    torch.set_num_threads(1)
    student = row.removeprefix("mhim_").removeprefix("longer_")
    params: dict[str, Any] = {"student": student} if student != row else {}
    params |= LONGER if row.startswith("longer_") else {}
    config = TrainConfig(model="mhim" if params else row, model_params=params)
    task = tasks.Classification(("a", "b"))
    n = 4000
    side = torch.arange(n)
    coords = torch.stack([side % 64, side // 64], dim=1).float()[None] * 256
    features = torch.randn(1, n, 384, generator=torch.Generator().manual_seed(0))
    bag = Bag(features, torch.ones(1, n, dtype=torch.bool), coords, torch.tensor([256.0]), 0.5, (n,))
    target = torch.tensor([1])
    model = build_model(config, 384, task, 0, None)
    model.eval()
    with torch.no_grad():
        model.prepare([(bag, target), (bag, torch.tensor([0]))], task)
    model.train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(3):
        began = time.process_time()
        model.set_progress(0.5)
        sum(model.losses(bag, target, task).values()).backward()
        times.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(json.dumps({"seconds": round(min(times), 4), "mib": round(peak / 1024), "weights": weights}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect", "cost", "one-cost"])
    parser.add_argument("work", nargs="?", default="league")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--students", action="store_true", help="MHIM with every other attention model as its student too"
    )
    parser.add_argument("--rows", nargs="+", help="these rows alone, in this order")
    parser.add_argument("--mil", type=Path)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--breast", action="append", help="WORK:ENCODER")
    parser.add_argument("--labels", type=Path, help="labels of the breast fields: slide,patient,label,site")
    parser.add_argument("--minutes", type=float, default=480.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--to", type=Path, default=FIGURES)
    args = parser.parse_args()
    if args.what == "one-cost":
        one_cost(args.work)
        return
    args.work = Path(args.work).resolve()
    {"run": run, "collect": collect, "cost": cost}[args.what](args)


if __name__ == "__main__":
    main()
