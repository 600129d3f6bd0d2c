"""What a training tells while it runs: `history.csv`, which grows by the epoch, and how far it has come.

In: the states of the loop and its steps as they come. Out: two files beside the checkpoint, which go with it when the
training is committed. The folder of the finished training gets its own `history.csv`, of the same bytes as the last.
"""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from mhim.configs.schema import TrainConfig
from mhim.pipeline.resume.live import Live, Teller
from mhim.pipeline.store import tables

HISTORY = "history.csv"
_AVERAGED = 5  # epochs that the seconds per epoch are the mean of
_VAL = "val_"


class Progress:
    """One training on `cases` cases. partial: its folder of checkpoints. headline: the metric that selects."""

    def __init__(self, partial: Path, config: TrainConfig, cases: int, headline: str) -> None:
        self._file = partial / HISTORY
        self._teller = Teller(partial)
        self._epochs, self._headline = config.epochs, headline
        self._steps, self._together = max(1, -(-cases // config.batch_bags)), config.accumulate
        self._took: deque[float] = deque(maxlen=_AVERAGED)
        self._begun: float | None = None
        self._state: dict[str, Any] = {}
        self._step = 0
        self._since = time.monotonic()

    def begin(self, state: dict[str, Any] | None) -> None:
        """Take up a training at `state`: the rows of epochs that were not kept are made again, and go."""
        self._state = state or {}
        within = self._state.get("within")
        self._step = int(within["step"]) if within else 0
        self._begun = len(self._rows) + self._part
        with suppress(OSError):  # as below
            self._file.unlink(missing_ok=True)
        if self._rows:
            self._write(tables.of_mappings(self._rows), "w")
        self._tell()

    def step(self) -> None:
        """One step of the optimiser is done."""
        self._step += self._together
        if self._teller.due:
            self._tell()

    def epoch(self, state: dict[str, Any]) -> None:
        """One epoch is done, `state` is the loop's after it."""
        self._state, self._step = state, 0
        now = time.monotonic()
        self._took.append(now - self._since)
        self._since = now
        rows = self._rows
        columns = list(rows[0])
        if len(rows) == 1 or not rows[-1].keys() <= set(columns):
            self._write(tables.of_mappings(rows), "w")  # also where this epoch has a column of its own
        else:
            line = tables.text_of(columns, [[rows[-1].get(c, "") for c in columns]]).split("\n", 1)[1]
            self._write(line, "a")
        self._tell()

    @property
    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._state.get("history", [])
        return rows

    @property
    def _part(self) -> float:
        return min(1.0, self._step / self._steps)

    def _write(self, text: str, mode: str) -> None:
        # of a full disk the checkpoint tells, which is flushed; this is for the eye
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, mode, encoding="utf-8") as file:
                file.write(text)

    def _tell(self) -> None:
        each = sum(self._took) / len(self._took) if self._took else None
        best = self._state.get("best")
        value = best["row"].get(_VAL + self._headline) if best else None
        self._teller.tell(
            Live(
                unit="epoch",
                done=len(self._rows),
                of=self._epochs,
                part=round(self._part, 3),
                begun=self._begun or 0.0,
                each_s=each,
                now=_numbers(self._rows[-1]) if self._rows else {},
                headline=self._headline,
                best=None
                if best is None or value is None or math.isnan(value)
                else (int(best["epoch"]) + 1, float(value)),
            )
        )


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The losses and validation numbers of an epoch. A single loss is the total: it is told once."""
    found = {k: float(v) for k, v in row.items() if k not in ("epoch", "lr") and not math.isnan(float(v))}
    parts = [k for k in found if k != "loss" and not k.startswith(_VAL)]
    if len(parts) == 1:
        del found[parts[0]]
    order = ["loss", *parts]
    return {k: found[k] for k in (*order, *found) if k in found}
