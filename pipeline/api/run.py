"""A trained run: its held-out answers, its answers about other bags, its tile scores and pictures.

In: a run's folder and slides or arrays. Out: typed answers. The numbers come from the stage `score`, made in a private
folder that is gone afterwards; nothing in the work folder changes.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mhim.configs.errors import UserError
from mhim.configs.schema import Config
from mhim.mil.tasks import Several
from mhim.pipeline.api.bags import Bag, Features, arrays_of
from mhim.pipeline.api.slide import Slide
from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.exchange import bag_table
from mhim.pipeline.pictures.layers import save_png
from mhim.pipeline.results import ensemble, known, predictions
from mhim.pipeline.resume import runner, stage
from mhim.pipeline.stages import draw, external, runs
from mhim.pipeline.stages.score import Score
from mhim.pipeline.store import layout, reading, seals
from mhim.pipeline.training import bundle


class RunFailed(UserError):
    """Some bags could not be scored, or some trainings failed; the message names the first and why."""

    exit_code = 1


@dataclass(frozen=True)
class Prediction:
    """The answer about one patient, of one model or of several together.

    slides: of the bag. probabilities: class -> probability, after temperature scaling; empty of survival. risk: of
    survival, larger is worse; of several models the mean position among those that each held out, 0 to 1. decision: a
    class by the frozen threshold, `undecided`, or None. spread: standard deviation over the models, None of one.
    unlike: how far the features lie from the training's, above 1 farther than any it was tested on; None: not known.
    known: how the run knows the patient, "" of a stranger; such a one is scored by the models that held it out.
    row: the row of `predictions.csv` that all of it comes from. value: a predicted number, or the expected level of
    ordered ones, None of other outcomes. interval: of a number, at `score.confidence`."""

    patient: str
    slides: tuple[str, ...]
    probabilities: Mapping[str, float]
    risk: float | None
    decision: str | None
    spread: float | None
    unlike: float | None
    known: str
    row: Mapping[str, Any] = field(repr=False)
    value: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class TileScores:
    """Scores of a slide's tiles. coords: int32 (N, 2), level-0 px. attention: float32 (N,), sums to one over the
    patient. evidence: float32 (N, classes) of a model that tells it, else None. arrays: all that is stored, by name."""

    coords: npt.NDArray[np.int32]
    attention: npt.NDArray[np.float32]
    evidence: npt.NDArray[np.float32] | None
    arrays: Mapping[str, npt.NDArray[Any]] = field(repr=False)


class Run:
    """A trained run of a work folder, as `Work.run` and `Work.train` give it."""

    def __init__(self, work: layout.Work, folder: Path, config: Config) -> None:
        self._work, self._config = work, config
        self.folder = folder
        self._folders = predictions.folds_of(folder)
        bundle.permitted(self._folders)
        self._card = bundle.card_of(self._folders[0])
        self._task = self._card.task.value

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.model}, {len(self._folders)} models)"

    @property
    def name(self) -> str:
        """Name of its folder below `runs`."""
        return self.folder.name

    @property
    def model(self) -> str:
        """The MIL model's name."""
        return self._card.model

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in their order, of two the last is the positive one; empty of survival."""
        return self._task.classes

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets of a run with several, in their order; empty of a single one."""
        return tuple(self._task.names) if isinstance(self._task, Several) else ()

    @property
    def folds(self) -> tuple[Path, ...]:
        """The folders of its trained models, one per fold and seed."""
        return tuple(self._folders)

    def held_out(self, target: str | None = None) -> list[Prediction]:
        """The run's own patients, each by the models that never saw it: what `pipeline score` writes down. target:
        which of several; of the patients whose cell is known."""
        rows, task = predictions.predictions(self._folders, self._config.score, self._target(target))
        return [_prediction(row) for row in ensemble.ensemble(rows, task)]

    def predict(self, bags: Mapping[str, Features | Bag], target: str | None = None) -> dict[str, Prediction]:
        """Answers about bags at hand: {name: features (N, D)} -> {name: answer}. The features must be of the encoder
        that the run was trained on; their width is all that can be checked. A bag that the run knows, by its name or
        its features, is scored by the models that held it out, with a UserWarning. target: which of several. Raises
        CohortError, BundleError, RunFailed."""
        which, arrays = self._target(target), arrays_of(bags)
        with tempfile.TemporaryDirectory(prefix="mhim-") as private:
            features = Path(private) / "features"
            for name, bag in arrays.items():
                attrs = {**self._card.features.plain(), **bag.sizes, "fingerprint": bag.digest}
                bag_table.write_bag(bag, features / f"{name}.zarr", features, attrs)
            made = self._scored(Path(private), features, (), None)
            return {p.patient: p for p in self._answers(made, which)}

    def predict_slides(
        self, slides: Iterable[Slide | str] | None = None, target: str | None = None
    ) -> list[Prediction]:
        """Answers about slides whose features lie in the work folder (None: all of them), one per patient. Slides of
        the run's patients are grouped as in training and scored by the models that held them out. target: which of
        several."""
        which = self._target(target)
        wanted = None if slides is None else {s if isinstance(s, str) else s.id for s in slides}
        with tempfile.TemporaryDirectory(prefix="mhim-") as private:
            return self._answers(self._stored(Path(private), wanted), which)

    def scores(self, slide: Slide | str) -> TileScores:
        """Scores of a slide's tiles: those that `pipeline score` stored, else computed now."""
        arrays = self._arrays(slide if isinstance(slide, str) else slide.id)
        return TileScores(arrays["coords"], arrays["attention"], arrays.get("evidence"), arrays)

    def heatmap(self, slide: Slide | str, layer: str = "attention", path: str | Path | None = None) -> (
        npt.NDArray[np.uint8]
    ):  # fmt: skip
        """The picture of a layer on a slide, uint8 RGB (h, w, 3), the long side about 1,600 px, as `pipeline score`
        draws it; also written as PNG where `path` names a file. layer: attention, probability_<class>,
        contribution_<class>, and of MHIM hardness and masked. The slide is opened in this process. Raises StoreError
        listing the layers that there are."""
        name = slide if isinstance(slide, str) else slide.id
        arrays = self._arrays(name)
        store = self._features() / f"{name}.zarr"
        picture = draw.picture(self._work, self._config, name, store, arrays, self._task, layer, self.folder)
        if path is not None:
            save_png(Path(path), picture)
        return picture

    # ------------------------------------------------------------------------------------------ the stage `score`

    def _target(self, target: str | None) -> str:
        """Raises CohortError listing the targets, where one must be named or there is none of that name."""
        if target is None and not self.targets:
            return ""
        if target is None or target not in self.targets:
            raise CohortError(f"{self.name}: target {target!r}; there is {', '.join(self.targets) or 'a single one'}")
        return target

    def _features(self) -> Path:
        return cases.features_of(self._work, self._card.features.plain())

    def _rows(self) -> list[Row]:
        """Whose the run's own slides are; of a run of version 0.1, which kept no such table, nothing."""
        table = self.folder / known.PATIENTS
        return label_table.read_rows(table, self._config.labels, self._card.bag) if table.exists() else []

    def _stored(self, private: Path, wanted: set[str] | None) -> Score:
        features = self._features()
        rows, _ = external.with_barcodes(self._rows(), features, self._config.labels)
        return self._scored(private, features, rows, wanted)

    def _scored(self, private: Path, features: Path, rows: Iterable[Row], wanted: set[str] | None) -> Score:
        """The stage `score` of new slides in a private folder, made. wanted: slides, of whole patients; None: all."""
        made = runs.new_slides(self._config, layout.Work(private), self.folder, features, private / "out", list(rows))
        if wanted is not None:
            lacking = sorted(wanted - {s for p in made.data.patients for s in p.slides})
            if lacking:
                raise CohortError(
                    f"slide {lacking[0]} ({len(lacking)} in all) cannot be scored: it has no features in "
                    f"{features}, or every model of the run has seen it"
                )
            kept = tuple(p for p in made.data.patients if wanted & set(p.slides))
            made = replace(made, data=replace(made.data, patients=kept), models={p.id: made.models[p.id] for p in kept})
        for note in made.data.notes if wanted is None else ():
            warnings.warn(note, stacklevel=4)

        def here(of: stage.Stage, items: list[stage.Item], again: bool, redo: bool) -> Iterator[stage.Outcome]:
            return runner.run_items(of, items, self._config.cluster.lease_s, again, redo)

        report = runner.run(stage.plan(made, made.items()), here)
        if report.stopped or report.failures:
            first = report.failures[0] if report.failures else None
            raise RunFailed(report.stopped or f"{first.key}: {first.message}" if first else report.stopped)
        return made

    def _answers(self, made: Score, target: str) -> list[Prediction]:
        each, _ = external.predict(made, (), self._config.score, target)
        return [_prediction(row) for row in predictions.together(each, self._folders, target)]

    def _arrays(self, slide: str) -> dict[str, npt.NDArray[Any]]:
        with self._scores_at(slide) as at:
            return {name: np.array(reading.read_array(at, name)) for name in reading.array_names(at)}

    def _stands(self, slide: str, own: Path) -> bool:
        """Whether the stored scores of a slide are what `pipeline score` would leave as they are."""
        if seals.look(own) is None:
            return False
        made = runs.held_out(self._work, self._config, self.folder)
        return any(stage.is_made(made, item) for item in made.items() if item.key == slide and not item.wrong)

    @contextmanager
    def _scores_at(self, slide: str) -> Iterator[Path]:
        """The store of a slide's scores: the run's own where it is whole and of the models that are there now, else one
        made now."""
        own = self.folder / "scores" / f"{slide}.zarr"
        if self._stands(slide, own):
            yield own
            return
        with tempfile.TemporaryDirectory(prefix="mhim-") as private:
            yield self._stored(Path(private), {slide}).out / "scores" / f"{slide}.zarr"


def _prediction(row: Mapping[str, Any]) -> Prediction:
    """A row of `predictions.csv` as a value."""

    def number(key: str) -> float | None:
        value = row.get(key)
        return None if value in (None, "") or math.isnan(float(value)) else float(value)

    return Prediction(
        patient=str(row["patient"]),
        slides=tuple(str(row["slide"]).split(";")),
        probabilities={k.removeprefix("p_"): float(v) for k, v in row.items() if k.startswith("p_")},
        risk=number("risk"),
        decision=str(row["decision"]) if row.get("decision") not in (None, "") else None,
        spread=number("spread"),
        unlike=number("unlike"),
        known=str(row.get("known", "")),
        row=dict(row),
        value=number("predicted" if "predicted" in row else "expected_level"),
        interval=(float(row["low"]), float(row["high"])) if "low" in row else None,
    )
