"""Bags that come as a table: `pipeline import bags.csv`, and the bags of hand-written digits as a set anyone can make.

In: a CSV with one instance per row: the bag's label, the bag, features. Out: a feature store per bag and a labels.csv,
so that `train` takes them like slides. Columns are named `label`, `bag`, optionally `patient`, `split`, `fold`, `site`,
`time`, `event`, `x`, `y`, all others features; without a header: label, bag, features. Knows nothing of models.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from pathlib import Path

import numpy as np

from mhim.pipeline.cohort.slides import CohortError
from mhim.pipeline.exchange.digits import digits
from mhim.pipeline.resume import leftovers
from mhim.pipeline.store import disk, ids, layout, seals, writing

NAMED = ("label", "bag", "patient", "split", "fold", "site", "time", "event", "x", "y")
CARRIED = ("patient", "label", "time", "event", "split", "fold", "site")


def read(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """bag -> its named columns, bag -> features float32 (N, D), bag -> coords int32 (N, 2).

    Raises CohortError naming row and column of what is no number, or a bag with two labels."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            lines = list(csv.reader(f))
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError(f"{path} cannot be read as a CSV: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise CohortError(f"{path} is empty; expected one instance per row: label, bag, features")
    headed = "bag" in [c.strip() for c in lines[0]]
    header = [c.strip() for c in lines[0]] if headed else ["label", "bag", *(f"f{i}" for i in range(len(lines[0]) - 2))]
    if not headed and not _number(lines[0][-1]):
        raise CohortError(f"{path}: a header needs a column `bag`; it has {', '.join(header[:8])}")
    features = [i for i, name in enumerate(header) if name not in NAMED]
    named = {name: i for i, name in enumerate(header) if name in NAMED}
    if not features:
        raise CohortError(f"{path} has no feature columns, only {', '.join(header)}")
    facts: dict[str, dict[str, str]] = {}
    values: dict[str, list[list[float]]] = {}
    places: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(lines[headed:], start=1 + headed):
        if len(line) != len(header):
            raise CohortError(f"{path}, row {number}: {len(line)} columns, expected {len(header)}")
        bag = line[named["bag"]].strip()
        if bag not in facts and (why := ids.wrong(bag)):
            raise CohortError(f"{path}, row {number}, column bag: {bag!r} cannot be the name of a bag: {why}")
        mine = {name: line[i].strip() for name, i in named.items() if name in CARRIED}
        if facts.setdefault(bag, mine) != mine:
            differ = next(k for k in mine if mine[k] != facts[bag][k])
            raise CohortError(
                f"{path}, row {number}, column {differ}: bag {bag} has {mine[differ]!r} here, "
                f"{facts[bag][differ]!r} before"
            )
        try:
            values.setdefault(bag, []).append([float(line[i]) for i in features])
        except ValueError:
            bad = next(i for i in features if not _number(line[i]))
            raise CohortError(f"{path}, row {number}, column {header[bad]}: {line[bad]!r} is not a number") from None
        if not all(map(math.isfinite, values[bag][-1])):
            bad = next(i for i in features if not math.isfinite(float(line[i])))
            raise CohortError(
                f"{path}, row {number}, column {header[bad]}: {line[bad]!r} of bag {bag} is no feature; "
                "fill it, or leave the row out"
            )
        order = len(values[bag]) - 1
        placed = {"x", "y"} <= named.keys()
        place = (float(line[named["x"]]), float(line[named["y"]])) if placed else (float(order), 0.0)
        places.setdefault(bag, []).append(place)
    arrays = {bag: np.array(rows, dtype=np.float32) for bag, rows in values.items()}
    coords = {bag: np.rint(np.array(rows)).astype(np.int32) for bag, rows in places.items()}
    return facts, arrays, coords


def ensure_digits(work: layout.Work, encoder: str) -> Path | None:
    """For an encoder named `digits-K`: its bags, made if they are not there, and the path of their labels."""
    name, sign, witnesses = encoder.partition("-")
    if name != "digits" or not sign or not witnesses.isdigit():
        return None
    table = work.features(encoder) / "bags.csv"
    writing.write_atomic(table, digits(int(witnesses)))
    return import_bags(table, work, encoder)


def import_bags(path: Path, work: layout.Work, encoder: str) -> Path:
    """Write the table's bags as features of `encoder` and their labels as labels.csv beside them.

    Bags that are there already are left as they are; other features under the same name are refused. Returns the path
    of the labels. Raises CohortError."""
    facts, arrays, coords = read(path)
    leftovers.sweep_work(work)
    width = len(next(iter(arrays.values()))[0])
    labels = work.features(encoder) / "labels.csv"
    text = _labels(facts)
    new: dict[str, str] = {}
    for bag, features in arrays.items():  # everything is looked at before anything is written
        digest = hashlib.sha256(features.tobytes() + coords[bag].tobytes()).hexdigest()[:16]
        final = work.feature_store(encoder, bag)
        there = seals.look(final)
        if there is None or there.wrong:  # missing, or a copy that was cut short
            new[bag] = digest
        elif there.fingerprint != digest:
            raise CohortError(f"{final} holds other features already; import under another --encoder or --work")
    if labels.exists() and labels.read_text() != text:
        raise CohortError(f"{labels} exists and differs; import under another --encoder or --work")
    for bag, digest in new.items():
        attrs = {
            "encoder": encoder,
            "weights_id": "imported",
            "dim": width,
            "mpp": 0.0,
            "tile_l0": [1.0, 1.0],
            "fingerprint": digest,
        }
        final = work.feature_store(encoder, bag)
        with leftovers.private(work.features(encoder)) as out, disk.naming(final):
            writer = writing.StoreWriter(out, attrs)
            writer.write("features", arrays[bag])
            writer.write("coords", coords[bag])
            writing.sum_up(out)
            writing.remove_store(final)
            writing.commit(out, final)
    writing.write_atomic(labels, text)
    return labels


def _labels(facts: dict[str, dict[str, str]]) -> str:
    """The text of labels.csv: one row per bag."""
    columns = ["slide", *[c for c in CARRIED if any(f.get(c) for f in facts.values())]]
    text = io.StringIO()
    made = csv.writer(text, lineterminator="\n")
    made.writerow(columns)
    for bag, mine in facts.items():
        made.writerow([bag, *(mine.get(c, "") for c in columns[1:])])
    return text.getvalue()


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
