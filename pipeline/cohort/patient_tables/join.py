"""The tables of a run and its patients, joined by exact patient id: who has what, and what is recorded of it.

In: the settings, the ids of the patients. Out: the tables, each of these patients only; what is told; the text of
`tables.json`. Nothing is guessed: ids that only look alike are told, and joined by nobody.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from mhim.configs.schema import Config, TablesConfig
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.cohort import tcga
from mhim.pipeline.cohort.labels.rows import TARGET, CohortError, counted, look_alikes, some
from mhim.pipeline.cohort.labels.table import Table, plain
from mhim.pipeline.cohort.patient_tables import table as patient_table
from mhim.pipeline.cohort.patient_tables.table import Kinds, PatientTable
from mhim.pipeline.store import writing

FILE = "tables.json"  # in the folder of a run
_PER_TABLE = tuple(n for n, f in TablesConfig.model_fields.items() if str(f.annotation).startswith("dict"))


def read(config: Config, kinds: Mapping[str, Kinds] | None = None) -> dict[str, PatientTable]:
    """Every table of `train.tables`, by its name. kinds: of the tables of a trained run, whose columns are asked for;
    one that it does not have is refused.

    Raises CohortError."""
    given = config.train.tables
    for setting in _PER_TABLE if given else ():  # of a trained run's tables any may be absent
        lost = sorted(getattr(config.tables, setting).keys() - given.keys() - (kinds or {}).keys())
        if lost:
            raise CohortError(f"tables.{setting} names {lost[0]!r}, and there is no --table {lost[0]}=FILE")
    if kinds is not None:
        strange = sorted(given.keys() - kinds.keys())
        if strange:
            known = some(sorted(kinds)) or "none"
            raise CohortError(f"--table {strange[0]}: the run was not trained with such a table; it knows: {known}")
    return {n: patient_table.read(Path(p), n, config.tables, kinds[n] if kinds else None) for n, p in given.items()}


def of_patients(
    tables: Mapping[str, PatientTable], patients: Collection[str], bags: Collection[str] | None = None
) -> tuple[dict[str, PatientTable], list[str]]:
    """The tables with the rows of `patients` only, and what is told: who is in which. bags: the patients with slides,
    all of them where not given.

    Raises CohortError where a table has none of them."""
    wanted, here = sorted(patients), set(patients)
    bags = here if bags is None else set(bags)
    found = {name: table.of(wanted) for name, table in tables.items()}
    notes: list[str] = []
    for name, table in found.items():
        whole = tables[name]
        notes += whole.notes
        if not table.patients:
            raise CohortError(_nobody(whole, wanted))
        lacking = sorted(here - set(table.patients))
        others = sorted(set(whole.patients) - here)
        lines = [f"{len(table.patients)} of {counted(len(wanted), 'patient')}"]
        lines += [f"not in it: {some(lacking)}"] if lacking else []
        lines += [f"{counted(len(others), 'row', 'is', 'are')} of nobody here: {some(others)}"] if others else []
        notes.append(f"table {name}: " + "; ".join(lines))
        alike = [(a, b) for a, b in look_alikes({*lacking, *others}) if (a in here) != (b in here)]
        if alike:
            pairs = [f"{a!r} and {b!r}" for a, b in alike]
            notes.append(f"table {name}: {some(pairs, 3)} look like one patient and are two: ids are compared exactly")
    if found:
        notes.append(f"patients by what they have: {patterns(wanted, bags, found)}")
    return found, notes


def without_outcomes(tables: Mapping[str, PatientTable], labels: Table) -> None:
    """Refuse a table that holds a column which the labels tell the outcome by: the model would learn the answer.

    Raises CohortError naming every table and column."""
    ours = {c for what, c in labels.columns.items() if what in ("label", "time", "event") or what.startswith(TARGET)}
    names = {plain(c) for c in ours}
    wrong = []
    for name, table in tables.items():
        held = sorted(c for c in (*table.rows.columns, *table.rows.factors) if plain(c) in names)
        if held:
            wrong.append(
                f"table {name}: {some(list(map(repr, held)), 8)} of {table.path} {'is' if len(held) == 1 else 'are'} "
                f"what {labels.path.name} tells the outcome by; leave it out (--set "
                f"'tables.leave_out.{name}=[{', '.join(held)}]'), or give it another name if it is something else"
            )
    if wrong:
        raise CohortError("\n".join(wrong))


def patterns(patients: Iterable[str], bags: Collection[str], tables: Mapping[str, PatientTable]) -> str:
    """How many patients have which of slides and tables, the most frequent first."""
    bags = set(bags)
    having = {
        name: {p for p, known in zip(t.patients, t.rows.present, strict=True) if known} for name, t in tables.items()
    }
    counts = Counter(
        " + ".join([*(["slides"] if p in bags else []), *(n for n in tables if p in having[n])]) or "nothing"
        for p in patients
    )
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items(), key=lambda c: (-c[1], c[0])))


def rows(tables: Mapping[str, PatientTable]) -> dict[str, Rows]:
    """Their rows alone."""
    return {name: table.rows for name, table in tables.items()}


def text(tables: Mapping[str, PatientTable]) -> str:
    """What `tables.json` says: per table its file's name and SHA-256, the columns by kind, the groups, and who has a
    row. No path: a run may be copied."""
    made = {
        name: {
            "file": table.path.name,
            "sha256": table.sha256,
            "patient_column": table.patient_column,
            "patients": len(table.patients),
            "numbers": list(table.kinds.numbers),
            "factors": list(table.kinds.factors),
            "groups": {k: len(v) for k, v in table.groups.items()},
            "left_out": dict(sorted(table.left_out.items())),
            **({} if table.missing is None else {"missing": list(table.missing)}),
        }
        for name, table in sorted(tables.items())
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def describe(run: Path, tables: Mapping[str, PatientTable]) -> None:
    """Write `tables.json` into the folder of a run, if it is not that already."""
    writing.write_if_other(run / FILE, text(tables))


def _nobody(table: PatientTable, patients: Sequence[str]) -> str:
    """Why no patient is in a table, as far as the ids tell."""
    mine = set(table.patients)
    told = f"table {table.name}: no patient of the {len(patients)} here has a row in {table.path}"
    told += f"; it has {some(sorted(mine), 3)}, they are {some(patients, 3)}"
    samples = [p for p in mine if (of := tcga.patient(p)) and of != p and of in set(patients)]
    if samples:
        return f"{told}. Its ids are samples of TCGA: cut them to the patient's, the first 12 characters"
    if set(table.rows.columns) & set(patients):
        return f"{told}. Patients stand in its columns: turn it round so that each has a row"
    alike = look_alikes([*mine, *patients])
    if alike:
        return f"{told}. {alike[0][0]!r} and {alike[0][1]!r} differ in how they are written: ids are compared exactly"
    return f"{told}; is {table.patient_column or 'the first column'!r} the patients' column " \
           f"(tables.patient_column.{table.name})?"  # fmt: skip
