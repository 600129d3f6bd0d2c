"""Do maps that keep a model's answer point at the truth? `score.evidence` against the demo's planted tumour.

    python -m tests.benchmarks.evidence run RESULTS.jsonl --demo FOLDER [--seeds 10] [--models abmil dsmil mhim]
    python -m tests.benchmarks.evidence table RESULTS.jsonl

FOLDER is what `pipeline demo --to FOLDER` painted, tiled and extracted; it is not changed. Per seed and model: a
training of the preset `demo` (other folds, other weights), every map of every held-out bag measured both ways. Controls
stand beside the maps that a model has: the truth, the truth under noise, a random order, and attention turned round.
Means of evidence are over three sets of bags: all, those with a finding, and those of them that the model calls
tumour. `run` goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.load import resolve
from mhim.extract.tiles import regions
from mhim.mil import outcome_metrics
from mhim.pipeline.demo import cohort
from mhim.pipeline.pictures.layers import layers
from mhim.pipeline.results import evidence, predictions, truth
from mhim.pipeline.stages import runs, verbs
from mhim.pipeline.stages.session import Session
from mhim.pipeline.store import layout, reading
from mhim.pipeline.training import bundle

MODELS = ("abmil", "dsmil", "mhim")
NOISE = (0.5, 1.0, 2.0, 4.0)  # sd of what is added to the planted share of each tile
NUMBERS = ("gain", "keep_area", "remove_area", "sufficiency", "necessity")
BY_TRUTH = ("auc", "pointing", "froc")
CONTROLS = ("truth", "random", "attention_reversed", *(f"truth_noise_{sd:g}" for sd in NOISE))
DRAWS = 2000


def one(demo: Path, model: str, seed: int) -> dict[str, Any]:
    """Train `model` with `seed` and measure its maps."""
    with tempfile.TemporaryDirectory(prefix="evidence-") as private:
        work = layout.Work(Path(private) / "work")
        work.root.mkdir()
        for name in ("cohort.csv", "tiles", "features"):
            (work.root / name).symlink_to((demo / "work" / name).resolve())
        sets = [f"train.model={model}", f"train.seed={seed}", "cluster.workers=1"]
        config = resolve(["demo"], sets, {})
        verbs.train(Session(work, config), demo / "labels.csv", model)
        scored = runs.held_out(work, config, work.run(model))
        return measure(demo, work, scored, np.random.default_rng(seed))


def measure(demo: Path, work: layout.Work, scored: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Every map of the held-out bags by evidence and by truth."""
    known: list[truth.Known] = []
    bags: list[dict[str, Any]] = []
    for patient in scored.data.patients:
        models = [bundle.read(folder) for folder in scored.models[patient.id]]
        arrays = predictions.slide_scores(patient, models)
        task = models[0].card.task.value
        shares, own = [], []
        for slide, store in zip(patient.slides, patient.stores, strict=True):
            attrs = reading.read_attrs(store)
            drawn = regions.read(demo / "truth" / f"{slide}.geojson", attrs["bounds_l0"][:2], "auto", may_be_empty=True)
            shares.append(regions.covered(drawn, arrays[slide]["coords"], attrs["tile_l0"]))
            own.append(len(shares[-1]))
        names = [n for n in arrays[patient.slides[0]] if n not in ("coords", "logits", "unlike")]
        whole = {n: np.concatenate([arrays[s][n] for s in patient.slides]) for n in names}
        share = np.concatenate(shares)
        maps = {layer.name: layer.scores for layer in layers(whole, task, "all")}
        maps |= {"truth": share, "random": rng.random(len(share)), "attention_reversed": -whole["attention"]}
        maps |= {f"truth_noise_{sd:g}": share + rng.normal(0, sd, len(share)) for sd in NOISE}
        called = task.classes[int(np.mean(arrays[patient.slides[0]]["logits"], 0).argmax())]
        worth = evidence.of_patient(patient, models, maps)
        bags.append(
            {
                "finding": bool((share >= truth.HALF).any()),
                "called": called,
                "maps": {n: e.numbers(len(share)) for n, e in worth.items()},
            }
        )
        ends = np.cumsum([0, *own])
        training = ";".join(f.name for f in scored.models[patient.id])
        for k, slide in enumerate(patient.slides):
            part = slice(int(ends[k]), int(ends[k + 1]))
            grid = truth.grid_of(arrays[slide]["coords"], reading.read_attrs(patient.stores[k]))
            cut = {n: np.asarray(m)[part] for n, m in maps.items()}
            known.append(truth.Known(slide, share[part] >= truth.HALF, cut, grid, training, len(share)))
    by_truth = truth.measured(known)
    groups = {
        "all": bags,
        "finding": [b for b in bags if b["finding"]],
        "found": [b for b in bags if b["finding"] and b["called"] == cohort.LABELS[1]],
    }
    told = {}
    for name, of in by_truth.items():
        told[name] = {"auc": of["auc"]["mean"], "pointing": of["pointing"], "froc": of["froc"]}
        for group, members in groups.items():
            each = [b["maps"][name] for b in members]
            told[name][group] = {k: float(np.mean([e[k] for e in each])) for k in NUMBERS} if each else None
    return {"bags": {g: len(m) for g, m in groups.items()}, "maps": told}


def run(results: Path, demo: Path, seeds: int, models: Sequence[str]) -> None:
    done = {(r["model"], r["seed"]) for r in rows_of(results)}
    for seed in range(seeds):
        for model in models:
            if (model, seed) not in done:
                row = {"model": model, "seed": seed, **one(demo, model, seed)}
                with open(results, "a") as out:
                    out.write(json.dumps(row) + "\n")


def rows_of(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def order(row: dict[str, Any], by: str, controls: bool) -> float:
    """Spearman's rank correlation of the maps' gain, over bags with findings, and of `by`. controls: with a random
    order and attention turned round among the maps."""
    names = [n for n in row["maps"] if n not in CONTROLS or (controls and n in ("random", "attention_reversed"))]
    maps = [row["maps"][n] for n in names]
    gains = np.array([m["finding"]["gain"] for m in maps])
    return outcome_metrics.spearman(gains, np.array([m[by] for m in maps]))


def told(values: Sequence[float]) -> str:
    """Mean, and its interval of 95 % over the seeds, which are drawn anew."""
    known = np.array([v for v in values if np.isfinite(v)])
    drawn = np.random.default_rng(0).choice(known, (DRAWS, len(known))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{known.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def table(results: Path) -> str:
    """Two tables in Markdown: each map's worth, means over seeds; and how far the two orders of maps agree."""
    rows = rows_of(results)
    lines = ["| model, map | seeds | gain | tile AUC | highest tile is true | FROC |", "|---|---|---|---|---|---|"]
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r["maps"] for r in rows if r["model"] == model]
        for name in own[0]:
            each = [(m[name]["finding"]["gain"], *(m[name][k] for k in BY_TRUTH)) for m in own]
            cells = " | ".join(f"{v:.3f}" for v in np.mean(each, axis=0))
            lines.append(f"| {model}, {name.replace('_', ' ')} | {len(own)} | {cells} |")
    lines += ["", "| model | seeds | maps | tile AUC | highest tile is true | FROC |", "|---|---|---|---|---|---|"]
    for model in dict.fromkeys(r["model"] for r in rows):
        for controls in (False, True):
            own = [r for r in rows if r["model"] == model]
            cells = " | ".join(told([order(r, by, controls) for r in own]) for by in BY_TRUTH)
            of = "its own, random, reversed" if controls else "its own"
            lines.append(f"| {model} | {len(own)} | {of} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs_ = parser.add_subparsers(dest="verb", required=True)
    make = verbs_.add_parser("run")
    make.add_argument("results", type=Path)
    make.add_argument("--demo", type=Path, required=True)
    make.add_argument("--seeds", type=int, default=10)
    make.add_argument("--models", nargs="+", default=list(MODELS))
    show = verbs_.add_parser("table")
    show.add_argument("results", type=Path)
    args = parser.parse_args()
    if args.verb == "run":
        run(args.results, args.demo, args.seeds, args.models)
    else:
        print(table(args.results))


if __name__ == "__main__":
    main()
