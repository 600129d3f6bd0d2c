"""The patients' tables that a command was given (`--table NAME=FILE`), read as a training or a trained model wants
them.

In: the settings. Out: tables by name, and lines to be told. Knows no fold and no score.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mhim.configs.schema import Config
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.labels.table import Table
from mhim.pipeline.cohort.patient_tables import join
from mhim.pipeline.cohort.patient_tables.table import PatientTable
from mhim.pipeline.cohort.patients import Dataset, Patient
from mhim.pipeline.training import bundle, fusion_bundle


def to_train_on(config: Config) -> dict[str, PatientTable]:
    """The tables of a fused training, whole; none of a training of slides alone. Raises CohortError."""
    given = config.train.tables
    if config.train.fusion == "none":
        if given:
            raise CohortError(
                f"table {next(iter(given))} is given, but train.fusion is none: say how slides and tables are put "
                "together, e.g. --fusion late"
            )
        for idle in ("fusion_params", "fusion_groups"):  # of a training: other verbs may carry its settings along
            if getattr(config.train, idle):
                raise CohortError(
                    f"train.{idle} says how slides and tables are put together, but train.fusion is none: leave it "
                    "away, or set train.fusion"
                )
        return {}
    if config.train.bag == "slide":
        raise CohortError(
            f"train.fusion={config.train.fusion} joins a row of a table to a patient's one answer, and with "
            "train.bag=slide each slide has an answer of its own: set train.bag=patient, or leave the tables away"
        )
    if not given:
        raise CohortError(f"train.fusion={config.train.fusion} needs a patients' table: --table NAME=FILE")
    return join.read(config)


def patients(tables: Mapping[str, PatientTable]) -> set[str]:
    """Who has a known cell in any of the tables."""
    return {p for t in tables.values() for p, known in zip(t.patients, t.rows.present, strict=True) if known}


def foresee(config: Config, labels: Table) -> None:
    """Find the patients of the labels in the tables, and no outcome, before hours of tiling. Raises CohortError."""
    tables = to_train_on(config)
    join.without_outcomes(tables, labels)
    join.of_patients(tables, {r.patient for r in labels.rows})


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
    read = join.read(config, fusion.kinds)
    rows = join.rows(read)
    return rows, [*(note for t in read.values() for note in t.notes), *fusion.told(rows)]


def without_slides(given: Mapping[str, Rows], data: Dataset, whose: Collection[str]) -> list[Patient]:
    """Patients of the tables who have a known cell and no slide among those to be scored. whose: the patients of the
    slides, also where each is scored by itself."""
    there = {p.id for p in data.patients} | set(whose)
    names = sorted({p for t in given.values() for p, has in zip(t.patients, t.present, strict=True) if has} - there)
    return [Patient(name, (), (), None, "") for name in names]
