"""Which stored results are of the trainings that are there now: by this rule alone anything is shown.

In: the folder of a scored run, or of new slides that a run scored (`<run>/new/<name>`). Out: whether its numbers, and
each slide's scores, pictures and tested maps, are of the run's trainings as they lie there; whose are not. Everything
tells by its own seal what it was made of. A run that was trained again, with other labels, folds or slides, has other
trainings; what was made by those before stays on the disk and is shown nowhere. What tells nothing (results without
their trainings) is shown.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mhim.pipeline.cohort.labels.rows import counted, some
from mhim.pipeline.store import layout, reading, seals, writing
from mhim.pipeline.store.layout import StoreError

SCORED, MODELS = "score.json", "input.models"  # the seal of a run's results, and of which trainings these are
SCORED_BY = "scored_by.json"  # of new slides: which trainings their predictions are of
NEW = "new"  # the folder of a run in which its results of new slides are
SCORES = "scores"


@dataclass(frozen=True)
class Present:
    """What in `folder` may be shown."""

    folder: Path

    @property
    def run(self) -> Path:
        """Whose trainings the results are to be of."""
        own = self.folder.resolve()
        return own.parent.parent if own.parent.name == NEW else self.folder

    @cached_property
    def trainings(self) -> frozenset[str] | None:
        """Fingerprints of the trainings that are there now; None where there are none, or one does not tell its own."""
        each = [seals.look(folder) for folder in self._folders()]
        marks = [found.fingerprint if found is not None else "" for found in each]
        return frozenset(marks) if marks and all(marks) else None

    def _folders(self) -> list[Path]:
        if not layout.cells(self.run):
            return layout.trained(self.run)
        from mhim.pipeline.results import predictions  # reads cards, for which all of PyTorch is imported

        try:
            return predictions.folds_of(self.run)
        except StoreError:
            return []  # told by those who read the damaged one

    @cached_property
    def models(self) -> frozenset[str] | None:
        """Fingerprints of the trainings that the numbers and predictions in the folder are of; None where nobody
        tells."""
        whole = seals.look(self.folder, SCORED)
        if whole is not None:
            return _models(whole)
        if (self.folder / SCORED_BY).is_file():
            return frozenset(map(str, reading.read_json(self.folder / SCORED_BY).get("models", ())))
        if self.run == self.folder:
            return None
        # new slides of an earlier version: their predictions were made of these scores
        each = [_models(found) for s in slides(self.folder) if (found := seals.look(self._scores(s))) is not None]
        return frozenset().union(*(models for models in each if models is not None)) or None

    def check(self, only: Collection[str] | None = None) -> None:
        """Raise StoreError where the results (of them only these files) are damaged, or of trainings that are there no
        more."""
        reading.check_scored(self.folder, only)
        if self.are_gone(self.models):
            again = f"`pipeline score --name {self.run.name}`"
            again += "" if self.run == self.folder else " with these slides"
            raise StoreError(
                f"the results in {self.folder} are of trainings that are there no more ({self.run.name} was trained "
                f"again since, or some of its trainings were removed): give {again} again"
            )

    def are_gone(self, models: Collection[str] | None) -> bool:
        """Whether trainings of these fingerprints are there no more; False where it is not known."""
        return self.trainings is not None and models is not None and not self.trainings.issuperset(models)

    def scores(self, slide: str) -> seals.Found | None:
        """The slide's scores, if they are whole and of trainings that are there now."""
        return self.look(slide)[0]

    def look(self, slide: str) -> tuple[seals.Found | None, str]:
        """The slide's scores, or why none may be shown."""
        found = seals.look(self._scores(slide))
        if found is None:
            return None, "scores are not there"
        if found.wrong:
            return None, f"scores are damaged ({found.wrong})"
        if self.of_others(found):
            return None, "scores are of trainings that are there no more"
        return found, ""

    def stale(self, but: Collection[str] = ()) -> list[str]:
        """Slides whose scores are of trainings that are there no more, sorted. but: slides that are not looked at."""
        each = ((s, seals.look(self._scores(s))) for s in slides(self.folder) if s not in but)
        return sorted(s for s, found in each if found is not None and not found.wrong and self.of_others(found))

    def pictures(self, slide: str) -> tuple[Path | None, str]:
        """The folder of the slide's pictures, if they are whole and of scores that may be shown; and why those that lie
        there may not be, "" where there are none."""
        path = self.folder / "heatmaps" / slide
        found = seals.look(path)
        if found is None:
            return None, ""
        if found.wrong:
            return None, f"damaged ({found.wrong})"
        scores, why = self.look(slide)
        if scores is None:
            return None, why
        own = found.settings.get("input.scores", scores.fingerprint) == scores.fingerprint
        return (path, "") if own else (None, "drawn of other scores than there are now")

    def of_others(self, found: seals.Found) -> bool:
        """Whether a slide's scores are of trainings that are there no more."""
        own, wanted = _models(found), self.trainings if self.trainings is not None else self.models
        return wanted is not None and own is not None and not own <= wanted

    def _scores(self, slide: str) -> Path:
        return self.folder / SCORES / f"{slide}.zarr"


def told(stale: Sequence[str]) -> str:
    """A sentence on slides that are not shown, "" of none."""
    if not stale:
        return ""
    who = f"{counted(len(stale), 'slide')} ({some(stale)})"
    return f"scores of {who} are of trainings that are there no more: not shown"


def fingerprints(folders: Sequence[Path]) -> list[str]:
    """Of the trainings in `folders`. Raises StoreError."""
    return [str(reading.read_attrs(folder).get("fingerprint")) for folder in folders]


def remember(folder: Path, models: Sequence[Path]) -> None:
    """Note of new slides which trainings their predictions are of."""
    writing.write_atomic(folder / SCORED_BY, json.dumps({"models": sorted(fingerprints(models))}, indent=1) + "\n")


def slides(folder: Path, of: str = SCORES) -> Iterator[str]:
    """Slides that have scores in `folder`, packed ones too; or other stores, below the folder `of`."""
    root = folder / of
    for place, inner, files in os.walk(root):
        here = Path(place).relative_to(root)
        ends = [name for name in inner if name.endswith(".zarr")]
        inner[:] = sorted(name for name in inner if not name.endswith(".zarr") and not name.startswith("."))
        packed = [name.removesuffix(".zip") for name in files if name.endswith(".zarr.zip")]
        yield from ((here / name).as_posix().removesuffix(".zarr") for name in sorted({*ends, *packed}))


def _models(found: seals.Found) -> frozenset[str] | None:
    models = found.settings.get(MODELS)
    return frozenset(map(str, models)) if isinstance(models, list) else None
