"""Models to numbers and tile scores, as a resumable stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhim.configs.schema import Config, fingerprint_fields
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.cohort.patients import Dataset
from mhim.pipeline.results.present import MODELS
from mhim.pipeline.results.present import fingerprints as fingerprints_of
from mhim.pipeline.resume import fingerprints
from mhim.pipeline.resume.stage import Item, Made, Stage
from mhim.pipeline.store import layout, seals, tables, writing

if TYPE_CHECKING:
    from mhim.pipeline.results.known import Recognised


@dataclass
class Score(Stage):
    """Models to numbers and pictures: `scores/<slide id>.zarr` and `heatmaps/` per slide, `metrics.json` per cohort.

    Of a run, every patient is scored by the folds that held it out; patients of other features by all folds.
    """

    work: layout.Work
    config: Config
    out: Path  # the run's folder, or that of the new slides
    data: Dataset
    models: dict[str, list[Path]]  # patient -> folders of the models that score it
    folds: list[Path]  # trainings that metrics.json is made of; empty for new slides
    known: dict[str, Recognised] = field(default_factory=dict)  # of new slides: those that the run knows
    tables: Mapping[str, Rows] = field(default_factory=dict)  # of new patients, for a fused run
    name = "score"

    def known_as(self, bag: str) -> str:
        """What the column `known` of the predictions says of a patient at hand; "" of a stranger."""
        one = self.known.get(bag)
        if one is None:
            return ""
        how = "counted as new" if self.config.score.allow_known else "scored by the trainings that held it out"
        return f"{', '.join(one.patients)} of the run ({one.why}), {how}"

    def __post_init__(self) -> None:
        self._last: tuple[str, dict[str, dict[str, np.ndarray]]] = ("", {})
        self._marks: dict[tuple[Path, ...], list[str]] = {}  # of models, which thousands of patients share

    def made(self, bag: str, slide: str) -> Path | None:
        """A slide's scores, if they are whole and of the models that score its bag now: where scoring it again failed,
        those of earlier models may lie there."""
        path, folders = self.out / "scores" / f"{slide}.zarr", tuple(self.models[bag])
        found = seals.look(path)
        if found is None or found.wrong:
            return None
        if folders not in self._marks:
            self._marks[folders] = fingerprints_of(folders)
        return path if found.settings.get(MODELS, self._marks[folders]) == self._marks[folders] else None

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.out

    def items(self) -> list[Item]:
        known = self.data.by_id()
        items = []
        if self.folds:
            items.append(Item("metrics", self.out, {"models": fingerprints_of(self.folds)}, None, "score.json"))
        for name, folders in self.models.items():
            inputs = {"features": known[name].digest, "models": fingerprints_of(folders)}
            wrong = known[name].wrong  # damaged features
            items += [Item(s, self.out / "scores" / f"{s}.zarr", inputs, name, wrong=wrong) for s in known[name].slides]
        return items

    def settings(self) -> dict[str, Any]:
        return fingerprints.flat("score", fingerprint_fields(self.config.score))

    def fields(self, item: Item) -> dict[str, Any]:
        """Settings of the numbers do not concern a slide's scores, and those of pictures concern no output here."""
        numbers = {"bootstrap", "confidence", "calibrate", "sensitivity", "specificity", "abstain"}
        settings = {k: v for k, v in self.settings().items() if item.seal and k.removeprefix("score.") in numbers}
        inputs = {f"input.{k}": v for k, v in item.inputs.items()}
        if item.seal:
            inputs["input.numbers"] = layout.NUMBERS
        return {"stage": self.name, "format": layout.FORMAT, **settings, **inputs}

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        from mhim.pipeline.pictures import kinds, modalities
        from mhim.pipeline.results import ensemble, fused, numbers, predictions, several, views
        from mhim.pipeline.results.metrics_file import METRICS
        from mhim.pipeline.training import bundle, fold

        if item.seal:
            out.mkdir(parents=True)
            if bundle.card_of(self.folds[0]).task.kind == "several":
                for name, (own, task) in several.write(out, self.folds, self.config.score).items():
                    kinds.of(task).files(views.View(out, name).folder, ensemble.ensemble(own, task))
                return Made()
            rows, task = predictions.predictions(self.folds, self.config.score)
            (out / fold.PREDICTIONS).write_text(tables.of_mappings(rows))
            found = numbers.summary(self.folds, rows, task, self.config.score)
            (out / METRICS).write_text(found.text())
            kinds.of(task).files(out, ensemble.ensemble(rows, task))
            if fused.is_fused(self.folds):
                alone = fused.alone(self.out, self.folds, self.config.score)
                told = fused.summary(self.folds, rows, alone, task, self.config.score)
                (out / fused.FILE).write_text(fused.text(told))
                modalities.draw(out / modalities.FOLDER, told, fused.shares(self.folds), rows, alone, task)
            return Made()
        patient = self.data.by_id()[item.data]
        if self._last[0] != patient.id:  # slides of one patient are one bag: scored once
            models = [bundle.read(folder) for folder in self.models[patient.id]]
            self._last = (patient.id, predictions.slide_scores(patient, models, self.config.train.gpu))
        arrays = self._last[1][item.key]
        writer = writing.StoreWriter(out, {"patient": patient.whose, **self.data.facts})
        for name, array in arrays.items():
            writer.write(name, array)
        strange = predictions.strangeness(arrays["unlike"]) > 1
        return Made(notes=(predictions.UNLIKE,) if strange else (), numbers={"tiles": len(arrays["attention"])})

    def remake_fields(self) -> frozenset[str]:
        """Newer folds of the same run, such as one that failed before, and a newer way to count: its results follow
        without a refusal. Those of new slides also follow what becomes known of whose slides they are."""
        return frozenset({"input.models", "input.numbers"} | (set() if self.folds else {"input.features"}))

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        return self.make(item, out, out)
