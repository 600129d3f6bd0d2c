"""A work folder as after scoring, made in a second: real slides really tiled, scores that the test knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from mhim.mil.tasks import Classification
from mhim.pipeline.cli.main import _main
from mhim.pipeline.store import layout, reading, tables, writing
from tests.pipeline import records

NASTY = "<img src=x onerror=alert(1)>&'\"nasty.svs"
HOT = 5  # the tile with the highest attention


def make(folder: Path, cohort: Path) -> Path:
    """Work folder with three slides (0.25 and 0.5 mpp, one truncated) and the scored runs `one` and `two`."""
    slides = folder / "slides"
    slides.mkdir(parents=True)
    by_mpp = sorted((cohort / "slides").glob("case_*.svs"), key=lambda p: p.stat().st_size)
    shutil.copy(by_mpp[0], slides / "a.svs")
    shutil.copy(by_mpp[-1], slides / NASTY)
    shutil.copy(cohort / "slides" / "truncated.svs", slides / "truncated.svs")
    assert _main(["tile", str(slides), "--work", str(folder / "work"), "--workers", "1"]) == 1
    work = layout.Work(folder / "work")
    for run in ("one", "two"):
        rows = []
        for k, slide in enumerate(("a.svs", NASTY)):
            _scores(work, run, slide)
            p = 0.9 if k == 0 else 0.2 if run == "one" else 0.7
            rows.append(
                {
                    "slide": slide,
                    "patient": f"P{k}",
                    "repeat": 0,
                    "fold": k,
                    "seed": 1,
                    "label": "benign" if k else "tumour",
                    "p_benign": 1 - p,
                    "p_tumour": p,
                    "threshold": 0.5,
                    "undecided_from": 0.5,
                    "undecided_to": 0.5,
                    "decision": "tumour" if p > 0.5 else "benign",
                }
            )
        task = Classification(classes=("benign", "tumour"))
        (work.run(run) / "predictions.csv").write_text(tables.of_mappings(rows))
        (work.run(run) / "metrics.json").write_text(records.metrics(task).text())
    return folder / "work"


def attention(n: int) -> np.ndarray:
    """Known scores: tile i has i / 1000, but HOT has 0.9."""
    scores = np.arange(n, dtype=np.float32) / 1000
    scores[HOT] = 0.9
    return scores


def _scores(work: layout.Work, run: str, slide: str) -> None:
    coords = np.asarray(reading.read_array(work.tile_store(slide), "coords"))
    scores = attention(len(coords)) if run == "one" else attention(len(coords))[::-1].copy()
    writer = writing.StoreWriter(work.run(run) / "scores" / f"{slide}.zarr", {"fingerprint": "made by hand"})
    writer.write("coords", coords)
    writer.write("attention", scores)
    if run == "one":  # a model that tells class evidence, and one that does not
        writer.write("evidence", np.stack([-scores, scores], 1))
