"""The paper's benchmarks on stand-ins: label files as published, .pt features in the real number; no real data.

    python -m tests.benchmarks.paper make FOLDER --preset camelyon [--share 0.01] [--dim 1024]
    python -m tests.benchmarks.paper prove FOLDER [--preset camelyon] [--student abmil] [--epochs 10]
    python -m tests.benchmarks.paper time FOLDER [--preset camelyon] [--student abmil]

`make` writes labels.csv and features/*.pt for as many slides and patients as the set has; `--share` is the share of
each slide's tiles (1: all of them, 20 to 30 GB a set). Half of the tiles lie a little off in 16 features, by the hidden
class or risk, so that something can be learnt. Then the user's own commands:

    pipeline import FOLDER/features --encoder stand-in
    pipeline benchmark --config camelyon --encoder stand-in --labels FOLDER/labels.csv

`prove` does so with every slide of the set (a hundredth of their tiles) and trains one fold of it with the preset, the
plain model and then MHIM: what it took, and what the test fold says.

`time` makes a dozen slides with all their tiles and trains one fold through the command line, the plain model and then
MHIM with it as its teacher, for one epoch and for three. The difference is the time of two epochs, free of start-up,
test and alarm; per tile (of a validation bag a third, since it is only scored) times the tiles of the whole set it
gives the epoch of a fold. It is extrapolated, and says so. One thread, processor seconds, nothing kept in RAM.

Numbers of slides, patients and events are about those of the sets as they are used; tiles per slide (20x, 256 px) are
taken as log-normal around 11,000.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TILES, SPREAD = 11_000, 0.6  # median and log sd of the tiles of a slide
MARKED = 16  # features that carry the stand-ins' signal
SIGNAL = 0.5  # their shift, in standard deviations of a tile


@dataclass(frozen=True)
class Benchmark:
    """One set. parts: patients per class (or all). slides: slides in all. events: share with the event seen, about."""

    parts: dict[str, int]
    slides: int
    events: float = 0.0
    study: str = ""

    @property
    def patients(self) -> int:
        return sum(self.parts.values())


SETS = {
    "camelyon": Benchmark({"0": 557, "1": 342}, 899),
    "tcga_nsclc": Benchmark({"0": 478, "1": 478}, 1053),
    "tcga_brca": Benchmark({"0": 779, "1": 198}, 1038),
    "tcga_luad_survival": Benchmark({"": 452}, 513, 0.36, "LUAD"),
    "tcga_lusc_survival": Benchmark({"": 447}, 478, 0.43, "LUSC"),
    "tcga_blca_survival": Benchmark({"": 373}, 437, 0.45, "BLCA"),
}


def make(folder: Path, preset: str, share: float = 0.01, dim: int = 1024, patients: int | None = None) -> Path:
    """Write the stand-in of a set; returns the path of its labels. patients: fewer of them, in the same proportions."""
    of = SETS[preset]
    rng = np.random.default_rng(len(preset))
    keep = 1.0 if patients is None else patients / of.patients
    (folder / "features").mkdir(parents=True, exist_ok=True)
    lines = ["Study,ID,Event,Status,WSI"] if of.study else []
    number = 0
    for label, count in of.parts.items():
        for _ in range(max(2, round(keep * count))):
            number += 1
            hidden = rng.normal() if of.study else float(label == "1")
            slides = 1 + int(of.slides > of.patients and rng.random() < of.slides / of.patients - 1)
            if preset == "camelyon":  # normal_1 and normal_10 are two slides
                files = [name := f"{('normal', 'tumor')[int(label)]}_{number}"]
            else:
                name = f"TCGA-{number % 90:02d}-{number:04d}"
                files = [f"{name}-01Z-00-DX{k + 1}.{rng.bytes(4).hex()}" for k in range(slides)]
            for file in files:
                n = max(2, int(share * TILES * np.exp(SPREAD * rng.normal())))
                _features(folder / "features" / f"{file}.pt", n, dim, hidden, rng)
            if of.study:  # the time falls with the hidden risk; follow-up ends at random
                time, end = 60 * rng.exponential() * np.exp(-hidden), 40 * rng.exponential() / (of.events + 0.1)
                wsi = ";".join(f"{f}.pt" for f in files)
                lines.append(f"{of.study},{name},{min(time, end):.2f},{int(time <= end)},{wsi}")
            else:
                lines.append(f"{name},{label}")
    labels = folder / "labels.csv"
    labels.write_text("\n".join(lines) + "\n")
    return labels


def _features(path: Path, n: int, dim: int, hidden: float, rng: np.random.Generator) -> None:
    """Normal float16 features (n, dim); half of the tiles are shifted by the hidden class or risk in a few features."""
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    x[: (n + 1) // 2, :MARKED] += SIGNAL * hidden
    torch.save(x.half(), path)


def _cli(*args: object) -> tuple[float, int]:
    """One command in a process of its own: its processor seconds, and the peak memory in bytes, children included."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "mhim.pipeline", *(str(a) for a in args)], env=env, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(str(a) for a in args)} failed")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def prove(folder: Path, preset: str, student: str, epochs: int) -> Iterator[str]:
    """Lines that say how one fold of the whole set, each slide with a hundredth of its tiles, went."""
    where, work, of = folder / preset, folder / "work", SETS[preset]
    if not (where / "labels.csv").exists():
        make(where, preset)
    used, peak = _cli("import", where / "features", "--encoder", preset, "--work", work)
    count = sum(1 for _ in (where / "features").glob("*.pt"))
    yield f"{preset}: {count} slides of {of.patients} patients imported in {used:.0f} s, {peak / 2**20:.0f} MiB"
    (folder / "items").write_text("teacher/fold_0\nfold_0\n")
    used, peak = _cli(
        "train",
        "--config",
        preset,
        "--encoder",
        preset,
        "--labels",
        where / "labels.csv",
        "--work",
        work,
        "--workers",
        1,
        "--seeds",
        1,
        "--name",
        preset,
        "--items",
        folder / "items",
        "--epochs",
        epochs,
        "--set",
        "train.min_epochs=0",
        "--set",
        f"train.model_params={{student: {student}}}",
    )
    for name in ("teacher/fold_0", "fold_0"):
        card = json.loads((work / "runs" / preset / name / "model.json").read_text())
        sides = ", ".join(f"{card['split'][side]} {side}" for side in ("train", "val", "test"))
        metrics = ", ".join(f"{k} {v:.3f}" for k, v in card["test"].items() if k in ("auc", "kappa", "c_index"))
        yield f"  {name}: {sides} patients, {card['epochs']} epochs; test {metrics}"
    yield f"  both, with validation, test and alarm: {used:.0f} s of processor time, peak {peak / 2**20:.0f} MiB"


def time(folder: Path, preset: str, student: str, patients: int = 14, epochs: int = 2) -> Iterator[str]:
    """Lines that say what one epoch of one fold of the set takes."""
    where, work, of = folder / f"true_size_{preset}", folder / "work", SETS[preset]
    if not (where / "labels.csv").exists():
        make(where, preset, 1.0, 1024, patients)
    _cli("import", where / "features", "--encoder", preset, "--work", work)
    tiles = {f.stem: len(torch.load(f, mmap=True, weights_only=True)) for f in (where / "features").glob("*.pt")}
    mean = TILES * np.exp(SPREAD**2 / 2)
    yield f"{len(tiles)} slides of {min(tiles.values())} to {max(tiles.values())} tiles, 1024 wide, float16"
    common = [
        "--config",
        preset,
        "--encoder",
        preset,
        "--labels",
        where / "labels.csv",
        "--work",
        work,
        "--seeds",
        1,
        "--folds",
        2,
        "--workers",
        1,
        "--set",
        "train.survival_bins=2",
        "--set",
        "train.min_epochs=0",
        "--set",
        "train.cache_gb=0",
    ]
    for model, items in ((student, "fold_0\n"), ("mhim", "teacher/fold_0\nfold_0\n")):
        (folder / "items").write_text(items)
        params = f"train.model_params={{student: {student}}}" if model == "mhim" else "train.model_params={}"
        seconds, peak = [], 0
        for n in (1, 1 + epochs):
            name = f"{preset}_{student}_{model}_{n}"
            used, peak = _cli(
                "train",
                *common,
                "--model",
                model,
                "--set",
                params,
                "--epochs",
                n,
                "--name",
                name,
                "--items",
                folder / "items",
                "--replace",
            )
            seconds.append(used)
        with open(work / "runs" / name / "splits.csv", newline="") as f:
            sides = {r["patient"]: r["split"] for r in csv.DictReader(f) if r["fold"] == "0"}
        worth = {"train": 1.0, "val": 1 / 3, "test": 0.0}
        seen = sum(
            n * worth[side] for p, side in sides.items() for s, n in tiles.items() if s == p or s.startswith(f"{p}-01Z")
        )
        per_tile = (seconds[1] - seconds[0]) / epochs / seen
        # 5 folds: 0.8 of the patients, of which 0.2 validate
        whole = per_tile * mean * of.slides * 0.8 * (0.8 + 0.2 / 3)
        yield (
            f"{preset}, {model} ({student}): {1e6 * per_tile:.1f} µs a training tile, peak {peak / 2**20:.0f} MiB; "
            f"one epoch of one fold ({of.slides} slides of {mean:.0f} tiles): {whole / 60:.1f} min (extrapolated)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "prove", "time"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=list(SETS), default="camelyon")
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--student", default="abmil")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    if args.what == "make":
        print(make(args.folder, args.preset, args.share, args.dim))
        return
    shown = (
        time(args.folder, args.preset, args.student)
        if args.what == "time"
        else prove(args.folder, args.preset, args.student, args.epochs)
    )
    for line in shown:
        print(line, flush=True)


if __name__ == "__main__":
    main()
