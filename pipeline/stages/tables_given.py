"""The patients' tables that a command was given (`--table NAME=FILE`), read as a training or a trained model wants
them.

In: the settings. Out: tables by name, and lines to be told. Knows no fold and no score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mhim.configs.schema import Config
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.cohort.patient_tables import table
from mhim.pipeline.cohort.patient_tables.table import PatientTable
from mhim.pipeline.cohort.patients import Dataset, Patient
from mhim.pipeline.training import bundle, fusion_bundle


def to_train_on(config: Config, patients: Sequence[str]) -> tuple[dict[str, PatientTable], list[str]]:
    """The tables of a fused training, none of a training of slides alone. patients: of the run. Raises CohortError."""
    given = config.train.tables
    if config.train.fusion == "none":
        if given:
            raise CohortError(
                f"table {next(iter(given))} is given, but train.fusion is none: say how slides and tables are put "
                "together, e.g. --set train.fusion=late"
            )
        return {}, []
    if not given:
        raise CohortError(f"train.fusion={config.train.fusion} needs a patients' table: --table NAME=FILE")
    made, told = {}, []
    for name, path in given.items():
        made[name] = table.read(Path(path), name, config.tables)
        here = set(made[name].patients)
        lacking = [p for p in patients if p not in here]
        if len(lacking) == len(patients):
            raise CohortError(
                f"table {name} ({path}) has none of the run's {len(patients)} patients: its column "
                f"{made[name].patient_column!r} says {', '.join(made[name].patients[:3])}, the labels say "
                f"{', '.join(patients[:3])}"
            )
        told += [f"table {name}: {note}" for note in made[name].notes]
        if lacking:
            told.append(
                f"table {name}: {len(lacking)} of {len(patients)} patients have no row, such as {lacking[0]}: their "
                "answers rest on what else there is"
            )
    return made, told


def to_score_with(config: Config, folders: Sequence[Path]) -> tuple[dict[str, Rows], list[str]]:
    """The tables of new patients, as a run's trainings read theirs. folders: of the trainings. Raises CohortError."""
    given, card = config.train.tables, bundle.card_of(folders[0])
    if card.fusion is None:
        if given:
            raise CohortError(
                f"table {next(iter(given))} is given, but the run was trained on slides alone: leave --table away"
            )
        return {}, []
    fusion = fusion_bundle.read(folders[0])
    assert fusion is not None
    unknown = sorted(given.keys() - fusion.tables.keys())
    if unknown:
        raise CohortError(
            f"table {unknown[0]} is none of the run's, which are {', '.join(fusion.tables)}: give it under its name"
        )
    read = {n: table.read(Path(path), n, config.tables, fusion.kinds[n]) for n, path in given.items()}
    rows = {n: t.rows for n, t in read.items()}
    notes = [f"table {n}: {note}" for n, t in read.items() for note in t.notes]
    return rows, [*notes, *fusion.told(rows)]


def without_slides(given: Mapping[str, Rows], data: Dataset, rows: Sequence[Row]) -> list[Patient]:
    """Patients of the tables who have a known cell and no slide among those to be scored. rows: tell whose slides are
    whose also where each is scored by itself."""
    there = {p.id for p in data.patients} | {r.patient for r in rows}
    names = sorted({p for t in given.values() for p, has in zip(t.patients, t.present, strict=True) if has} - there)
    return [Patient(name, (), (), None, "") for name in names]
