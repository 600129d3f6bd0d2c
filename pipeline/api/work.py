"""A work folder as an object: what the command line left there, and training on it.

In: the folder. Out: slides, patients, runs. Every rule is the command line's: this module only hands over.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from mhim.configs import load, plugins_named
from mhim.configs.schema import Config, TrainConfig
from mhim.pipeline.api import maps
from mhim.pipeline.api.bags import Bag, Features, arrays_of
from mhim.pipeline.api.maps import Map
from mhim.pipeline.api.run import Run, RunFailed
from mhim.pipeline.api.slide import Patient, Slide, encoders_of
from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.cohort import slides as cohort
from mhim.pipeline.cohort.labels import match
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.exchange import bag_table
from mhim.pipeline.maps import stored
from mhim.pipeline.stages import map_verb, runs, verbs
from mhim.pipeline.stages.session import Session
from mhim.pipeline.store import layout

Label: TypeAlias = str | int | tuple[float, int]  # a class, or (time, event) with event 1 = seen, 0 = censored


class Work:
    """The outputs in a folder, as the command line writes them; a folder that is not there yet is made when needed.

    allow: own plug-ins that runs of this folder need, as `--allow-plugin` names them: `my_module` or `./mine.py`.
    Raises CohortError where `folder` is a file, ConfigError for a wrong name in `allow`."""

    def __init__(self, folder: str | Path = "work", *, allow: Sequence[str] = ()) -> None:
        self._paths = layout.Work(Path(folder))
        if self.folder.exists() and not self.folder.is_dir():
            raise CohortError(f"{folder} is a file; give the folder that holds the outputs")
        for name in allow:
            plugins_named.allow(name)

    def __repr__(self) -> str:
        return f"Work({str(self.folder)!r})"

    @property
    def folder(self) -> Path:
        """The work folder."""
        return self._paths.root

    # ------------------------------------------------------------------------------------------ what is there

    @property
    def slides(self) -> list[Slide]:
        """Every slide: those of `cohort.csv` in its order, then those that only features tell of, by name."""
        entries = cohort.read_cohort(self._paths) if self._paths.cohort.exists() else []
        listed = {e.id: Slide(e.id, e.path, self._paths, e) for e in entries}
        for encoder in self.encoders:
            for name in layout.feature_stores(self._paths.features(encoder)):
                listed.setdefault(name, Slide(name, None, self._paths))
        return list(listed.values())

    def slide(self, name: str) -> Slide:
        """One slide by its id. Raises CohortError."""
        known = {s.id: s for s in self.slides}
        if name not in known:
            some = ", ".join(list(known)[:5]) + (" ..." if len(known) > 5 else "")
            raise CohortError(f"no slide {name!r} in {self.folder}; there is: {some or 'none yet'}")
        return known[name]

    @property
    def encoders(self) -> list[str]:
        """The encoders that there are features of."""
        return encoders_of(self._paths)

    def patients(
        self,
        labels: str | Path | None = None,
        encoder: str | None = None,
        *,
        bag: Literal["patient", "slide"] = "patient",
    ) -> list[Patient]:
        """The patients with features, as `train` would read them from the table `labels`; without it every slide by
        itself, without label. encoder: needed where there are features of several. bag: `train.bag`; with "slide" one
        for each slide, whose patient is `of`. Raises CohortError."""
        features = self._paths.features(self._encoder(encoder))
        config = Config(train=TrainConfig(bag=bag))
        if labels is None:
            data = cases.unlabelled(features)
        else:
            table = label_table.read_table(match.find_labels(Path(labels), self._paths), config.labels, bag=bag)
            data = cases.labelled(table.rows, features, config.train)
        by_id = {s.id: s for s in self.slides}
        made = []
        for p in data.patients:
            pair = p.target if isinstance(p.target, tuple) else None
            label = data.classes[p.target] if isinstance(p.target, int) and data.classes else None
            time, event = (pair[0], int(pair[1])) if pair else (None, None)
            of = tuple(by_id[s] for s in p.slides)
            made.append(Patient(p.id, of, label, time, event, cases.StoredBag(p.stores), p.of))
        return made

    @property
    def runs(self) -> list[str]:
        """Names of the runs."""
        folder = self._paths.runs
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    def run(self, name: str | None = None, *, settings: Mapping[str, object] | None = None) -> Run:
        """A trained run, by name (None: the only one). settings: of scoring, such as {"score.calibrate": False}. Raises
        StoreError listing the runs, LookupFailed for a model's code that `allow` does not name."""
        config = load.resolve([], [], settings)
        return Run(self._paths, runs.find(self._paths, name, config.train.model), config)

    @property
    def maps(self) -> list[str]:
        """Names of the maps of the cohort."""
        return stored.names(self._paths)

    def map(self, name: str | None = None) -> Map:
        """A map that was made, by name (None: the only one). Raises CohortError listing the maps, StoreError for a
        damaged one."""
        there = self.maps
        if name not in there and not (name is None and len(there) == 1):
            told = f"there is: {', '.join(there)}" if there else "`make_map` or `pipeline map` makes one"
            raise CohortError(f"{f'no map {name!r}' if name else 'no single map'} in {self.folder}; {told}")
        return maps.read(self._paths.maps / (name or there[0]))

    def make_map(
        self,
        labels: str | Path | None = None,
        *,
        name: str | None = None,
        run: str | None = None,
        encoder: str | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> Map:
        """Lay tiles and patients on a plane, exactly as `pipeline map` does, and return the map.

        labels: path of a table that it is coloured by. run: whose held-out answers colour it. name, run: as on the
        command line. settings: by their name, such as {"map.method": "pca"}. A finished map is not made again. Raises
        CohortError, Refused (made with other settings before), ConfigError, and RunFailed where slides had to be left
        out; what could be made of the others is `map(name)`."""
        given = {"extract.encoder": encoder or self._encoder(None), "cluster.workers": 1}
        config = load.resolve([], [], {**given, **(settings or {})})
        called = runs.named(name, self._paths.features(config.extract.encoder).name)
        if map_verb.make(Session(self._paths, config), None if labels is None else Path(labels), called, run):
            raise RunFailed(f"the map {called} lacks slides or was not made; what was printed says which and why")
        return self.map(called)

    # ------------------------------------------------------------------------------------------ training

    def train(
        self,
        bags: Mapping[str, Features | Bag] | None = None,
        labels: Mapping[str, Label] | str | Path | None = None,
        *,
        patients: Mapping[str, str] | None = None,
        model: str | None = None,
        name: str | None = None,
        encoder: str | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> Run:
        """Train a model by patient-grouped cross-validation, exactly as `pipeline train` does, and return the run.

        bags: {name: features (N, D)}, which are stored as features of `encoder` (default "own"), with `labels`
        {name: class or (time, event)} and, where several bags are one patient's, `patients` {name: patient}. Without
        `bags`: on the features in the folder, `labels` being the path of a table. model, name: as on the command line.
        settings: others by their name, such as {"train.epochs": 20}. What is finished is not trained again. Raises
        CohortError, Refused (trained with other settings before), RunFailed or ConfigError."""
        if bags is not None:
            encoder = encoder or "own"
            labels = self._store(bags, labels, patients, encoder)
        elif isinstance(labels, Mapping) or patients is not None:
            raise CohortError("labels by name, and patients, go with bags; without bags, labels is the path of a table")
        given = {"extract.encoder": encoder or self._encoder(None), "train.model": model, "cluster.workers": 1}
        config = load.resolve([], [], {**given, **(settings or {})})
        found = None if labels is None or isinstance(labels, Mapping) else Path(labels)
        if verbs.train(Session(self._paths, config), found, name):
            raise RunFailed(f"some trainings failed; {self._paths.runs}/*.summary.md say which and why")
        return self.run(runs.named(name, config.train.model), settings=settings)

    def _store(
        self,
        bags: Mapping[str, Features | Bag],
        labels: Mapping[str, Label] | str | Path | None,
        patients: Mapping[str, str] | None,
        encoder: str,
    ) -> Path:
        """The bags as features of `encoder`; the path of the table with their labels."""
        arrays = arrays_of(bags)
        if not isinstance(labels, Mapping):
            raise CohortError("bags want their labels by name: labels={name: class}, or {name: (time, event)}")
        lacking = sorted(arrays.keys() - labels.keys()) or sorted(labels.keys() - arrays.keys())
        if lacking:
            raise CohortError(f"bag {lacking[0]} ({len(lacking)} in all) stands in only one of bags and labels")
        if patients and (strangers := sorted(patients.keys() - arrays.keys(), key=str)):
            raise CohortError(f"patients names {strangers[0]!r} ({len(strangers)} in all), which is no bag")
        facts = {}
        for name in arrays:
            facts[name] = _cells(name, labels[name])
            if patients and name in patients:
                facts[name]["patient"] = str(patients[name])
        return bag_table.store_bags(facts, arrays, self._paths, encoder)

    def _encoder(self, encoder: str | None) -> str:
        there = self.encoders
        if encoder is None and len(there) != 1:
            raise CohortError(
                f"there are features of {', '.join(there)}: name one (encoder=...)"
                if there
                else f"{self.folder} holds no features; run `pipeline tile`, then `pipeline extract` first"
            )
        return encoder or there[0]


def _cells(name: str, label: Label) -> dict[str, str]:
    """A label as the cells of a table of labels. Raises CohortError for what would become a class by accident."""
    pair = label if isinstance(label, tuple) else None
    if pair is not None and len(pair) == 2 and all(isinstance(v, (numbers.Real, np.bool_)) for v in pair):
        return {"time": repr(float(pair[0])), "event": str(pair[1])}
    number = isinstance(label, (numbers.Real, np.bool_)) and label == label  # NaN is no class
    if pair is None and (number or (isinstance(label, str) and label.strip())):
        return {"label": str(label)}
    raise CohortError(
        f"bag {name}: its label is {label!r}; expected a class (text or number) or a pair (time, event). A bag without "
        "a label is left out of bags"
    )
