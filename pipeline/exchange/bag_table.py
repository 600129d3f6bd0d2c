"""Bags that come as a table: `pipeline import bags.csv`, and the bags of hand-written digits as a set anyone can make.

In: a CSV with one instance per row: the bag's label, the bag, features. Out: a feature store per bag and a labels.csv,
so that `train` takes them like slides. Columns are named `label`, `bag`, optionally `patient`, `split`, `fold`, `site`,
`time`, `event`, `x`, `y`, all others features; without a header: label, bag, features. Knows nothing of models.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.exchange.digits import digits
from mhim.pipeline.resume import leftovers
from mhim.pipeline.store import disk, ids, layout, seals, tables, writing

NAMED = ("label", "bag", "patient", "split", "fold", "site", "time", "event", "x", "y")
CARRIED = ("patient", "label", "time", "event", "split", "fold", "site")


@dataclass(frozen=True)
class StoredArrays:
    """One bag. features: float16 or float32 (N, D). coords: int32 (N, 2), level-0 px, x then y; tile_l0: edge there."""

    features: np.ndarray
    coords: np.ndarray
    tile_l0: float = 1.0

    @property
    def digest(self) -> str:
        """Hash of all of it: 16 hex digits."""
        edge = b"" if self.tile_l0 == 1.0 else repr(self.tile_l0).encode()  # a table of bags has no other edge
        return hashlib.sha256(self.features.tobytes() + self.coords.tobytes() + edge).hexdigest()[:16]

    @property
    def sizes(self) -> dict[str, Any]:
        """What the attributes of a store tell of it."""
        return {"dim": self.features.shape[1], "tile_l0": [self.tile_l0, self.tile_l0]}


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
    return store_bags(facts, {b: StoredArrays(arrays[b], coords[b]) for b in arrays}, work, encoder)


def store_bags(
    facts: Mapping[str, Mapping[str, str]], bags: Mapping[str, StoredArrays], work: layout.Work, encoder: str
) -> Path:
    """Write bags as features of `encoder`, and what is known of each (`CARRIED`) as labels.csv beside them.

    Bags that are there already are left as they are; other features under the same name are refused. Returns the path
    of the labels. Raises CohortError."""
    leftovers.sweep_work(work)
    labels = work.features(encoder) / "labels.csv"
    text = _labels(facts)
    new: dict[str, str] = {}
    for name, bag in bags.items():  # everything is looked at before anything is written
        digest = bag.digest
        final = work.feature_store(encoder, name)
        there = seals.look(final)
        if there is None or there.wrong:  # missing, or a copy that was cut short
            new[name] = digest
        elif there.fingerprint != digest:
            raise CohortError(f"{final} holds other features already; import under another --encoder or --work")
    if labels.exists() and labels.read_bytes() != text.encode():
        raise CohortError(f"{labels} exists and differs; import under another --encoder or --work")
    for name, digest in new.items():
        sizes = bags[name].sizes
        attrs = {
            "encoder": encoder,
            "weights_id": "imported",
            "dim": sizes["dim"],
            "mpp": 0.0,
            "tile_l0": sizes["tile_l0"],
            "fingerprint": digest,
        }
        write_bag(bags[name], work.feature_store(encoder, name), work.features(encoder), attrs)
    writing.write_atomic(labels, text)
    return labels


def write_bag(bag: StoredArrays, final: Path, root: Path, attrs: Mapping[str, Any]) -> None:
    """Write one bag as the feature store `final` below `root`. attrs: of the store, the bag's `sizes` among them."""
    with leftovers.private(root) as out, disk.naming(final):
        writer = writing.StoreWriter(out, dict(attrs))
        writer.write("features", bag.features)
        writer.write("coords", bag.coords)
        writing.sum_up(out)
        writing.remove_store(final)
        writing.commit(out, final)


def _labels(facts: Mapping[str, Mapping[str, str]]) -> str:
    """The text of labels.csv: one row per bag."""
    columns = ["slide", *[c for c in CARRIED if any(f.get(c) for f in facts.values())]]
    return tables.text_of(columns, ([bag, *(mine.get(c, "") for c in columns[1:])] for bag, mine in facts.items()))


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
