"""Does a map say what the model uses? Tiles kept and tiles removed in the map's order, and what the model says then.

In: a trained model, one bag, and a number per tile (a map). Out: how the answer falls. It reads no file.

Facts from the literature. Deletion and insertion curves: Samek et al., IEEE TNNLS 2017; Petsiuk et al., BMVC 2018.
Sufficiency and comprehensiveness of a rationale: DeYoung et al., ACL 2020 (ERASER). Of whole-slide bags, by removing
patches in order: Hense et al., NeurIPS 2024 (xMIL). The difference of the two orders' areas is the symmetric relevance
gain of Bluecher et al., TMLR 2024: it does not depend on how a model takes bags that are smaller than usual.

A tile is embedded once, and what a model tells of each tile alone (`MIL.alone`) is computed once; every smaller bag is
made of these, as the model would make it. k goes from half
the bag down by 4, so that all bags of kept tiles together are smaller than the bag itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mhim.mil.models import Bag, Instances, MILModel, flatten, grids, one_bag
from mhim.mil.tasks import Task

WANTED = 0.95  # of the whole bag's answer, that the smallest set keeps
FEW = 32  # the first 1 / FEW of the tiles are few
REMOVED = (2, FEW)  # the first 1/2 and 1/32 of the tiles, in the map's order, are removed
_TO = 8  # the smallest set is found to 1 / 8 of its size, below 16 tiles exactly
VERSION = 2  # of how it is measured: one more whenever the same map of the same bag would give other numbers
FALSE_POSITIVES = (1 / 4, 1 / 2, 1, 2, 4, 8)  # tiles per slide, at which FROC takes the share of findings
Answer = Callable[[np.ndarray], float]


def method() -> dict[str, float | int | list[int]]:
    """All that decides the numbers besides the model, the bag and the map, by name, for fingerprints."""
    return {"version": VERSION, "wanted": WANTED, "few": FEW, "removed": list(REMOVED), "to": _TO}


@dataclass(frozen=True)
class Evidence:
    """What a map is worth on one bag. Numbers are shares of the whole bag's answer: 1 is all of it.

    kept: by the first k tiles alone, at each k of `ks`, from 1 up. left: without the first tiles / n of `REMOVED`.
    smallest: rows of the smallest set found that keeps `WANTED`, int64, in the map's order.
    """

    ks: tuple[int, ...]
    kept: tuple[float, ...]
    left: tuple[float, ...]
    smallest: np.ndarray

    @property
    def keep_area(self) -> float:
        """Mean of `kept` over the sizes: the area under the keep curve over log k. Larger is better."""
        return float(np.mean(np.clip(self.kept, 0, 1)))

    @property
    def remove_area(self) -> float:
        """Mean of `left`. Smaller is better."""
        return float(np.mean(np.clip(self.left, 0, 1)))

    @property
    def gain(self) -> float:
        """Area kept less area left, from -1 to 1: what orders maps."""
        return self.keep_area - self.remove_area

    def numbers(self, tiles: int) -> dict[str, float]:
        """By name, for a table. tiles: of the bag. sufficiency: what the first 1 / `FEW` of the tiles keep; necessity:
        what goes with them."""
        few = max((k for k in self.ks if k <= tiles // FEW), default=min(self.ks))  # of few tiles: the fewest
        return {
            "sufficiency": self.kept[self.ks.index(few)],
            "necessity": 1.0 - self.left[REMOVED.index(FEW)],
            "keep_area": self.keep_area,
            "remove_area": self.remove_area,
            "gain": self.gain,
            "smallest_tiles": float(len(self.smallest)),
            "smallest_share": len(self.smallest) / tiles,
        }


class Embedded:
    """One bag, embedded once. Answers for any of its tiles, as the model answers for a bag of these alone."""

    def __init__(self, model: MILModel, bag: Bag) -> None:
        self._model = model
        with torch.inference_mode():
            x, _ = flatten(bag)
            self._z: Tensor = model.embed(x)
            self._grid = grids(bag)[0]
            self._alone = model.alone(self._z)

    def __len__(self) -> int:
        return len(self._z)

    def logits(self, rows: np.ndarray) -> Tensor:
        """float64 (1, n_out) of the tiles `rows`, in the bag's order; of none, as the model has it for an empty bag."""
        at = torch.from_numpy(np.sort(rows)).to(self._z.device)
        with torch.inference_mode():
            z, grid, alone = self._z, self._grid, self._alone
            if len(at) < len(z):
                z, grid, alone = z[at], grid[at], tuple(part[at] for part in alone)
            some = Instances(z, grid, alone=alone) if len(z) else one_bag(z, grid)
            found = self._model.encode(self._model.at_test(some))
        return found.logits[None].double().cpu()


def answer_of(bags: Sequence[Embedded], tasks: Sequence[Task]) -> tuple[Answer, int | None]:
    """What share of the whole bag's answer some tiles give, mean over the models that `bags` were embedded by; and the
    class that the whole bag is called. tasks: of each model, its own: a number is read by what its training learnt.

    Of classes: the probability of that class, over that of the whole bag. Of any other outcome (class None) its number
    (`Task.risk`): 1 less its distance from the whole bag's, over that of an empty bag."""
    every = np.arange(len(bags[0]))
    task = tasks[0]
    if task.classes:
        whole = torch.cat([bag.logits(every) for bag in bags])
        p = task.probabilities(whole).mean(0)
        called = int(p.argmax())

        def probability(rows: np.ndarray) -> float:
            found = task.probabilities(torch.cat([bag.logits(rows) for bag in bags])).mean(0)
            return float(found[called] / p[called])

        return probability, called

    def mean(rows: np.ndarray) -> float:
        return float(torch.cat([own.risk(bag.logits(rows)) for own, bag in zip(tasks, bags, strict=True)]).mean())

    full, none = mean(every), mean(every[:0])

    def number(rows: np.ndarray) -> float:
        return 1.0 - abs(mean(rows) - full) / max(abs(full - none), 1e-12)

    return number, None


def of_map(scores: np.ndarray, answer: Answer) -> Evidence:
    """What the map `scores`, (N,) with N >= 1, is worth. Ties stand in the order of the bag."""
    n = len(scores)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    ks = [n] if n == 1 else [n // 2, n]
    while ks[0] >= 4:
        ks.insert(0, ks[0] // 4)
    kept = {k: answer(order[:k]) for k in ks[:-1]} | {n: 1.0}
    high = next(k for k in ks if kept[k] >= WANTED)
    low = max((k for k in ks if k < high), default=0)
    while high - low > max(1, high // _TO):
        middle = (low + high) // 2
        if answer(order[:middle]) >= WANTED:
            high = middle
        else:
            low = middle
    left = tuple(answer(order[-(-n // part) :]) for part in REMOVED)
    return Evidence(tuple(ks), tuple(kept[k] for k in ks), left, order[:high])


# -------------------------------------------------------------------------------- where the truth is known


def points(scores: np.ndarray, true: np.ndarray) -> bool | None:
    """The pointing game: whether the highest tile is a true one; None where there is none."""
    return bool(true[int(np.argmax(scores))]) if true.any() else None


def froc(maps: Sequence[np.ndarray], truths: Sequence[np.ndarray], findings: Sequence[np.ndarray]) -> float:
    """Mean share of findings that are met, at `FALSE_POSITIVES` false tiles per slide (as the CAMELYON challenge has
    it, with tiles as marks). maps: scores (n,) per slide, on one scale. truths: bool (n,). findings: int (n,), the
    number of the tile's finding from 1, 0 for none. NaN where no slide has a finding."""
    total = sum(len(np.unique(f[f > 0])) for f in findings)
    if not total:
        return float("nan")
    false = np.sort(np.concatenate([s[~t] for s, t in zip(maps, truths, strict=True)]))[::-1]
    tops = np.array([s[f == k].max() for s, f in zip(maps, findings, strict=True) for k in np.unique(f[f > 0])])
    met = []
    for rate in FALSE_POSITIVES:
        allowed = int(rate * len(maps))  # a finding counts where no more false tiles than these score as high
        cut = false[allowed] if allowed < len(false) else -np.inf
        met.append(float((tops > cut).mean()))
    return float(np.mean(met))


def found_in(true: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """int (n,): the connected group of true tiles that each belongs to, from 1; 0 for none. grid: int (n, 2), column
    and row of each tile; tiles that touch at a corner are connected."""
    from scipy import ndimage

    at = grid - grid.min(0)
    table = np.zeros((int(at[:, 1].max()) + 1, int(at[:, 0].max()) + 1), bool)
    table[at[true, 1], at[true, 0]] = True  # tiles that overlap may share a place
    labelled, _ = ndimage.label(table, structure=np.ones((3, 3)))
    numbers: np.ndarray = np.where(true, labelled[at[:, 1], at[:, 0]], 0)
    return numbers
