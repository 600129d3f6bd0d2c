"""The predictions and the card of answers that are no single network's of bags: of a table, a fusion, a joint network.

In: patients, logits, the job. Out: rows and fields as `fold.py` writes them for a network of bags. Writes no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mhim.mil import splits
from mhim.mil.tasks import Task
from mhim.pipeline.cohort.patients import Dataset, Patient
from mhim.pipeline.resume.fingerprints import of_joint, of_task, own_settings
from mhim.pipeline.store.layout import FORMAT
from mhim.pipeline.training import bundle, fold
from mhim.pipeline.training.card import Facts
from mhim.pipeline.training.fold import Job


def as_rows(side: str, of: Sequence[Patient], logits: np.ndarray, task: Task) -> list[dict[str, Any]]:
    """Rows of `predictions.csv`. logits: (n, q)."""
    return [
        {
            "side": side,
            "patient": p.id,
            "slides": json.dumps(list(p.slides)),
            **task.columns(p.target),
            **{f"logit_{k}": float(v) for k, v in enumerate(row)},
        }
        for p, row in zip(of, logits, strict=True)
    ]


def card(
    job: Job, data: Dataset, task: Task, rows: Sequence[dict[str, Any]], named: Mapping[str, Any], in_dim: int
) -> dict[str, Any]:
    """A card of answers that are no single network's: the fields that every reader of a trained fold looks at."""
    known = data.by_id()
    settings = {"table": of_task, "joint": of_joint}.get(job.part, own_settings)
    learnt = task.learnt([t for p in job.fold.train if (t := known[p].target) is not None])
    points = {**fold.operating_points(rows, task), **learnt}
    sides = {what: [r for r in rows if r["side"] == side] for what, side in fold.SIDES}
    return {
        "format": FORMAT,
        "epoch": 0,
        "epochs": 0,
        **named,
        "in_dim": in_dim,
        "task": task.to_json(),
        "features": Facts.of(data.facts, "what the features say of themselves"),
        "made": data.made,
        "split": {
            "hash": job.split_hash,
            "repeat": job.fold.repeat,
            "fold": job.fold.fold,
            **{s: len(getattr(job.fold, s)) for s in splits.SIDES},
        },
        "seed": job.seed,
        "protocol": job.config.protocol,
        # a table knows nothing of the slide model, whose settings are not in its fingerprint either
        "train": settings(job.config),
        "versions": bundle.versions(),
        **{what: fold.finite(task.metrics(task.truth(of), fold.logits_of(of), points)) for what, of in sides.items()},
        **points,
    }
