"""Maps tested against the model they are of, as a resumable stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mhim.configs.schema import Config
from mhim.mil import evidence as tested
from mhim.mil.tasks import Task
from mhim.pipeline.cohort.patients import Dataset
from mhim.pipeline.pictures.layers import file_name, layers
from mhim.pipeline.results import evidence
from mhim.pipeline.results.present import Present
from mhim.pipeline.resume.console import escape
from mhim.pipeline.resume.stage import Item, Made, Stage
from mhim.pipeline.store import layout, reading, writing
from mhim.pipeline.training import bundle

_EARLIER = ("evidence.steps",)  # settings that only earlier methods had
SHOWN = ("sufficiency", "necessity", "keep_area", "remove_area", "gain", "smallest_share")


@dataclass
class Probe(Stage):
    """Scores and features to `evidence/<slide id>.zarr`: what each map is worth on the patient's bag, and the smallest
    set of tiles that keeps the answer. Changed settings, another method and newer scores are followed without asking.
    """

    work: layout.Work
    config: Config
    out: Path  # folder with scores/
    data: Dataset
    models: dict[str, list[Path]]  # patient -> folders of the models that score it
    task: Task

    def __post_init__(self) -> None:
        self.name = f"evidence {self.out.name}"
        self._last: tuple[str, dict[str, Any]] = ("", {})

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.out / evidence.FOLDER

    def items(self) -> list[Item]:
        made = []
        present = Present(self.out)
        for patient in self.data.patients:
            found = [present.scores(slide) for slide in patient.slides]
            if patient.id in self.models and None not in found:
                inputs = {"scores": [one.fingerprint for one in found if one is not None]}
                made += [Item(s, self.root / f"{s}.zarr", inputs, patient.id) for s in patient.slides]
        return made

    def settings(self) -> dict[str, Any]:
        how = {f"evidence.{name}": value for name, value in tested.method().items()}
        return {"score.evidence": self.config.score.evidence, **how}

    def remake_fields(self) -> frozenset[str]:
        return frozenset({*self.settings(), *_EARLIER, "input.scores"})

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        return self.make(item, out, out)

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        patient = self.data.by_id()[item.data]
        stores = [self._scores(slide) for slide in patient.slides]
        read = [{n: np.asarray(reading.read_array(s, n)) for n in reading.array_names(s)} for s in stores]
        sizes = [len(arrays["attention"]) for arrays in read]
        if self._last[0] != patient.id:  # slides of one patient are one bag: tested once
            per_tile = [n for n in read[0] if n not in ("coords", "logits", "unlike")]
            whole = {name: np.concatenate([arrays[name] for arrays in read]) for name in per_tile}
            drawn = layers(whole, self.task, self.config.score.evidence)
            maps = {layer.name: layer.scores for layer in drawn}
            models = [bundle.read(folder) for folder in self.models[patient.id]]
            found = evidence.of_patient(patient, models, maps, self.config.train.gpu)
            self._last = (patient.id, found)
        k = patient.slides.index(item.key)
        first, last = sum(sizes[:k]), sum(sizes[: k + 1])
        arrays, told = {}, {}
        for name, one in self._last[1].items():
            chosen = np.zeros(sum(sizes), np.uint8)
            chosen[one.smallest] = 1
            called = f"needed_{file_name(name)}"
            arrays[called] = chosen[first:last]
            curves = {"k": list(one.ks), "kept": list(one.kept), "left": list(one.left)}
            told[name] = {"array": called, "numbers": one.numbers(sum(sizes)), **curves}
        scores = reading.read_attrs(self._scores(item.key))["fingerprint"]
        whose = {"patient": patient.whose} | ({"unit": "slide"} if patient.of else {})
        writer = writing.StoreWriter(out, {**whose, "scores": scores, "maps": told})
        for name, array in arrays.items():
            writer.write(name, array)
        return Made(numbers={"tiles": last - first})

    def _scores(self, slide: str) -> Path:
        return self.out / "scores" / f"{slide}.zarr"


def testing(work: layout.Work, config: Config, scored: Any) -> Probe:
    """The test of all maps of a scored stage."""
    folders = next(iter(scored.models.values()))
    task = bundle.card_of(folders[0]).task.value
    return Probe(work, config, scored.out, scored.data, scored.models, task)


def tell(stage: Probe, out: Console) -> None:
    """Write `evidence.json`, and show it: the map that says best what the model uses comes first."""
    found = evidence.summarise(stage.out)
    if not found["maps"]:
        return
    table = Table(title=f"{stage.out.name}: do the maps say what the model uses? (means over patients)")
    table.add_column("map")
    for name in SHOWN:
        table.add_column(name.replace("_", " "), justify="right")
    for name in found["best_first"]:
        one = found["maps"][name]
        table.add_row(escape(name), *(f"{one[k]['mean']:.3f}" for k in SHOWN))
    out.print(table)
