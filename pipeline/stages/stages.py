"""The four stages in order: Tile, Extract, Train, Score. Glue only: it hands files to extract and mil, and their
results to the store. The file to read first.

slide -> tissue -> tiles -> features -> bags -> model -> scores
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mhim.configs.schema import Config, TileConfig, fingerprint_fields, marked
from mhim.mil import splits
from mhim.mil.splits import Fold
from mhim.pipeline.cohort import provenance
from mhim.pipeline.cohort.identities import Identities, inputs_of
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.cohort.patients import Dataset, digest_of
from mhim.pipeline.resume import fingerprints
from mhim.pipeline.resume.runner import make_one, open_claims
from mhim.pipeline.resume.stage import Item, Made, Stage, State, is_made
from mhim.pipeline.store import kept_chunks, layout, seals

if TYPE_CHECKING:
    from mhim.pipeline.results.known import Recognised
    from mhim.pipeline.training.fold import Job


@dataclass
class Tile(Stage):
    """Slides to tiles: `tiles/<slide id>.zarr` and `overlays/<slide id>.jpg`."""

    work: layout.Work
    config: Config
    slides: list[SlideEntry]
    name = "tile"
    untrusted = True

    def __post_init__(self) -> None:
        self.identities = Identities(self.work.root)

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.work.tiles

    def items(self) -> list[Item]:
        frame = self.config.tile.regions_frame
        return [Item(s.id, self.work.tile_store(s.id), inputs_of(s, frame), s) for s in self.slides]

    def settings(self) -> dict[str, Any]:
        return self._settings

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Asked for by every slide, looked up once."""
        return fingerprints.tile(self.config.tile)

    def beside(self, item: Item) -> dict[str, Path]:
        found = {"overlay": self.work.overlay(item.key), "images": self._images(item.data)}
        return {name: path for name, path in found.items() if path is not None}

    def remake_fields(self) -> frozenset[str]:
        return frozenset(f"tile.{name}" for name in marked(TileConfig, "later"))

    def fields(self, item: Item) -> dict[str, Any]:
        """With the slide's content, which is read here and not in `items`: most new slides are never planned twice."""
        return super().fields(item) | {"input.content": self.identities.of(item.data.path)}

    def unrecorded(self) -> frozenset[str]:
        return frozenset({"input.content"})

    def lacks(self, item: Item) -> bool:
        """The picture of a slide that was tiled without one."""
        wanted = self.config.tile.overlay and not self.work.overlay(item.key).is_file()
        return wanted and item.data.path.is_file()

    def make_beside(self, item: Item, private: Path) -> None:
        from mhim.extract.tiles.overlay import jpeg
        from mhim.extract.tiles.tiling import drawn_again

        arrays = {name: layout.read_array(item.output, name) for name in ("mask", "coords")}
        attrs = layout.read_attrs(item.output)
        picture = drawn_again(item.data.path, self.config.tile, item.data.mpp, arrays, attrs)
        layout.write_atomic(self.work.overlay(item.key), jpeg(picture), private)

    def expect(self, items: list[Item]) -> None:
        self.identities.expect(item.data.path for item in items)

    def meaning(self, field: str) -> str:
        return "another file has taken the place of the slide that was tiled" if field == "input.content" else ""

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        from mhim.extract import UnreadableSlide
        from mhim.extract.tiles.overlay import jpeg
        from mhim.extract.tiles.tiling import tile_slide

        slide: SlideEntry = item.data
        if slide.problem:
            raise UnreadableSlide(slide.problem)
        with self.identities.unchanged(slide.path) as content:
            images = out.parent / "images" if self.config.tile.save_tiles != "none" else None
            tiled = tile_slide(slide.path, self.config.tile, slide.mpp, slide.regions, images, out.parent / "drawing")
        tiled.attrs["content"] = content
        if tiled.overlay is not None:
            (out.parent / "overlay").write_bytes(jpeg(tiled.overlay))
        self._write(out, tiled.arrays, tiled.attrs)
        return Made(tiled.empty, (tiled.reads, *tiled.notes), {"tiles": len(tiled.arrays["coords"])})

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        from mhim.extract.tiles.tiling import refilter, saved_again

        arrays = {name: layout.read_array(old, name) for name in layout.array_names(old)}
        attrs = {k: v for k, v in layout.read_attrs(old).items() if k not in ("fingerprint", "settings", "empty")}
        filtered = refilter(arrays, attrs, self.config.tile)
        slide: SlideEntry = item.data
        if (images := self._images(slide)) is not None:
            saved_again(
                slide.path, self.config.tile, slide.mpp, filtered.arrays["coords"], images, out.parent / "images"
            )
        self._write(out, filtered.arrays, filtered.attrs)
        return Made(filtered.empty, filtered.notes, {"tiles": len(filtered.arrays["coords"])})

    def _images(self, slide: SlideEntry) -> Path | None:
        return self.work.root / "tile_images" / slide.id if self.config.tile.save_tiles != "none" else None

    def _write(self, out: Path, arrays: dict[str, np.ndarray], attrs: dict[str, Any]) -> None:
        writer = layout.StoreWriter(out, attrs)
        for name, array in arrays.items():
            writer.write(name, array)


@dataclass
class Extract(Stage):
    """Tiles to features: `features/<encoder>/<slide id>.zarr`. One process feeds the model; reading runs ahead."""

    work: layout.Work
    config: Config
    slides: list[SlideEntry]
    name = "extract"
    untrusted = True

    def __post_init__(self) -> None:
        from mhim.extract.encoders import identity
        from mhim.extract.features import whole_machine
        from mhim.pipeline.stages.encoding import Encoding

        self.identities = Identities(self.work.root)
        self.identity = identity(self.config.extract)
        self.heavy = whole_machine(self.config.extract)
        self.encoding = Encoding(self.config.extract, cores=0 if self.heavy else 1)

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.work.features(self.config.extract.encoder)

    def items(self) -> list[Item]:
        items = []
        for slide in self.slides:
            found = seals.look(self.work.tile_store(slide.id))
            # not tiled: `tile` has told why, and `status` lists it as missing
            if found is not None and (found.wrong or not found.attrs.get("empty")):
                output = self.work.feature_store(self.config.extract.encoder, slide.id)
                wrong = layout.damage(self.work.tile_store(slide.id), found.wrong) if found.wrong else ""
                items.append(Item(slide.id, output, {"tiles": found.fingerprint}, slide, wrong=wrong))
        return items

    def settings(self) -> dict[str, Any]:
        return fingerprints.extract(self.config.extract, self.identity)

    def parts(self) -> list[Stage]:
        """One per GPU of `extract.gpus`: they share the list of slides."""
        gpus = self.config.extract.gpus
        if len(gpus) < 2:
            return []
        one = [self.config.extract.model_copy(update={"gpus": (gpu,)}) for gpu in gpus]
        return [replace(self, config=self.config.model_copy(update={"extract": e})) for e in one]

    def prefetch(self, item: Item) -> None:
        with suppress(Exception):  # only a hint: `make` meets the same and tells it
            self.encoding.ready().prefetch(self._job(item))

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        from mhim.extract.encoders import check_tiles

        config = self.config.extract
        tiles = layout.read_attrs(self.work.tile_store(item.key))
        self.identities.check_same(item.data.path, tiles)
        mismatch = check_tiles(self.identity, tiles["tile_px"], tiles["mpp"], config.allow_mismatch)
        extractor = self.encoding.ready()
        job = self._job(item)
        rows = layout.even_chunk(len(job.coords_l0), config.chunk_rows)
        writer = layout.StoreWriter(out, self._attrs(tiles, mismatch))
        features = writer.create(
            "features",
            (len(job.coords_l0), extractor.encoder.dim),
            config.dtype,
            config.chunk_rows,
            config.compress,
        )
        start = 0
        for first, chunk in kept_chunks.kept(partial):  # that an earlier run left when it was killed
            features[first : first + len(chunk)] = chunk
            start = first + len(chunk)
        for first, chunk in self.encoding.encode(job, start):
            features[first : first + len(chunk)] = chunk
            if len(job.coords_l0) > rows:  # a slide of one chunk has nothing worth keeping before its end
                kept_chunks.keep(partial, first, chunk)
        writer.write("coords", job.coords_l0, config.chunk_rows)
        stats = extractor.stats
        notes = (f"not read directly: {stats.note}",) if stats.note and config.reader == "auto" else ()
        return Made(notes=notes, numbers={"tiles": len(job.coords_l0), **stats.numbers()})

    def close(self) -> None:
        self.encoding.close()

    def _job(self, item: Item) -> Any:
        from mhim.extract import SlideJob

        path = self.work.tile_store(item.key)
        attrs = layout.read_attrs(path)
        coords = np.asarray(layout.read_array(path, "coords"))
        return SlideJob(item.data.path, coords, attrs["tile_px"], attrs["mpp"], tuple(attrs["slide_mpp"]))

    def _attrs(self, tiles: dict[str, Any], mismatch: str) -> dict[str, Any]:
        """What the features carry: the tiles' own facts, and the encoder's."""
        keep = ("mpp", "mpp_source", "slide_mpp", "tile_px", "tile_l0", "overlap_um", "size_l0", "bounds_l0", "content")
        attrs = {k: tiles[k] for k in keep if k in tiles} | self.encoding.ready().attrs()
        attrs[provenance.TILING] = provenance.tiling_of(tiles)
        return attrs | ({"mismatch": mismatch} if mismatch else {})


@dataclass
class Train(Stage):
    """Features to models: `runs/<name>/fold_<k>/`, one item per (grid cell, seed, fold), baselines of MHIM first."""

    work: layout.Work
    config: Config
    run: str
    data: Dataset
    folds: list[Fold]
    name = "train"

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.work.run(self.run)

    def items(self) -> list[Item]:
        from mhim.pipeline.training.plan import jobs

        every = jobs(self.config.train, self.folds)
        teachers = {job.teacher.cell + job.teacher.name: job.teacher for job in every if job.teacher}
        return [self.item(job) for job in (*teachers.values(), *every)]

    def item(self, job: Job) -> Item:
        """The item of one training. Its inputs say which patients, targets and features it reads."""
        known = self.data.by_id()
        sides = {s: [known[p] for p in getattr(job.fold, s)] for s in ("train", "val", "test")}
        inputs: dict[str, Any] = {s: digest_of(patients) for s, patients in sides.items()}
        inputs |= {"seed": job.seed, "split": job.split_hash} | fingerprints.flat("features", self.data.facts)
        if self.data.classes:  # targets are numbers: the names are facts of their own
            inputs["classes"] = list(self.data.classes)
        if job.teacher:
            inputs["teacher"] = self._mark(self.item(job.teacher))
        return Item(f"{job.cell}/{job.name}" if job.cell else job.name, self.root / job.cell / job.name, inputs, job)

    def settings(self) -> dict[str, Any]:
        return fingerprints.flat("train", fingerprint_fields(self.config.train))

    def together(self) -> dict[str, Any]:
        one = {"input.patients": digest_of(self.data.patients), "input.split": splits.digest(self.folds)}
        return self.settings() | one | {f"features.{k}": v for k, v in self.data.facts.items()}

    def begin(self) -> None:
        from mhim.pipeline.results import known
        from mhim.pipeline.training import plan

        known.describe(self.work, self.root, self.data)
        plan.describe(self.root, self.config, self.folds, self.data.made)

    def fields(self, item: Item) -> dict[str, Any]:
        """Those of the item's own settings: a cell of a grid equals the same training made alone."""
        inputs = {f"input.{k}": v for k, v in item.inputs.items()}
        return {"stage": self.name, "format": layout.FORMAT, **fingerprints.training(item.data.config), **inputs}

    def _mark(self, teacher: Item) -> str:
        """The fingerprint of a baseline: as recorded where it is made, also by version 0.1, or as it will be."""
        if is_made(self, teacher):
            return str(layout.read_attrs(teacher.output).get("fingerprint"))
        return layout.fingerprint(self.fields(teacher))

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        from mhim.pipeline.training import bundle, fold

        twin = seals.twin(self.work.runs, layout.fingerprint(self.fields(item)), item.output)
        if twin is not None:  # the same training in another run: a plain model that serves as a teacher, say
            shutil.copytree(twin, out, ignore=shutil.ignore_patterns(layout.SEAL))
            return Made(notes=(f"taken from {twin.relative_to(self.work.root)}, the same training",))
        job: Job = item.data
        teacher = bundle.read(self._made(self.item(job.teacher))) if job.teacher else None
        return Made(notes=fold.train_fold(job, self.data, teacher, out, partial, self.root))

    def _made(self, teacher: Item) -> Path:
        """The baseline's folder; if it is missing, made here or awaited. Raises StoreError if it fails."""
        with open_claims(self, self.config.cluster.lease_s) as claims:
            while (outcome := make_one(self, teacher, claims)).state is State.CLAIMED:
                time.sleep(0.5)
        if outcome.state is State.FAILED:
            raise layout.StoreError(f"its baseline failed: {outcome.message}")
        return teacher.output


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

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.out

    def items(self) -> list[Item]:
        known = self.data.by_id()
        items = []
        if self.folds:
            items.append(Item("metrics", self.out, {"models": self._seals(self.folds)}, None, "score.json"))
        for name, folders in self.models.items():
            inputs = {"features": known[name].digest, "models": self._seals(folders)}
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
        from mhim.pipeline.results import ensemble, numbers, predictions, risk_groups
        from mhim.pipeline.training import bundle, fold

        if item.seal:
            rows, task = predictions.predictions(self.folds, self.config.score)
            out.mkdir(parents=True)
            (out / fold.PREDICTIONS).write_text(fold.table(rows))
            found = numbers.summary(self.folds, rows, task, self.config.score)
            (out / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")
            if task.survival:
                risk_groups.draw(out, ensemble.ensemble(rows))
            return Made()
        patient = self.data.by_id()[item.data]
        if self._last[0] != patient.id:  # slides of one patient are one bag: scored once
            models = [bundle.read(folder) for folder in self.models[patient.id]]
            self._last = (patient.id, predictions.slide_scores(patient, models, self.config.train.gpu))
        arrays = self._last[1][item.key]
        writer = layout.StoreWriter(out, {"patient": patient.id, **self.data.facts})
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

    @staticmethod
    def _seals(folders: list[Path]) -> list[str]:
        return [str(layout.read_attrs(f).get("fingerprint")) for f in folders]
