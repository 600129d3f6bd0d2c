"""Patients' tables of a command: those that a training takes, and those that come with new patients.

In: the settings with `train.tables`, the patients at hand, perhaps a trained run. Out: the tables of these patients,
told; and new patients of whom tables alone are at hand. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mhim.configs.schema import Config
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.cohort.labels.rows import CohortError, Row, some
from mhim.pipeline.cohort.patient_tables import join
from mhim.pipeline.cohort.patient_tables.table import PatientTable
from mhim.pipeline.cohort.patients import Dataset, Patient, patient_of
from mhim.pipeline.results import predictions
from mhim.pipeline.stages.session import tell
from mhim.pipeline.training import fusion_bundle


def read(config: Config) -> dict[str, PatientTable]:
    """The tables that a training is asked to take; none without `--table`. Raises CohortError."""
    if config.train.tables and config.train.fusion == "none":
        raise CohortError(
            f"--table {next(iter(config.train.tables))}: patients' tables are used by a fusion: say which, "
            "for example --fusion late"
        )
    return join.read(config)


def foreseen(config: Config, rows: Sequence[Row]) -> None:
    """Read the tables, and find the patients of the labels in them, before hours of other work. Raises CohortError."""
    if tables := read(config):
        join.of_patients(tables, {r.patient for r in rows})


def of_training(config: Config, data: Dataset) -> dict[str, PatientTable]:
    """The tables with the rows of the patients that are trained on. Tells who is in which. Raises CohortError."""
    tables = read(config)
    found, notes = join.of_patients(tables, [p.id for p in data.patients], {p.id for p in data.patients if p.slides})
    tell(notes)
    return found


def of_new(config: Config, run: Path) -> dict[str, PatientTable]:
    """The tables that come with new patients, their columns taken as `run` took its own. Raises CohortError where it was
    trained without such a table."""
    if not config.train.tables:
        return {}
    fusion = fusion_bundle.read(predictions.folds_of(run)[0])
    if fusion is None:
        raise CohortError(f"--table: {run.name} was trained on slides alone; leave the tables away")
    return join.read(config, fusion.kinds)


def rows_of(run: Path, tables: Mapping[str, PatientTable], patients: Sequence[str]) -> dict[str, Rows]:
    """The rows of `patients` who have one. Tells who has none, and what is new in the tables to the models of `run`:
    columns that are not there, words, cells far outside."""
    fusion = fusion_bundle.read(predictions.folds_of(run)[0])
    if fusion is None:
        return {}
    found: dict[str, PatientTable] = {}
    notes: list[str] = []
    if tables:
        found, notes = join.of_patients(tables, patients)
    rows = join.rows(found)
    tell([*notes, *fusion.told(rows)])
    return rows


def without_slides(data: Dataset, tables: Mapping[str, PatientTable]) -> Dataset:
    """`data` with those patients who stand in a table and have no slides at hand."""
    here = {p.id for p in data.patients} | {s for p in data.patients for s in p.slides}
    known = {p for t in tables.values() for p, there in zip(t.patients, t.rows.present, strict=True) if there}
    lone = sorted(known - here)
    if not lone:
        return data
    more = tuple(patient_of(name, (), {}) for name in lone)
    told = f"{len(lone)} patients have rows in tables and no slides, and are scored by the tables alone: {some(lone)}"
    patients: tuple[Patient, ...] = tuple(sorted((*data.patients, *more), key=lambda p: p.id))
    return replace(data, patients=patients, notes=(*data.notes, told))
