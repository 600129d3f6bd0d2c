"""Checkpoints of the MHIM-MIL authors' program -> a run of this one, one bundle per file, ready to score new slides.

In: files with weights in their naming, and what the weights do not tell: classes, encoder, mpp. Out: `runs/<name>/`
with one fold per file. Knows nothing of training. A checkpoint is read as tensors only, never unpickled as objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mhim.extract import weights
from mhim.mil import reference, tasks
from mhim.pipeline.exchange import stated_task
from mhim.pipeline.resume import leftovers
from mhim.pipeline.store import disk, layout, tables, writing
from mhim.pipeline.training import bundle
from mhim.pipeline.training import fold as training
from mhim.pipeline.training.card import Card


class ImportRefused(layout.StoreError):
    """A checkpoint cannot be taken as a model; the message says which file, what is wrong and what to do."""


def weights_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a .pt, .pth or .safetensors file. Raises ImportRefused."""
    try:
        return weights.load_state(file)
    except weights.WeightsError as error:
        raise ImportRefused(
            f"{error}. If it holds whole objects, save model.state_dict() from the program that wrote it."
        ) from error


def import_models(
    files: Sequence[Path],
    final: Path,
    classes: Sequence[str],
    edges: Sequence[str],
    features: dict[str, Any],
    activation: str = "gelu",
    task: tasks.Task | None = None,
) -> list[str]:
    """Write the run `final`, which must not exist, and say what each file was.

    classes: names in the order of the logits. edges: inner edges of the time bins, for survival instead of classes.
    task: any other one instead of both (`stated_task.read`).
    features: what the model was trained on, at least `encoder` and `mpp`. Raises ImportRefused.
    """
    if sum((bool(classes), bool(edges), task is not None)) != 1:
        raise ImportRefused(
            "give --classes (diagnosis), --edges (survival: inner edges of the time bins) or --task FILE (any other "
            "outcome, or several), one of them"
        )
    if final.exists():
        raise ImportRefused(f"{final} exists; import under another --name, or delete it")
    if task is None:
        task = tasks.Nll(_edges(edges)) if edges else tasks.Classification(tuple(classes))
    leftovers.sweep(final.parent)
    with leftovers.private(final.parent) as aside, disk.naming(final):
        told = [_one(f, aside / f"fold_{k}", k, task, features, activation) for k, f in enumerate(files)]
        if not writing.commit(aside, final):
            raise ImportRefused(f"{final} exists; import under another --name, or delete it")
    return told


def _edges(texts: Sequence[str]) -> tuple[float, ...]:
    try:
        found = tuple(float(t) for t in texts)
    except ValueError as error:
        raise ImportRefused(f"--edges: {error}; numbers separated by commas are wanted, such as 12.5,24,40") from error
    try:
        return tuple(stated_task.edges(list(found), "--edges"))
    except stated_task.NotStated as error:
        raise ImportRefused(str(error)) from error


def _wanted(task: tasks.Task) -> str:
    """How many numbers a model of the task answers with."""
    if isinstance(task, tasks.Several):
        each = ", ".join(f"{name} {one.n_out}" for name, one in task.targets)
        return f"the targets take {task.n_out} ({each})"
    if isinstance(task, tasks.Ordinal):
        return f"{len(task.classes)} levels take {task.n_out}"
    if isinstance(task, tasks.Regression | tasks.Cox):
        return f"{task.kind} takes {task.n_out}"
    return f"{task.n_out} {'classes' if task.classes else 'time bins (one more than edges)'} are given"


def _one(file: Path, out: Path, fold: int, task: tasks.Task, features: dict[str, Any], activation: str) -> str:
    state = weights_of(file)
    try:
        student = reference.student_of(state)
        said = reference.outputs(state, student)
        if said != task.n_out:
            raise ImportRefused(f"{file} answers with {said} numbers, but {_wanted(task)}")
        in_dim = reference.features(state)
        model = reference.load_reference(state, student, said, in_dim, activation)
        name, params = reference.settings(state, student, activation)
    except reference.NotReference as error:
        raise ImportRefused(f"{file}: {error}") from error
    digest = layout.sha256(file)
    card = {
        "format": layout.FORMAT,
        "model": name,
        "model_params": params,
        "in_dim": in_dim,
        "task": task.to_json(),
        "features": {**features, "dim": in_dim},
        "split": {"hash": "imported", "repeat": 0, "fold": fold, "train": 0, "val": 0, "test": 0},
        "seed": 0,
        "protocol": "imported",
        "train": {"threads": 1},
        "versions": bundle.versions(),
        "epoch": 0,
        "epochs": 0,
        "validation": {},
        "test": {},
        "imported": {"file": file.name, "sha256": digest},
    }
    bundle.write(out, Card.of(card, out / layout.CARD), model.float().state_dict(), None)
    header = {"side": "", "patient": "", "slides": ""}  # no patient was held out here, so there is no row
    (out / training.PREDICTIONS).write_text(tables.of_mappings([header]).splitlines()[0] + "\n")
    writing.seal(out, {"stage": "import-model", "sha256": digest, "activation": activation})
    return f"{file.name}: {name} with student {student}" if name == "mhim" else f"{file.name}: {student}"
