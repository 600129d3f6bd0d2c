"""A fused model in its folder, and its answers: the slide model's bundle with the tables and the weights beside it.

In: a folder that `fused.py` filled, or what is to be written there. Out: `Fusion`, which answers for patients of whom
any of the modalities is at hand. Files: `fusion.json` (plain values) and `fusion.safetensors` (vectors,
`<table>.<name>`); of a table alone `table.json` and `model.safetensors`. Nothing in them is code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs import texts
from mhim.mil import tasks
from mhim.mil.feed import Arrays
from mhim.mil.fusion import gate, joined, late, linear, outcome
from mhim.mil.fusion.gate import Gate
from mhim.mil.fusion.joined import JOINT, Joined, is_key
from mhim.mil.fusion.late import Late
from mhim.mil.fusion.rows import Rows
from mhim.mil.fusion.tabular import TableModel
from mhim.mil.tasks import Task
from mhim.pipeline.cohort.patient_tables.table import Kinds
from mhim.pipeline.store.layout import CARD
from mhim.pipeline.training import bundle, joint
from mhim.pipeline.training.bundle import WEIGHTS, BundleError
from mhim.pipeline.training.card import Card
from mhim.pipeline.training.joint import SLIDE as SLIDE
from mhim.pipeline.training.joint import Joint

FUSION, VECTORS, TABLE = "fusion.json", "fusion.safetensors", "table.json"
FUSION_FORMAT = 1
READ: Mapping[str, Callable[[Mapping[str, Any]], Late | Gate | Joined]] = {
    "late": late.from_json, "gate": gate.from_json, "coattn": joined.from_json,
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """Of one patient. logits: (q,) of the fused task; score: the same as one number. weights: modality at hand, and
    network of them -> its weight; parts: what it adds to the score, a number; without: the logits if it were not at
    hand (where another one is)."""

    logits: np.ndarray
    score: float
    weights: Mapping[str, float]
    parts: Mapping[str, float]
    without: Mapping[str, np.ndarray]

    @property
    def modalities(self) -> str:
        """What was at hand."""
        return "+".join(m for m in self.weights if m != JOINT)

    def row(self) -> dict[str, Any]:
        """As a row of `parts.csv`."""
        found: dict[str, Any] = {"modalities": self.modalities, "score": self.score}
        for name, weight in self.weights.items():
            found |= {f"weight.{name}": weight, f"part.{name}": self.parts[name]}
        for name, logits in self.without.items():
            found |= {f"without.{name}.logit_{k}": float(v) for k, v in enumerate(logits)}
        return found


@dataclass(frozen=True, eq=False)
class Fusion:
    """kind: `train.fusion`. slide_task: of the slide model's logits; task: of the fused ones. tables: name -> the table
    alone as a model. kinds: name -> how its columns were taken."""

    kind: str
    slide_task: Task
    task: Task
    tables: Mapping[str, TableModel]
    late: Late | Gate | Joined
    kinds: Mapping[str, Kinds] = field(default_factory=dict)
    joint: Joint | None = None

    def answers(
        self,
        slide: Sequence[np.ndarray | None],
        rows: Mapping[str, Rows],
        network: Sequence[Mapping[str, np.ndarray]] | None = None,
    ) -> list[Answer]:
        """One answer per patient. slide: the slide model's logits (n_out,), None where there is no bag. rows: table ->
        rows of the same patients in the same order; a table that is not given is absent. network: what `joint` answers
        of each. Raises FusionError for a patient of whom nothing is at hand."""
        given: list[dict[str, np.ndarray]] = [dict(own) for own in network or [{} for _ in slide]]
        for of, logits in zip(given, slide, strict=True):
            if logits is not None:
                of[SLIDE] = outcome.scores(self.slide_task, np.asarray(logits)[None])[0]
        for name, model in self.tables.items():
            if name in rows:
                for of, scores in zip(given, model.scores(rows[name]), strict=True):
                    if np.isfinite(scores).all():
                        of[name] = scores
        return [self._answer(of) for of in given]

    def _answer(self, given: Mapping[str, np.ndarray]) -> Answer:
        logits = self.late.score(given)
        at = int(logits.argmax())

        def number(values: np.ndarray) -> float:
            several = self.late.form == "classes" and len(values) > 2
            return float(values[at] if several else linear.one_number(values, self.late.form))

        parts = {m: number(v) for m, v in self.late.parts(given).items()}
        weights = self.late.weights(given)
        alone = {m: v for m, v in given.items() if not is_key(m)}
        network = {m: v for m, v in given.items() if is_key(m)}
        others = {
            m: self.late.score({k: v for k, v in alone.items() if k != m} | network) for m in alone if len(alone) > 1
        }  # fmt: skip
        others |= {JOINT: self.late.score(alone)} if JOINT in weights else {}
        return Answer(logits, number(logits), weights, parts, others)

    def of_bags(
        self,
        patient: str,
        logits: Sequence[np.ndarray] | None,
        given: Mapping[str, Rows],
        bags: Sequence[Callable[[], Arrays]] = (),
    ) -> tuple[list[np.ndarray], str]:
        """The fused logits of a new patient's bags, and the modalities that they rest on. logits: of the slide model,
        one per bag; None: there is no bag. given: the tables at hand, of any patients. bags: bring the bags themselves,
        which a network of bag and tables reads again."""
        rows = {n: t.of([patient]) for n, t in given.items() if n in self.tables}
        each: Sequence[np.ndarray | None] = [None] if logits is None else logits
        network: Sequence[Mapping[str, np.ndarray]] = [{} for _ in each]
        if self.joint is not None:
            network = [self.joint.answers(patient, load, rows) for load in (bags if logits is not None else [None])]
        found = [self.answers([one], rows, [own])[0] for one, own in zip(each, network, strict=True)]
        return [a.logits for a in found], found[0].modalities

    def told(self, rows: Mapping[str, Rows]) -> list[str]:
        """What is to be known of the tables of new patients."""
        lines = [f"table {n} is not given: answers rest on the others" for n in self.tables if n not in rows]
        return lines + [
            f"table {n}: {line}" for n in self.tables if n in rows for line in self.tables[n].columns.told(rows[n])
        ]


def write(folder: Path, card: Mapping[str, Any], slide: Path, fusion: Fusion) -> None:
    """A fused bundle. slide: the folder of the slide model, whose weights are copied."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(slide / WEIGHTS, folder / WEIGHTS)
    vectors = {f"{n}.{k}": np.ascontiguousarray(v) for n, t in fusion.tables.items() for k, v in t.arrays().items()}
    save_file(vectors, folder / VECTORS)
    plain = {
        "format": FUSION_FORMAT,
        "kind": fusion.kind,
        "late": fusion.late.to_json(),
        "tables": {n: t.plain() | {"kinds": _plain_kinds(fusion.kinds.get(n))} for n, t in fusion.tables.items()},
    }
    (folder / FUSION).write_text(json.dumps(plain, indent=1) + "\n")
    (folder / CARD).write_text(Card.of(dict(card), folder / CARD).text())


def read(folder: Path) -> Fusion | None:
    """The fusion in a trained fold's folder, None where it is of slides alone. Raises BundleError."""
    card = bundle.card_of(folder)
    if card.fusion is None:
        return None
    plain = _json(folder / FUSION)
    network = joint.read(folder / JOINT) if card.fusion.kind == "coattn" else None
    if plain.get("format") != FUSION_FORMAT:
        raise BundleError(f"{folder / FUSION} has format {plain.get('format')}, this program reads {FUSION_FORMAT}")
    arrays = _arrays(folder / VECTORS)
    try:
        found = {
            n: TableModel.of(t, {k.removeprefix(f"{n}."): v for k, v in arrays.items() if k.startswith(f"{n}.")})
            for n, t in plain["tables"].items()
        }
        kinds = {n: _kinds(t["kinds"]) for n, t in plain["tables"].items() if t.get("kinds")}
        weighed: Late | Gate | Joined = READ[plain["kind"]](plain["late"])
    except (KeyError, ValueError, TypeError) as error:
        raise BundleError(f"{folder / FUSION} is damaged: {error!r}; copy the run again") from error
    slide_task = tasks.from_json(card.fusion.slide_task.plain())
    return Fusion(plain["kind"], slide_task, card.task.value, found, weighed, kinds, network)


def write_table(folder: Path, card: Mapping[str, Any], model: TableModel, kinds: Kinds) -> None:
    """A table alone as a trained fold."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in model.arrays().items()}, folder / WEIGHTS)
    plain = {"format": FUSION_FORMAT, **model.plain(), "kinds": _plain_kinds(kinds)}
    (folder / TABLE).write_text(json.dumps(plain, indent=1) + "\n")
    (folder / CARD).write_text(Card.of(dict(card), folder / CARD).text())


def read_table(folder: Path) -> tuple[TableModel, Kinds]:
    """What `write_table` wrote. Raises BundleError."""
    plain = _json(folder / TABLE)
    try:
        return TableModel.of(plain, _arrays(folder / WEIGHTS)), _kinds(plain["kinds"])
    except (KeyError, ValueError, TypeError) as error:
        raise BundleError(f"{folder / TABLE} is damaged: {error!r}; train it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = texts.read_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}; copy the run again from where it was trained") from error
    if not isinstance(found, dict):
        raise BundleError(f"{path} is damaged; copy the run again from where it was trained")
    return found


def _arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}; copy the run again from where it was trained") from error


def _plain_kinds(kinds: Kinds | None) -> dict[str, list[str]] | None:
    if kinds is None:
        return None
    missing = {} if kinds.missing is None else {"missing": list(kinds.missing)}
    return {"numbers": list(kinds.numbers), "factors": list(kinds.factors), **missing}


def _kinds(plain: Mapping[str, Sequence[str]]) -> Kinds:
    missing = tuple(plain["missing"]) if "missing" in plain else None
    return Kinds(tuple(plain["numbers"]), tuple(plain["factors"]), missing)
