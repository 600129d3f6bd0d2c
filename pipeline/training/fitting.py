"""The loop of a training, going on from its checkpoint; and which forms of the model were tried before.

In: a model, its cases, a folder of checkpoints. Out: the last state of `mil.train`. Knows nothing of bundles and folds.
"""

from __future__ import annotations

import io
import json
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mhim.configs.schema import TrainConfig
from mhim.mil import train as loop
from mhim.mil.feed import Case
from mhim.mil.tasks import Task
from mhim.pipeline.store import writing
from mhim.pipeline.training.progress import Progress

CHECKPOINT, TRIED = "state.pt", "tried.json"
# A checkpoint may cost this share of the time; with MHIM's transmil student one is 60 MB.
CHECKPOINT_SHARE = 0.05


def fitted(
    model: Any,
    train_cases: list[Case],
    val_cases: list[Case],
    task: Task,
    config: TrainConfig,
    seed: int,
    partial: Path,
    log: Callable[[dict[str, Any]], None],
    name: str = CHECKPOINT,
) -> loop.State:
    """The last state of a training, which goes on from the checkpoint in `partial`, if there is one, and leaves one.

    name: of that file; of each form of a model its own, so that none ever goes on from another's."""
    file = partial / name
    saved = checkpoint(file)
    state = saved
    cost, last = 0.0, time.monotonic()
    progress = Progress(partial, config, len(train_cases), task.headline)
    progress.begin(saved)

    def due() -> bool:
        progress.step()
        wait = max(config.checkpoint_s, cost / CHECKPOINT_SHARE)
        return config.checkpoint_s > 0 and time.monotonic() - last >= wait

    try:
        for reached in loop.fit(model, train_cases, val_cases, task, config, seed, saved, due):
            state = reached
            if state["within"] is None:
                log(state["history"][-1])
                progress.epoch(state)
            began = time.monotonic()
            if state["within"] is not None or began - last >= cost / CHECKPOINT_SHARE:
                _save(state, file)
                saved, last = state, time.monotonic()
                cost = last - began
    except BaseException:
        # Interrupted, told to end, or the loss ran away: the last good state is kept.
        if state is not None and state is not saved:
            _save(state, file)
        raise
    assert state is not None
    return state


def checkpoint(file: Path) -> loop.State | None:
    """The state that an earlier run left, or None: there is none, or it is damaged, and the training starts anew."""
    try:
        state: loop.State = torch.load(file, weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        file.unlink(missing_ok=True)
        return None
    return state


def _save(state: loop.State, file: Path) -> None:
    buffer = io.BytesIO()  # torch's own writing hides why it failed
    torch.save(state, buffer)
    writing.write_atomic(file, buffer.getvalue())


def tried(partial: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """The forms of the model that were trained and not kept, in their order: what `give_up` wrote. None, where that is
    damaged: they are tried again. names: of the forms that may be given up, in order."""
    try:
        found = json.loads((partial / TRIED).read_text())
        whys = [str(one["why"]) for one in found]
        whole = [one["form"] for one in found] == list(names[: len(whys)])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return []
    return [{"form": name, "why": why} for name, why in zip(names, whys, strict=False)] if whole else []


def give_up(partial: Path, forms: Sequence[dict[str, str]], name: str) -> None:
    """Begin the next form: the checkpoint, file `name`, goes only when it stands written that the one before was not
    kept."""
    writing.write_atomic(partial / TRIED, json.dumps(list(forms)))
    (partial / name).unlink(missing_ok=True)
