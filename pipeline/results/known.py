"""Which of the slides at hand a trained run knows already: they must never be shown as new.

In: a run, and the patients that are to be scored. Out: of each one that the run was trained, validated or tested on,
how it was recognised and which trainings held it out. Recognised by the patient's name, by the slide's name, by the
slide's content and by the features themselves, so that neither renaming files nor importing features anew makes anybody
a stranger. `patients.csv` of the run keeps what is needed for it, and is a label table that repeats the training.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhim.pipeline.cohort import outcomes
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.cohort.patients import Dataset, Patient
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.store import layout, reading, tables, writing
from mhim.pipeline.training import bundle, fold, plan

PATIENTS = "patients.csv"
CONTENT = "content"  # attribute of tiles and features: identity of the slide's bytes
_ROWS = 64  # of a slide's features that its id is taken from


@dataclass(frozen=True)
class Recognised:
    """A patient at hand that the run knows. patients: its names in the run. why: how it was recognised. folders: the
    trainings that held all of them out, which may score it; none where every training has seen it."""

    patients: tuple[str, ...]
    why: str
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class _Seen:
    """One slide of the run, as far as it is on record."""

    slide: str
    patient: str
    content: str = ""
    features: str = ""


def features_id(path: Path) -> str:
    """Identity of the features in the store at `path`, whatever it is called and however its numbers are stored: a hash
    of their shape and of up to 64 evenly spread rows as float16. "" where there are none. Raises StoreError."""
    features = reading.read_array(path, "features")
    if not len(features):
        return ""
    rows = np.unique(np.linspace(0, len(features) - 1, _ROWS).astype(np.int64))
    with np.errstate(over="ignore"):  # beyond float16 is infinite, the same each time
        some = np.ascontiguousarray(features[rows].astype(np.float16))
    return hashlib.sha256(f"{features.shape} ".encode() + some.tobytes()).hexdigest()[:32]


def table(data: Dataset, cohort: Mapping[str, SlideEntry]) -> str:
    """The run's patients as CSV text: a label table (with the µm per px and regions of slides in `cohort`), and the
    identity of each slide's content and features."""
    rows = []
    for patient in sorted(data.patients, key=lambda p: (p.whose, p.id)):
        known = outcomes.cells(patient.target, data.outcomes)
        known |= {k: v for k in ("split", "fold", "site") if (v := getattr(patient, k)) is not None}
        if not patient.slides:
            rows.append({"slide": "", "patient": patient.whose, **known})
        for slide, path in zip(patient.slides, patient.stores, strict=True):
            entry = cohort.get(slide)
            made = {"mpp": repr(entry.mpp)} if entry and entry.mpp is not None else {}
            made |= {"regions": str(entry.regions)} if entry and entry.regions is not None else {}
            rows.append(
                {
                    "slide": slide,
                    "patient": patient.whose,
                    **known,
                    **made,
                    CONTENT: _content(path),
                    "features": features_id(path),
                }
            )
    columns = list(dict.fromkeys(k for row in rows for k in row if k not in (CONTENT, "features")))
    return tables.of_mappings([{k: row.get(k, "") for k in (*columns, CONTENT, "features")} for row in rows])


def describe(work: layout.Work, run: Path, data: Dataset) -> None:
    """Write the run's `patients.csv`, if it is not that already."""
    cohort = {s.id: s for s in read_cohort(work)} if work.cohort.exists() else {}
    text = table(data, cohort)
    writing.write_if_other(run / PATIENTS, text)


def damaged(run: Path, folders: Sequence[Path]) -> str:
    """What is wrong with the run's `patients.csv`, by which alone its patients are known under other names; "" if it is
    whole, or if there is none because version 0.1 kept none. folders: the run's trainings, whose sealed predictions
    name slides that must stand in it."""
    file = run / PATIENTS
    if not file.is_file():
        return "it is missing" if (run / plan.LABELS).is_file() else ""
    try:
        text, rows = file.read_text(encoding="utf-8"), tables.read(file)
        split = tables.read(run / "splits.csv") if (run / "splits.csv").is_file() else []
    except (csv.Error, UnicodeDecodeError) as error:
        return f"it, or splits.csv beside it, cannot be read ({error})"
    columns = {"slide", "patient", CONTENT, "features"}
    if not text.endswith("\n") or "\0" in text or any(r.keys() != rows[0].keys() or None in r.values() for r in rows):
        return "it is cut short, or holds bytes that were never written"
    if not rows or not columns <= rows[0].keys():
        return "it has no rows, or not its columns"
    slides, patients = {r["slide"] for r in rows}, {r["patient"] for r in rows}
    answered = [r for f in folders if (f / fold.PREDICTIONS).exists() for r in fold.read_predictions(f)]
    lost = {s for r in answered for s in json.loads(r["slides"])} - slides or {
        r["patient"] for r in split if "patient" in r
    } - patients
    return f"it lacks {len(lost)} that the run was trained with, such as {min(lost)}" if lost else ""


def recognise(
    run: Path, folders: Sequence[Path], data: Dataset, patient_of: Mapping[str, str] | None = None
) -> dict[str, Recognised]:
    """Name of a patient of `data` -> what the run knows of it, for those that it knows.

    folders: the run's trainings. patient_of: slide -> patient, where each slide of `data` is a bag of its own: what is
    known of one of them then holds for all slides of the patient.
    A slide of the same name and provably other content is another slide; a patient of the same name is the same. Raises
    StoreError where the run's record is damaged: a patient that it lacks would pass for new."""
    wrong = damaged(run, folders)
    if wrong and (run / PATIENTS).is_file():
        raise layout.StoreError(
            f"{run / PATIENTS} is damaged: {wrong}. Who is new to the run cannot be told by it: give the training's "
            "`pipeline train` again, which writes it anew, or copy it from its source once more"
        )
    # features of a run of version 0.1, which kept no `patients.csv`, lie in its work folder
    seen = _seen(layout.Work(run.parent.parent), run, folders)
    held_out = {
        folder: {row["patient"] for row in fold.read_predictions(folder) if row["side"] == "test"}
        for folder in folders
        if (folder / fold.PREDICTIONS).exists()
    }
    by = {key: _index(seen, key) for key in ("slide", "patient", "content", "features")}
    groups: dict[str, list[Patient]] = {}
    for bag in data.patients:
        groups.setdefault((patient_of or {}).get(bag.id, bag.id), []).append(bag)
    found: dict[str, Recognised] = {}
    for name, bags in groups.items():
        each = [_matches(bag, name, by) for bag in bags]
        whose = {name for names, _ in each for name in names}
        if whose:
            out = tuple(f for f in folders if f in held_out and whose <= held_out[f])
            why = next(words for _, words in each if words)
            found |= {bag.id: Recognised(tuple(sorted(whose)), why, out) for bag in bags}
    return found


def _matches(patient: Patient, name: str, by: Mapping[str, Mapping[str, Sequence[_Seen]]]) -> tuple[set[str], str]:
    """Patients of the run that the bag `patient` of the person `name` is, and how that was seen, the surest first."""
    whose: dict[str, set[str]] = {"features": set(), "content": set(), "patient": set(), "slide": set()}
    for slide, path in zip(patient.slides, patient.stores, strict=True):
        content = _content(path)
        whose["features"] |= {s.patient for s in by["features"].get(features_id(path) or "none", ())}
        whose["content"] |= {s.patient for s in by["content"].get(content or "none", ())}
        whose["slide"] |= {
            s.patient for s in by["slide"].get(slide, ()) if not (content and s.content and content != s.content)
        }
    named = patient.slides != (name,)  # else the name is only the slide's, judged above where the run had slides
    whose["patient"] |= {s.patient for s in by["patient"].get(name, ()) if named or not s.slide}
    words = {
        "features": "the same features",
        "content": "the same slide file",
        "patient": "the same patient id",
        "slide": "the same slide id",
    }
    why = next((words[k] for k, names in whose.items() if names), "")
    everyone: set[str] = set().union(*whose.values())
    return everyone, why


def unrecorded(run: Path) -> list[str]:
    """A line where the run has lost its `patients.csv`."""
    if (run / PATIENTS).is_file() or not (run / plan.LABELS).is_file():
        return []
    return [
        f"{run.name} has lost its {PATIENTS}: whom it knows is told by names, and by features as far as those of its "
        "slides are in this work folder; its `pipeline train` again writes it anew"
    ]


def note(found: Mapping[str, Recognised], left_out: Sequence[str], allowed: bool) -> list[str]:
    """Lines that say who is no stranger to the run, and what follows."""
    if not found:
        return []
    first = ", ".join(f"{name} ({one.why} as {', '.join(one.patients)})" for name, one in list(found.items())[:5])
    who = f"{len(found)} of these patients are known to the run: {first}" + (" ..." if len(found) > 5 else "")
    if allowed:
        return [
            f"{who}. They are scored by all folds and counted as new, because score.allow_known is set: what is "
            "said of them is not external, and too good"
        ]
    lines = [
        f"{who}. Each is scored by the trainings that held it out and shown apart; none counts as external. If "
        "they are other people under the same names, rename them, or pass --allow-known"
    ]
    if left_out:
        lines.append(
            f"not scored, {len(left_out)} that every training of the run has seen: {', '.join(left_out[:5])}"
            + (" ..." if len(left_out) > 5 else "")
        )
    return lines


def _seen(work: layout.Work, run: Path, folders: Sequence[Path]) -> list[_Seen]:
    """Every slide that the run's trainings have read."""
    file = run / PATIENTS
    if file.is_file():
        return [
            _Seen(r["slide"], r["patient"], r.get(CONTENT) or "", r.get("features") or "") for r in tables.read(file)
        ]
    slides: dict[str, str] = {}
    encoder = ""
    for folder in folders:
        encoder = bundle.card_of(folder).features.encoder or ""
        if (folder / fold.PREDICTIONS).exists():
            slides |= {s: r["patient"] for r in fold.read_predictions(folder) for s in json.loads(r["slides"])}
    stores = layout.feature_stores(work.features(encoder)) if encoder else {}
    found = [
        _Seen(s, p, _content(stores[s]), features_id(stores[s])) if s in stores else _Seen(s, p)
        for s, p in slides.items()
    ]
    if (run / "splits.csv").is_file():  # patients that no training held out are named there
        there = {r["patient"] for r in tables.read(run / "splits.csv")} - set(slides.values())
        found += [_Seen(p, p) for p in sorted(there)]
    return found


def _index(seen: Sequence[_Seen], key: str) -> dict[str, list[_Seen]]:
    table: dict[str, list[_Seen]] = {}
    for one in seen:
        if value := getattr(one, key):
            table.setdefault(value, []).append(one)
    return table


def _content(path: Path) -> str:
    return str(reading.read_attrs(path).get(CONTENT) or "")
