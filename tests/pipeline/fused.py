"""A tiny cohort of bags and tables of one hidden truth, and runs that fuse them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import Config
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.cohort import patients
from mhim.pipeline.cohort.labels.rows import Row
from mhim.pipeline.cohort.patient_tables.table import PatientTable
from mhim.pipeline.resume import runner, stage
from mhim.pipeline.stages.train import Train
from mhim.pipeline.store import layout
from tests.pipeline.bags import make_features
from tests.pipeline.trained import in_turn, settings

PATIENTS = 40


def config(**train: Any) -> Config:
    return settings(**({"fusion": "late", "fusion_folds": 2, "standardize": True} | train))


def cohort(
    work: layout.Work, kind: str = "classification", lacking: int = 5
) -> tuple[list[Row], dict[str, PatientTable]]:
    """Labels of features below `work`, and two tables: `clinical` with a factor, `rna` with a group, whose last
    `lacking` patients are missing."""
    rng = np.random.default_rng(3)
    rows = make_features(work, PATIENTS)
    truth = np.array([i % 2 for i in range(PATIENTS)]) * 2.0 - 1 + 0.5 * rng.normal(size=PATIENTS)
    if kind == "survival":
        times = rng.exponential(np.exp(-truth)) + 0.1
        rows = [
            replace(r, label=None, time=float(t), event=int(rng.random() < 0.8))
            for r, t in zip(rows, times, strict=True)
        ]
    names = tuple(r.patient for r in rows)
    sex = tuple("fm"[int(rng.integers(2))] for _ in names)
    clinical = Rows(names, ("age",), (60 + 5 * truth + rng.normal(size=PATIENTS) * 8)[:, None], {"sex": sex})
    genes = truth[:, None] * np.array([1.0, 1, 0, 0, 0, 0]) + rng.normal(size=(PATIENTS, 6)) * 1.5
    symbols = tuple(f"G{i}" for i in range(6))
    kept = PATIENTS - lacking
    rna = Rows(names[:kept], symbols, genes[:kept], {}, {"PATHWAY_A": symbols[:3], "PATHWAY_B": symbols[3:]})
    return rows, {
        n: PatientTable(n, Path(f"{n}.csv"), r, "0", "patient") for n, r in (("clinical", clinical), ("rna", rna))
    }


def training(
    work: layout.Work, rows: list[Row], tables: Mapping[str, PatientTable], config: Config, name: str = "run"
) -> Train:
    data = patients.labelled(rows, work.features("texture"), config.train)
    return Train(work, config, name, data, patients.make_folds(data, config.train), tables)


def trained(
    work: layout.Work, rows: list[Row], tables: Mapping[str, PatientTable], config: Config, name: str = "run"
) -> stage.Report:
    made = training(work, rows, tables, config, name)
    return runner.run(stage.plan(made, made.items()), in_turn)
