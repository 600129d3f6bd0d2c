"""Experiment logs besides the CSV: TensorBoard, Weights & Biases, MLflow, each an extra that is imported by name.

In: rows of a training's history as they come. Out: the chosen service's own files or calls. No result depends on it,
and nothing is sent anywhere unless `train.log` says so. Knows nothing of models.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mhim.configs.errors import UserError

EXTRAS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
Row = dict[str, Any]
Log = Callable[[Row], None]


class LogError(UserError, RuntimeError):
    """The log that was asked for is not installed; the message says how to install it."""


def check(kind: str) -> None:
    """Raise LogError before any work if `kind` cannot be used."""
    if kind in EXTRAS:
        _load(kind)


@contextmanager
def opened(kind: str, run: Path, training: str) -> Iterator[Log]:
    """A function that takes history rows. run: the run's folder; training: the fold's name in it, and the form's where
    several are tried in turn: each begins at epoch 0, and no service takes a step twice.

    A resumed training goes on under the same name; epochs seen before are written again with the same step."""
    if kind == "csv":
        yield lambda row: None
        return
    library = _load(kind)
    if kind == "tensorboard":
        writer = library.SummaryWriter(log_dir=str(run / "tensorboard" / training))

        def add(row: Row) -> None:
            for name, value in _numbers(row).items():
                writer.add_scalar(name, value, row["epoch"])

        try:
            yield add
        finally:
            writer.close()
    elif kind == "wandb":
        known = f"{run.name}-{training}".replace("/", "-")
        session = library.init(project=run.name, name=training, id=known, resume="allow")
        try:
            yield lambda row: session.log(_numbers(row), step=row["epoch"])
        finally:
            session.finish()
    else:
        library.set_experiment(run.name)
        with library.start_run(run_name=training):
            yield lambda row: library.log_metrics(_numbers(row), step=row["epoch"])


def _numbers(row: Row) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if k != "epoch"}


def _load(kind: str) -> Any:
    try:
        return importlib.import_module(EXTRAS[kind])
    except ImportError as error:
        raise LogError(f'train.log={kind} needs the extra of that name: pip install ".[{kind}]" ({error})') from error
