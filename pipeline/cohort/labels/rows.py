"""One row of a labels table or manifest: its columns, what a cell may hold, and rows that contradict each other.

In: the cells of one line. Out: a `Row`, or an error that names the column. Knows neither files nor slides.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mhim.configs.errors import UserError

COLUMNS = {
    "slide": "path or id of a slide (required)",
    "patient": "patient id; default: the slide itself",
    "label": "class of the patient",
    "time": "survival time",
    "event": "1 if the event happened at `time`, 0 if censored",
    "mpp": "µm per px of level 0",
    "split": "train, val or test",
    "fold": "number of the test fold",
    "site": "where the slide comes from",
    "regions": "file of drawn regions: QuPath GeoJSON, ASAP or ImageScope XML",
}
TARGET = "target."  # before the name of one of several columns of labels
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
EVENTS = {
    **dict.fromkeys(("dead", "deceased", "died", "death", "event", "yes", "true", "progressed", "recurred"), 1),
    **dict.fromkeys(("alive", "living", "censored", "no", "false", "diseasefree", "disease free", "no event"), 0),
}


class CohortError(UserError, ValueError):
    """Something is wrong with the folder or CSV; the message names every row and column, and what to do."""

    whole = True


class DoubtfulComma(ValueError):
    """A number whose comma may be a decimal or a thousands one."""


@dataclass(frozen=True)
class Row:
    """One labelled slide as the CSV gives it. number: line in the file as an editor counts it. targets: column and cell
    of each of several columns of labels; then there is no `label`. separator: of the table, see `plain_number`.
    label_column: what the file calls the column of `label`."""

    number: int
    slide: str
    patient: str
    label: str | None = None
    time: float | None = None
    event: int | None = None
    mpp: float | None = None
    split: str | None = None
    fold: int | None = None
    site: str | None = None
    regions: str | None = None
    targets: tuple[tuple[str, str | None], ...] = ()
    separator: str = ","
    label_column: str = "label"


def row_of(
    number: int,
    cells: Mapping[str, str],
    patient: str,
    separator: str = ",",
    words: Mapping[str, int] | None = None,
    may_lack_slide: bool = False,
    names: Mapping[str, str] | None = None,
) -> Row:
    """The row that `cells` (our column -> text, missing ones blank) stand for. patient: whose it is where no cell says.

    separator: of the table, which decides what a comma in a number means. words: further words of `event`.
    may_lack_slide: a row that names its patient needs no slide. names: our column -> the file's own. Raises ValueError
    that names the column as the file does."""
    names = names or {}

    def named(column: str) -> str:
        return names.get(column, column)

    def number_of(column: str, low: float) -> float | None:
        text = cells.get(column, "")
        if not text:
            return None
        value = plain_number(named(column), text, separator)
        if not math.isfinite(value) or value < low:
            raise ValueError(f"column {named(column)}: {text!r} must be a number of at least {low:g}")
        return value

    if not cells["slide"] and not (may_lack_slide and cells.get("patient")):
        raise ValueError(f"column {named('slide')}: it is empty, or says that it is missing")
    mpp = number_of("mpp", 0.0)
    if mpp == 0:
        raise ValueError(f"column {named('mpp')}: it must be above 0")
    event = event_of(cells.get("event", ""), words or {}, named("event"))
    fold = number_of("fold", 0.0)
    if fold is not None and fold != int(fold):
        raise ValueError(f"column {named('fold')}: {cells['fold']!r} must be a whole number from 0")
    split = cells.get("split", "")
    if split and split.casefold() not in SPLITS:
        raise ValueError(f"column {named('split')}: {split!r} must be train, val or test")
    time = number_of("time", 0.0)
    if (time is None) != (event is None):
        lacking = named("time" if time is None else "event")
        raise ValueError(f"columns {named('time')} and {named('event')}: give both or none; {lacking} is missing")
    return Row(
        number=number,
        slide=cells["slide"],
        patient=cells.get("patient") or patient,
        label=cells.get("label") or None,
        time=time,
        event=event,
        mpp=mpp,
        split=SPLITS[split.casefold()] if split else None,
        fold=None if fold is None else int(fold),
        site=cells.get("site") or None,
        regions=cells.get("regions") or None,
        targets=tuple((k.removeprefix(TARGET), v or None) for k, v in cells.items() if k.startswith(TARGET)),
        separator=separator,
        label_column=named("label"),
    )


def plain_number(column: str, text: str, separator: str) -> float:
    """A number, with a decimal comma where the table's own separator leaves no doubt. Raises ValueError."""
    if "," in text and re.fullmatch(r"[+-]?\d*,\d+", text):
        thousands = re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", text)
        if separator == ";" or (separator != "," and not thousands):
            text = text.replace(",", ".")
        else:
            raise DoubtfulComma(
                f"column {column}: is the comma of {text!r} a decimal or a thousands one? Write a point"
            )
    try:
        return float(text.replace("_", "x"))  # Python's own 1_000 is no number of a table
    except ValueError:
        raise ValueError(f"column {column}: {text!r} is not a number") from None


def event_of(text: str, words: Mapping[str, int], column: str = "event") -> int | None:
    """1, 0, or None for blank: a number, a word, or a number before a word as cBioPortal writes it (1:DECEASED)."""
    if not text:
        return None
    word = " ".join(text.casefold().split())
    known = EVENTS | {" ".join(k.casefold().split()): v for k, v in words.items()}
    if word in known:
        return known[word]
    digit = re.match(r"([01])\s*:", word)
    if digit:
        return int(digit[1])
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if value not in (0.0, 1.0):
        raise ValueError(
            f"column {column}: {text!r} must be 0 or 1, or a word such as dead and alive; say what it means "
            f"with --set 'labels.event_words={{{text}: 1}}'"
        )
    return int(value)


OF_PATIENTS = ("split", "fold")  # what all rows of a patient must agree in
OF_BAGS = ("label", "time", "event")  # and what, where the patient is one bag
OF_EVENTS = "an event happens to a patient, not to one of the slides: all rows of a patient need the same"
OWN_LABELS = (
    "one bag holds all slides of a patient, and a bag has one label; where each slide has a label of its own, "
    "--set train.bag=slide makes one bag of each slide and keeps patients whole"
)


def contradictions(rows: list[Row], names: Mapping[str, str] | None = None, bag: str = "patient") -> list[str]:
    """Slides named twice, and patients whose rows disagree. names: our column -> the file's own. bag: `train.bag`; with
    `slide` the slides of a patient may have labels of their own."""
    wrong, names = [], names or {}
    alike = OF_PATIENTS if bag == "slide" else (*OF_BAGS, *OF_PATIENTS)
    of_bags = of_events = False
    first_slide: dict[str, Row] = {}
    first_patient: dict[str, Row] = {}
    first_event: dict[str, Row] = {}
    for row in rows:
        other = first_slide.setdefault(same(row.slide), row) if row.slide else row
        if other is not row:
            column = names.get("slide", "slide")
            wrong.append(f"row {row.number}, column {column}: {row.slide!r} stands in row {other.number} already")
        patient = first_patient.setdefault(row.patient, row)
        pairs = [(names.get(c, c), getattr(patient, c), getattr(row, c), patient) for c in alike]
        if bag == "slide":  # times may differ, where each counts from when its slide was taken
            known = row if row.event is None else first_event.setdefault(row.patient, row)
            pairs.append((names.get("event", "event"), known.event, row.event, known))
            of_events |= known.event != row.event
        else:
            pairs += [(c, a, b, patient) for (c, a), (_, b) in zip(patient.targets, row.targets, strict=True)]
            of_bags |= patient.targets != row.targets or any(getattr(patient, c) != getattr(row, c) for c in OF_BAGS)
        for column, a, b, before in pairs:
            if a != b:
                here, there = ("nothing" if v is None else repr(v) for v in (b, a))
                wrong.append(
                    f"row {row.number}, column {column}: patient {row.patient!r} has {here} here "
                    f"and {there} in row {before.number}"
                )
    return [*wrong, *([OWN_LABELS] if of_bags else []), *([OF_EVENTS] if of_events else [])]


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ, but only in case, blanks, or how a number is written: likely one and the same."""
    first: dict[str, str] = {}
    pairs = []
    for name in sorted(set(names)):
        other = first.setdefault(_folded(name), name)
        if other != name:
            pairs.append((other, name))
    return pairs


def _folded(name: str) -> str:
    plain = "".join(unicodedata.normalize("NFKC", name).casefold().split())
    try:
        return repr(float(plain))
    except ValueError:
        return plain


def same(text: str) -> str:
    """One form for what reads the same: Unicode composed (NFC), whichever system wrote it."""
    return unicodedata.normalize("NFC", text)


def counted(n: int, what: str, one: str = "", more: str = "") -> str:
    """A number of things, and what they do: `1 column is`, `2 columns are`. one, more: the verb of each."""
    return f"{n} {what}{'s' * (n != 1)}" + (f" {one if n == 1 else more}" if one else "")


def some(things: Iterable[object], most: int = 5) -> str:
    listed = [str(t) for t in things]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
