"""In which order bags reach the model, read ahead by a thread (by some for a GPU) and kept in RAM up to a limit.

In: cases, whose `load` brings arrays from wherever the caller keeps them. Out: padded batches with their targets.
Knows no file and no model. Order and sampling depend on (seed, epoch) alone, so there is no state to save: any epoch
of a training can be replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mhim.configs.errors import UserError
from mhim.mil.bags import collate, to_device
from mhim.mil.models import Bag
from mhim.mil.tasks import Target, Task

# features float16 or float32 (N, D); coords int32 (N, 2), level-0 px, x then y; tile edge in level-0 px
Arrays = tuple[np.ndarray, np.ndarray, float]
AHEAD = 2  # batches read ahead: one in hand, one in the making
GPU_READERS = 4  # threads that feed a GPU, which is done with 10,000 instances in the time one thread copies them once


class BagError(UserError, ValueError):
    """The features of a case cannot be used; the message names the case and says what to do."""


@dataclass(frozen=True)
class Case:
    """One bag: a patient with its slides.

    target: as `mil.tasks` reads it; None when unknown. load: brings the bag's arrays; slides of a patient come
    one after the other. mpp: µm per tile px. numbers: float32 (V,), what else is known of the patient (see `Bag`). of:
    the patient, where the bag is one of its slides and `patient` that slide's name (train.bag=slide).
    """

    patient: str
    slides: tuple[str, ...]
    target: Target | None
    load: Callable[[], Arrays]
    mpp: float = 0.5
    numbers: np.ndarray | None = None
    of: str = ""


@dataclass(frozen=True)
class Batch:
    """Bags packed for one step. target: as `Task.target` gives it, or None when a case has none. ready: on a GPU, when
    the copies queued for them are done."""

    cases: tuple[Case, ...]
    bag: Bag
    target: Tensor | None
    ready: torch.cuda.Event | None = None


Scale = tuple[np.ndarray, np.ndarray]  # mean and sd, float32 (D,) each


class Feed:
    """Batches of cases. cache_bytes: most memory for bags kept between epochs. scale: standardises the features."""

    def __init__(
        self,
        cases: Sequence[Case],
        task: Task | None,
        device: torch.device,
        cache_bytes: float = 0.0,
        scale: Scale | None = None,
        max_tiles: int = 0,
    ) -> None:
        self.cases = list(cases)
        self.task = task
        self.device = device
        self.scale = scale
        self.max_tiles = max_tiles
        # a GPU receives the next bag while it computes on this one: copies have a stream of their own
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._room = cache_bytes
        self._lock = threading.Lock()
        self._kept: dict[int, Arrays] = {}
        self._width: int | None = None
        self._scale: tuple[Scale, tuple[Tensor, Tensor]] | None = None

    def load(self, index: int) -> Arrays:
        """The checked arrays of one case. Raises BagError for NaN, infinite or missing features."""
        if index in self._kept:
            return self._kept[index]
        case = self.cases[index]
        features, coords, tile_l0 = case.load()
        who = f"patient {case.patient} (slides {', '.join(case.slides)})"
        if features.ndim != 2 or len(features) != len(coords):
            raise BagError(f"{who}: features {features.shape} and coords {coords.shape} do not fit; extract again")
        if self._width is None:
            self._width = features.shape[1]
        if features.shape[1] != self._width:
            raise BagError(
                f"{who}: features are {features.shape[1]} wide, others {self._width}: "
                "they come from different encoders; extract all slides with one"
            )
        if not finite(features):
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise BagError(
                f"{who}: features of tile {row} hold NaN or infinity; delete this slide's features and "
                "extract again (extract.dtype=float32 if they overflow float16)"
            )
        arrays = (features, coords, tile_l0)
        size = self._taken(features) + self._taken(coords)
        with self._lock:
            kept = size <= self._room
            self._room -= size if kept else 0
        if kept:  # a mapped file counts only once its pages are in RAM of their own
            arrays = (self._own(features), self._own(coords), tile_l0)
            self._kept[index] = arrays
        return arrays

    def _taken(self, array: np.ndarray) -> int:
        """Bytes that a copy of the array takes: pinned memory is given in powers of two."""
        return array.nbytes if self._stream is None else 1 << max(array.nbytes - 1, 0).bit_length()

    def _own(self, array: np.ndarray) -> np.ndarray:
        """A copy in RAM, which a GPU can read without another."""
        if self._stream is None:
            return np.array(array)
        copied = torch.from_numpy(np.array(array))
        return copied.pin_memory().numpy() if copied.numel() else copied.numpy()

    def batch(self, indices: Sequence[int], key: Sequence[int] | None = None) -> Batch:
        """The cases of these indices, padded. key: seeds the random cap on tiles; None takes every tile."""
        return self._handed_over(self._made(indices, key))

    def _made(self, indices: Sequence[int], key: Sequence[int] | None) -> Batch:
        """The batch; on a GPU its copies are only queued, see `_handed_over`."""
        if self._stream is None:
            return self._packed(indices, key)
        with torch.cuda.stream(self._stream):
            return replace(self._packed(indices, key), ready=self._stream.record_event())

    def _packed(self, indices: Sequence[int], key: Sequence[int] | None) -> Batch:
        """The arrays of the cases, capped, as one batch on the device."""
        bags: list[Arrays] = []
        for position, index in enumerate(indices):
            features, coords, tile_l0 = self.load(index)
            if key is not None and 0 < self.max_tiles < len(features):
                rng = np.random.default_rng([*key, position])
                # sorted, because order carries meaning for models that use it
                chosen = np.sort(rng.choice(len(features), self.max_tiles, replace=False))
                features, coords = features[chosen], coords[chosen]
            bags.append((features, coords, tile_l0))
        cases = tuple(self.cases[i] for i in indices)
        values = [c.target for c in cases if c.target is not None]
        target = None
        if self.task is not None and len(values) == len(cases):
            target = to_device(self.task.target(values), self.device)
        bag = collate(bags, cases[0].mpp, self.device, self._scale_there())
        if cases[0].numbers is not None:
            numbers = np.stack([c.numbers for c in cases if c.numbers is not None])
            bag = replace(bag, numbers=to_device(torch.from_numpy(numbers), self.device))
        return Batch(cases, bag, target)

    def _scale_there(self) -> tuple[Tensor, Tensor] | None:
        """Mean and sd on the device."""
        if self.scale is None:
            return None
        if self._scale is None or self._scale[0] is not self.scale:
            mean, sd = (to_device(torch.from_numpy(v), self.device) for v in self.scale)
            self._scale = self.scale, (mean, sd)
        return self._scale[1]

    def _handed_over(self, batch: Batch) -> Batch:
        """The batch, ready for the stream in use: that waits for the copies, the host does not."""
        if batch.ready is not None:
            using = torch.cuda.current_stream(self.device)
            using.wait_event(batch.ready)
            bag = batch.bag
            for tensor in (bag.features, bag.mask, bag.coords, bag.tile_l0, bag.numbers, batch.target):
                if tensor is not None:  # its memory is not given away before this stream is done with it
                    tensor.record_stream(using)
        return batch

    def batches(
        self, order: Sequence[Sequence[int]], key: Sequence[int] | None = None, first: int = 0
    ) -> Iterator[Batch]:
        """The batches of `order` from number `first` on, each made by a thread while the one before is in use.

        Once all bags are in RAM there is nothing to wait for, and handing over costs more than it saves."""
        if len(self._kept) == len(self.cases):
            for n in range(first, len(order)):
                yield self.batch(order[n], None if key is None else [*key, n])
            return
        readers, reach = (1, AHEAD) if self._stream is None else (GPU_READERS, GPU_READERS + 1)
        with ThreadPoolExecutor(readers) as pool:
            waiting = [
                pool.submit(self._made, order[n], None if key is None else [*key, n])
                for n in range(first, min(first + reach, len(order)))
            ]
            for n in range(first, len(order)):
                made = waiting.pop(0).result()
                ahead = n + reach
                if ahead < len(order):
                    waiting.append(pool.submit(self._made, order[ahead], None if key is None else [*key, ahead]))
                yield self._handed_over(made)

    def in_turn(self) -> list[list[int]]:
        """The order of scoring: one bag at a time, as given, so that no padding is computed on."""
        return [[i] for i in range(len(self.cases))]


def finite(features: np.ndarray) -> bool:
    """Whether no number is NaN or infinite. Of float16 the exponents' bits are looked at: numpy's own test takes ten
    times as long, 14 ms for 10,000 x 1024."""
    if features.dtype != np.float16:
        return bool(np.isfinite(features).all())
    bits = features.view(np.uint16)
    return all(int((bits[i : i + 256] & 0x7FFF).max(initial=0)) < 0x7C00 for i in range(0, len(bits), 256))


def shuffled(cases: Sequence[Case], batch_bags: int, balanced: Task | None, seed: int, epoch: int) -> list[list[int]]:
    """The order of one epoch: every case once; or, balanced by the classes of this task (see `Task.stratum`), as many
    draws with every class equally likely.

    Raises BagError when balanced sampling is asked for cases without a class, TaskError where the task has none.
    """
    rng = np.random.default_rng([seed, epoch])
    if balanced is not None:
        nameless = [c.patient for c in cases if c.target is None]
        if nameless:
            raise BagError(f"patient {nameless[0]} has no label: balanced sampling needs one")
        labels = [balanced.stratum(c.target) for c in cases if c.target is not None]
        groups = [np.flatnonzero(np.array(labels) == v) for v in sorted(set(labels))]
        # Classes in turn, each in its own shuffled order, starting again when used up.
        each = -(-len(cases) // len(groups))
        drawn = [np.concatenate([rng.permutation(g) for _ in range(-(-each // len(g)))])[:each] for g in groups]
        order = rng.permutation(np.concatenate(drawn))[: len(cases)]
    else:
        order = rng.permutation(len(cases))
    return [[int(i) for i in order[k : k + batch_bags]] for k in range(0, len(order), batch_bags)]


def moments(feed: Feed) -> Scale:
    """Mean and sd of every feature over all tiles of all cases (of a training part), float32 (D,).

    A constant feature gets sd 1. Sums are float64 around the first bag's mean, so that large offsets lose no digits.
    """
    n, shift, total, square = 0, None, 0.0, 0.0
    for index in range(len(feed.cases)):
        features = feed.load(index)[0].astype(np.float64)
        if not len(features):
            continue
        shift = features.mean(axis=0) if shift is None else shift
        total = total + (features - shift).sum(axis=0)
        square = square + ((features - shift) ** 2).sum(axis=0)
        n += len(features)
    if shift is None:
        raise BagError("no training case has a tile: nothing to learn from")
    mean = np.asarray(total) / n
    sd = np.sqrt(np.maximum(np.asarray(square) / n - mean**2, 0.0))
    return (shift + mean).astype(np.float32), np.where(sd > 1e-6, sd, 1.0).astype(np.float32)
