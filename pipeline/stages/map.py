"""The cohort as a map, as a resumable stage: features to `maps/<name>/`, and the verb over it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import Config, fingerprint_fields
from mhim.pipeline.cohort.labels.rows import counted
from mhim.pipeline.maps import embedding, people, shares, stored
from mhim.pipeline.maps.people import Colour, People, Scored
from mhim.pipeline.maps.sample import Sample
from mhim.pipeline.maps.stored import short
from mhim.pipeline.pictures import layers, scatter
from mhim.pipeline.resume import fingerprints
from mhim.pipeline.resume.stage import Item, Made, Stage
from mhim.pipeline.store import layout, writing

SLIDE, CLUSTER, ATTENTION = "slide", "cluster", "attention"
_OF_ROWS = {"event", "time", "site"}  # what rows tell besides outcomes


@dataclass
class Map(Stage):
    """Features to `maps/<name>/`: places of tiles and patients, clusters, what they are coloured by, pictures. Newer
    features, labels and scores are followed without asking; other settings are refused."""

    work: layout.Work
    config: Config
    called: str
    drawn: Sample
    people: People
    scored: Scored | None = None
    name = "map"

    def __post_init__(self) -> None:
        self.methods = embedding.methods(self.config.map)

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.work.maps

    def items(self) -> list[Item]:
        inputs: dict[str, Any] = {"features": self.drawn.digest, "people": self.people.digest}
        inputs |= fingerprints.flat("features", self.drawn.facts)
        if self.scored is not None:
            inputs |= {"run": self.scored.name, "scores": self.scored.digest}
        return [Item(self.called, self.root / self.called, inputs)]

    def settings(self) -> dict[str, Any]:
        own = {k: v for k, v in fingerprint_fields(self.config.map).items() if k != "method"}
        how = {"methods": list(self.methods), "how": embedding.method()}
        return fingerprints.flat("map", own | how)

    def remake_fields(self) -> frozenset[str]:
        return frozenset(f"input.{name}" for name in ("features", "people", "run", "scores"))

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        return self.make(item, out, self.root / ".partial" / item.key / layout.fingerprint(self.fields(item)))

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        drawn, config = self.drawn, self.config.map
        z, variance = embedding.reduced(drawn.features, config.components)
        cluster, away = embedding.clusters(z, config)
        places = {"pca": z[:, :2] if z.shape[1] > 1 else np.column_stack([z[:, 0], np.zeros(len(z))])}
        patient_of = [self.people.patient[s] for s in drawn.slides]
        whose, means = _means(z, drawn.slide, patient_of)
        of_patients = {"pca": _plane(means)}
        notes: list[str] = []
        if "umap" in self.methods:
            for into, points, what in ((places, z, "tiles"), (of_patients, means, "patients")):
                made = _kept(partial / f"umap_{what}.npy", lambda points=points: embedding.spread_out(points, config))
                if made is None:
                    notes.append(f"no UMAP of {len(points)} {what}: it is made of {embedding.FEWEST} or more")
                else:
                    into["umap"] = made
        attention = self._attention()
        if attention is not None and self.scored is not None:
            blank = [s for k, s in enumerate(drawn.slides) if not np.isfinite(attention[drawn.slide == k]).any()]
            if held := [s for s in blank if any(s in c.values for c in self.scored.colours)]:
                names = ", ".join(held[:10]) + (", ..." if len(held) > 10 else "")
                notes.append(
                    f"no attention of {counted(len(held), 'slide')} ({names}): scores in {self.scored.name} are "
                    "not there, damaged, or of other trainings or tiles; `pipeline status` and `verify` tell which"
                )
        share = shares.by_patient(cluster, drawn.slide, patient_of, int(cluster.max()) + 1)
        colours = _apart((*self.people.colours, *(self.scored.colours if self.scored else ())))
        known = {c.name: people.of_patients(c, self.people.patient) for c in colours}
        classes = {c.name: known[c.name] for c in colours if c.kind == "classes" and c.outcome}
        for name, n in self._of_two_classes(colours, known).items():
            notes.append(
                f"{counted(n, 'patient', 'has', 'have')} slides of different {name}: counted in no class of it"
            )
        each = [patient_of[k] for k in drawn.slide.tolist()]
        chosen = shares.prototypes(cluster, away, each, share, classes, config.gallery)
        tiles = _Tiles(drawn, places, cluster, attention)
        parts = {
            "tiles": tiles.rows(),
            "slides": self._slides(patient_of, colours),
            "patients": _patients(whose, of_patients, patient_of, drawn, colours, known, share),
            "clusters": shares.table(share, classes),
            "prototypes": tiles.prototypes(chosen, each),
        }
        card = self._card(variance, places, of_patients, colours, attention is not None, len(whose))
        stored.write(out, card, parts)
        self._draw(out, tiles, of_patients, whose, colours, known)
        return Made(notes=tuple(notes), numbers={"tiles": len(z), "slides": len(drawn.slides)})

    def _of_two_classes(self, colours: Sequence[Colour], known: dict[str, dict[str, Any]]) -> dict[str, int]:
        """Outcome -> how many patients its classes part."""
        patient = self.people.patient
        told = {c.name: {patient[s] for s in c.values if s in patient} for c in colours if c.outcome}
        return {name: n for name, whose in told.items() if (n := len(whose - known[name].keys()))}

    def _attention(self) -> np.ndarray | None:
        """Place of each tile in its slide by the run's held-out attention, NaN where unknown; None without a run."""
        if self.scored is None or not self.scored.marks:
            return None
        drawn, made = self.drawn, np.full(len(self.drawn.slide), np.nan)
        for k, slide in enumerate(drawn.slides):
            own = drawn.slide == k
            made[own] = people.attention(self.scored, slide, drawn.row[own], drawn.coords[own])
        return made if np.isfinite(made).any() else None

    def _slides(self, patient_of: Sequence[str], colours: Sequence[Colour]) -> list[dict[str, Any]]:
        counts = np.bincount(self.drawn.slide, minlength=len(self.drawn.slides)).tolist()
        return [
            {"slide": s, "patient": patient_of[k], "tiles": self.drawn.tiles[k], "drawn": counts[k]}
            | {_column(c): _cell(c.values.get(s)) for c in colours}
            for k, s in enumerate(self.drawn.slides)
        ]

    def _card(
        self,
        variance: np.ndarray,
        places: dict[str, np.ndarray],
        of_patients: dict[str, np.ndarray],
        colours: Sequence[Colour],
        attention: bool,
        patients: int,
    ) -> dict[str, Any]:
        told = [{"name": c.name, "kind": c.kind, "column": _column(c), "outcome": c.outcome} for c in colours]
        return {
            "name": self.called,
            "features": self.drawn.facts,
            "slides": len(self.drawn.slides),
            "patients": patients,
            "tiles": len(self.drawn.slide),
            "methods": {"tiles": list(places), "patients": list(of_patients)},
            "variance": [short(v) for v in variance.tolist()],
            "colours": told,
            "attention": attention,
            "run": self.scored.name if self.scored else None,
            **({"models": list(self.scored.models)} if self.scored and self.scored.models is not None else {}),
            "settings": fingerprint_fields(self.config.map),
            "versions": embedding.versions(places),
        }

    def _draw(
        self,
        out: Path,
        tiles: _Tiles,
        of_patients: dict[str, np.ndarray],
        whose: Sequence[str],
        colours: Sequence[Colour],
        known: dict[str, dict[str, Any]],
    ) -> None:
        """`<tiles or patients>_<method>_<colour>.png`."""
        slide_of = self.drawn.slide.tolist()
        for method, xy in tiles.places.items():
            axes = tuple(a.replace("_", " ").upper() for a in stored.AXES[method])
            own: list[tuple[str, Any, tuple[str, str] | None]] = [
                (CLUSTER, [str(c) for c in tiles.cluster.tolist()], None),
                (SLIDE, [self.drawn.slides[k] for k in slide_of], None),
            ]
            if tiles.attention is not None:
                own.append((ATTENTION, tiles.attention, ("lowest of its slide", "highest")))
            for c in colours:
                each = [c.values.get(s) for s in self.drawn.slides]
                own.append((c.name, _values(c, [each[k] for k in slide_of]), _ends(c)))
            for called, values, ends in own:
                title = f"{len(xy)} tiles of {len(self.drawn.slides)} slides, by {called}"
                points = scatter.Points(xy, values, title, (axes[0], axes[1]), ends)
                scatter.save(out / f"tiles_{method}_{layers.file_name(called)}.png", points)
        for method, xy in of_patients.items():
            axes = tuple(a.replace("_", " ").upper() for a in stored.AXES[method])
            for c in colours:
                values = _values(c, [known[c.name].get(p) for p in whose])
                title = f"{len(xy)} patients, by {c.name}"
                points = scatter.Points(xy, values, title, (axes[0], axes[1]), _ends(c), large=True)
                scatter.save(out / f"patients_{method}_{layers.file_name(c.name)}.png", points)


@dataclass(frozen=True)
class _Tiles:
    """What is told of each drawn tile."""

    drawn: Sample
    places: dict[str, np.ndarray]
    cluster: np.ndarray
    attention: np.ndarray | None

    def rows(self) -> list[dict[str, Any]]:
        columns: dict[str, list[Any]] = {
            "slide": [self.drawn.slides[k] for k in self.drawn.slide.tolist()],
            "tile": self.drawn.row.tolist(),
            "x_l0": self.drawn.coords[:, 0].tolist(),
            "y_l0": self.drawn.coords[:, 1].tolist(),
        }
        for method, xy in self.places.items():
            for k, axis in enumerate(stored.AXES[method]):
                columns[axis] = [short(v) for v in xy[:, k].tolist()]
        columns["cluster"] = self.cluster.tolist()
        if self.attention is not None:
            columns["attention"] = [short(v) for v in self.attention.tolist()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def prototypes(self, chosen: Sequence[shares.Prototype], patient: Sequence[str]) -> list[dict[str, Any]]:
        made = []
        for one in chosen:
            x, y = self.drawn.coords[one.tile].tolist()
            made.append(
                {
                    "of": one.of,
                    "name": one.name,
                    "cluster": one.cluster,
                    "slide": self.drawn.slides[int(self.drawn.slide[one.tile])],
                    "patient": patient[one.tile],
                    "tile": int(self.drawn.row[one.tile]),
                    "x_l0": x,
                    "y_l0": y,
                    "distance": short(one.away),
                }
            )
        return made


def _means(z: np.ndarray, slide: np.ndarray, patient_of: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Patients, sorted, and the mean over each one's slides of the mean over their tiles, (patients, k)."""
    each: dict[str, list[np.ndarray]] = {}
    for k, patient in enumerate(patient_of):
        each.setdefault(patient, []).append(z[slide == k].mean(axis=0))
    whose = sorted(each)
    return whose, np.stack([np.mean(each[p], axis=0) for p in whose])


def _plane(means: np.ndarray) -> np.ndarray:
    """The first two principal components of patients, (n, 2)."""
    made = np.zeros((len(means), 2))
    if len(means) > 1:
        z, _ = embedding.reduced(means, 2)
        made[:, : z.shape[1]] = z
    return made


def _kept(path: Path, make: Any) -> np.ndarray | None:
    """An array that a command which was killed has left, or made now and left for the next."""
    if path.is_file():
        return np.asarray(np.load(path))
    made = make()
    if made is not None:
        file = io.BytesIO()
        np.save(file, made)
        writing.write_atomic(path, file.getvalue())
    return None if made is None else np.asarray(made)


def _patients(
    whose: Sequence[str],
    places: dict[str, np.ndarray],
    patient_of: Sequence[str],
    drawn: Sample,
    colours: Sequence[Colour],
    known: dict[str, dict[str, Any]],
    share: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    slides: dict[str, list[str]] = {}
    for slide, patient in zip(drawn.slides, patient_of, strict=True):
        slides.setdefault(patient, []).append(slide)
    made = []
    for k, patient in enumerate(whose):
        row: dict[str, Any] = {"patient": patient, "slides": ";".join(slides[patient])}
        for method, xy in places.items():
            row |= {axis: short(xy[k, n]) for n, axis in enumerate(stored.AXES[method])}
        row |= {_column(c): _cell(known[c.name].get(patient)) for c in colours}
        row |= {f"share_of_{n}": short(v) for n, v in enumerate(share[patient].tolist())}
        made.append(row)
    return made


def _apart(colours: Sequence[Colour]) -> tuple[Colour, ...]:
    """With names that make a column and a picture of their own: a label may be called `cluster`, or `site`."""
    taken, made = {SLIDE, CLUSTER, ATTENTION}, []
    for colour in colours:
        name, others = colour.name, taken | (_OF_ROWS if colour.outcome else set())
        while layers.file_name(name).casefold() in others:
            name = f"label {name}" if colour.outcome else f"{name} again"
        taken.add(layers.file_name(name).casefold())
        made.append(replace(colour, name=name))
    return tuple(made)


def _column(colour: Colour) -> str:
    """The column of `slides.csv` and `patients.csv`."""
    return f"by_{colour.name}"


def _cell(value: str | float | None) -> str | float | None:
    return short(value) if isinstance(value, float) else value


def _values(colour: Colour, each: Sequence[str | float | None]) -> Any:
    if colour.kind == "classes":
        return [str(v) if v is not None else "" for v in each]
    return np.array([np.nan if v is None else float(v) for v in each])


def _ends(colour: Colour) -> tuple[str, str] | None:
    return ("lowest of its training", "highest") if colour.kind == "rank" else None
