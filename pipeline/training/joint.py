"""The network of a fusion that reads bag and tables at once (`mil/fusion/coattn.py`): its training and its folder.

In: a job, the patients and their tables. Out: a folder as of a network of bags (`model.json`, `model.safetensors`,
`predictions.csv`, `history.csv`) with `joint.json` and `joint.safetensors` (the columns of each table as the training
part knows them) and `patterns.csv`: what the network says of each validation and test patient with only some of its
modalities at hand. The loop, the feeding, seeds and checkpoints are those of every network. Columns, standardisation
and weights are learnt from side `train`, the epoch is chosen on side `val`; a test patient changes none of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from mhim.configs import lookup
from mhim.configs.schema import TablesConfig
from mhim.mil import train as loop
from mhim.mil.feed import Arrays, Case, Feed, Scale
from mhim.mil.fusion import coattn, columns, joined, outcome
from mhim.mil.fusion.coattn import CoAttention
from mhim.mil.fusion.columns import Columns, ColumnsError, Options
from mhim.mil.fusion.rows import Rows
from mhim.mil.tasks import Cells, Task
from mhim.pipeline.cohort.patient_tables.table import PatientTable
from mhim.pipeline.cohort.patients import Dataset, Patient
from mhim.pipeline.store import reading, tables
from mhim.pipeline.store.layout import CARD
from mhim.pipeline.training import answers, bundle, experiment_log, fitting
from mhim.pipeline.training import fold as folds_
from mhim.pipeline.training.bundle import WEIGHTS, BundleError
from mhim.pipeline.training.card import Card
from mhim.pipeline.training.fold import Job
from mhim.pipeline.training.progress import HISTORY

SLIDE = "slide"  # the modality of the bags
JOINT, VECTORS, PATTERNS = "joint.json", "joint.safetensors", "patterns.csv"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Joint:
    """network: in eval mode. columns: table -> its columns. scale: that its features are standardised by. task: of its
    logits. mpp: µm per tile px."""

    network: CoAttention
    columns: Mapping[str, Columns]
    scale: Scale | None
    task: Task
    mpp: float

    def answers(
        self, patient: str, load: Callable[[], Arrays] | None, rows: Mapping[str, Rows]
    ) -> dict[str, np.ndarray]:
        """Scores (q,) under `joined.key(P)` for each pattern P, of two modalities or more, of those that the patient
        has. load: brings the bag, None where there is none. rows: table -> its rows, of any patients."""
        given = coattn.numbers(self.columns, rows, [patient])[0]
        case = Case(patient, (), None, load or self._no_bag, self.mpp, given)
        # a table that taught this network nothing is still a modality of the patient
        here = [SLIDE] * (load is not None) + [n for n in rows if rows[n].of([patient]).present[0]]
        (found,) = patterns(self.network, [case], [here], self.scale)
        return {joined.key(of): outcome.scores(self.task, logits[None])[0] for of, logits in found.items()}

    def _no_bag(self) -> Arrays:
        return np.zeros((0, self.network.in_dim), np.float32), np.zeros((0, 2), np.int32), 1.0


def options(config: TablesConfig, name: str) -> Options:
    """How a table's columns are fitted."""
    return Options(config.impute, config.indicators, config.select.get(name, 0), config.smallest_group)


def subsets(here: Sequence[str]) -> list[tuple[str, ...]]:
    """The patterns of two modalities or more among those at hand."""
    return [of for size in range(2, len(here) + 1) for of in combinations(here, size)]


def patterns(
    network: CoAttention, cases: Sequence[Case], here: Sequence[Sequence[str]], scale: Scale | None
) -> list[dict[tuple[str, ...], np.ndarray]]:
    """Logits float64 (n_out,) of each case for each pattern of the modalities that it has, in their order."""
    network.eval()
    feed = Feed(cases, None, next(network.parameters()).device, scale=scale)
    made = []
    for batch, own in zip(feed.batches(feed.in_turn()), here, strict=True):
        every = subsets(own)
        asked = [[SLIDE in of, *(t in of for t in network.tables)] for of in every]
        with torch.inference_mode():
            logits = network.answers(batch.bag, asked).double().cpu().numpy() if every else ()
        made.append(dict(zip(every, logits, strict=True)))
    return made


def train(
    job: Job,
    data: Dataset,
    given: Mapping[str, PatientTable],
    config: TablesConfig,
    out: Path,
    partial: Path,
    run: Path,
) -> tuple[str, ...]:
    """Train the network, going on from `partial` if an earlier run left a checkpoint there, and fill `out`.

    Returns notes. Arguments as of `fold.train_fold`."""
    train_, known, facts = job.config, data.by_id(), data.facts
    given = dict(sorted(given.items()))  # in what order tables are given is in no fingerprint
    sides = {s: [known[p] for p in getattr(job.fold, s)] for s in ("train", "val", "test")}
    learn, val = ([p for p in sides[s] if p.slides] for s in ("train", "val"))
    fitted, notes = _columns(given, learn, config)
    task = folds_.make_task(data, train_, learn)
    params = lookup.params(coattn, train_.fusion_params)
    with loop.seeded(job.seed):
        network = coattn.build(int(facts["dim"]), task.n_out, fitted, params)
    network.to(folds_.device(train_.gpu))

    def cases(of: Sequence[Patient]) -> list[Case]:
        plain = folds_.cases(of, float(facts.get("mpp") or 0.0))
        empty = np.zeros((0, int(facts["dim"])), np.float32), np.zeros((0, 2), np.int32), 1.0
        values = coattn.numbers(fitted, {n: given[n].rows for n in fitted}, [p.id for p in of])
        return [
            replace(c, numbers=v, load=c.load if c.slides else lambda: empty)
            for c, v in zip(plain, values, strict=True)
        ]

    with experiment_log.opened(train_.log, run, f"{job.cell}/{job.name}") as log:
        state = fitting.fitted(network, cases(learn), cases(val), task, train_, job.seed, partial, log)
    scale, weights = loop.scale_of(state), state["best"]["weights"]
    network.load_state_dict(weights)
    predicted = folds_.predicted(network, "val", cases(val), task, scale)
    predicted += folds_.predicted(network, "test", cases(sides["test"]), task, scale)
    named = {"model": f"fusion:{train_.fusion}", "model_params": params.model_dump(mode="json")}
    named |= {"epoch": state["best"]["epoch"] + 1, "epochs": state["epoch"] + 1}
    named |= {"standardized": state["judged"]} if "judged" in state else {}
    card = answers.card(job, data, task, predicted, named, int(facts["dim"]))
    write(out, Card.of(card, out / CARD), weights, scale, fitted)
    said = []
    for side, of in (("val", val), ("test", sides["test"])):
        here = [[SLIDE] * bool(p.slides) + _at_hand(given, p) for p in of]
        for p, found in zip(of, patterns(network, cases(of), here, scale), strict=True):
            said += [
                {
                    "side": side,
                    "patient": p.id,
                    "of": "+".join(one),
                    **{f"logit_{k}": float(v) for k, v in enumerate(x)},
                }
                for one, x in found.items()
            ]
    (out / PATTERNS).write_text(tables.of_mappings(said))
    (out / folds_.PREDICTIONS).write_text(tables.of_mappings(predicted))
    (out / HISTORY).write_text(tables.of_mappings(state["history"]))
    return notes


def scores(folder: Path, side: str) -> dict[str, dict[str, np.ndarray]]:
    """`joined.key(P)` -> patient -> the network's scores (q,) of patients of one side, val or test."""
    task, found = bundle.card_of(folder).task.value, dict[str, dict[str, np.ndarray]]()
    rows = [r for r in tables.read(folder / PATTERNS) if r["side"] == side]
    if rows:
        for row, values in zip(rows, outcome.scores(task, folds_.logits_of(rows)), strict=True):
            found.setdefault(joined.key(row["of"].split("+")), {})[row["patient"]] = values
    return found


def write(
    folder: Path, card: Card, weights: dict[str, torch.Tensor], scale: Scale | None, known: Mapping[str, Columns]
) -> None:
    """The network's folder, as `read` reads it."""
    from safetensors.numpy import save_file

    bundle.write(folder, card, weights, scale)
    plain = {"format": FORMAT, "tables": {n: c.plain() for n, c in known.items()}}
    (folder / JOINT).write_text(json.dumps(plain, indent=1) + "\n")
    vectors = {f"{n}.{k}": np.ascontiguousarray(v) for n, c in known.items() for k, v in c.arrays().items()}
    save_file(vectors, folder / VECTORS)


def copy(made: Path, to: Path) -> None:
    """What `read` needs of a trained network, to another folder."""
    to.mkdir(parents=True)
    for name in (CARD, WEIGHTS, JOINT, VECTORS):
        shutil.copyfile(made / name, to / name)


def read(folder: Path) -> Joint:
    """What `write` wrote. Raises BundleError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    whole = bundle.read(folder)
    try:
        plain, vectors = reading.read_json(folder / JOINT), load_file(folder / VECTORS)
        if plain.get("format") != FORMAT:
            raise BundleError(f"{folder / JOINT} has format {plain.get('format')}, this program reads {FORMAT}")
        known = {
            n: Columns.of(c, {k.removeprefix(f"{n}."): v for k, v in vectors.items() if k.startswith(f"{n}.")})
            for n, c in plain["tables"].items()
        }
        params = lookup.params(coattn, whole.card.model_params)
        network = coattn.build(whole.card.in_dim, whole.task.n_out, known, params)
        network.load_state_dict(whole.weights)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{folder} is damaged: {error!r}; copy the run again from where it was trained") from error
    return Joint(network.eval(), known, whole.scale, whole.task, float(whole.card.features.mpp or 0.0))


def _columns(
    given: Mapping[str, PatientTable], learn: Sequence[Patient], config: TablesConfig
) -> tuple[dict[str, Columns], tuple[str, ...]]:
    """Each table's columns as the training part knows them, and notes: a table that tells it nothing is left out."""
    found, notes = {}, []
    targets = [p.target for p in learn if p.target is not None and not isinstance(p.target, Cells)]
    for name, table in given.items():
        try:
            found[name] = columns.fit(table.rows.of([p.id for p in learn]), options(config, name), targets)
        except ColumnsError as error:
            notes.append(f"table {name} has no part in it: {error}")
    return found, tuple(notes)


def _at_hand(given: Mapping[str, PatientTable], patient: Patient) -> list[str]:
    return [n for n, t in given.items() if t.rows.of([patient.id]).present[0]]
