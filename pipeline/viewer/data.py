"""What the viewer may show: the slides of one work folder, their tiles, and the scores of its runs, by number.

In: a work folder, read once at the start. Out: JSON values, JPEG tiles, PNG layers. Slides, runs and layers are asked
for by their number in lists made here: no name or path that comes from outside is ever opened. It knows no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np

from mhim.extract.images import encoded
from mhim.mil import heatmap
from mhim.mil.heatmap import Frame
from mhim.pipeline.cohort import slides as cohort
from mhim.pipeline.pictures import parts
from mhim.pipeline.pictures.kinds.kind import Layer
from mhim.pipeline.results import measures, present, truth
from mhim.pipeline.results.measures.measure import Row
from mhim.pipeline.store import layout, reading, seals
from mhim.pipeline.store.attributes import Geometry, MaskPlace
from mhim.pipeline.viewer import clusters, colours, drawn, numbers, runs, tile_layers, verdict
from mhim.pipeline.viewer.maps import Maps
from mhim.pipeline.viewer.pyramid import TILE_PX
from mhim.pipeline.viewer.runs import ShownRun
from mhim.pipeline.viewer.slides import Question, Slides, What

TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)  # positions on the colour bar whose scores are told
Scale = Literal["percentile", "raw"]


@dataclass(frozen=True)
class Shown:
    """One slide of the cohort. tiles: attributes of its tile store, None if it could not be tiled or they are damaged,
    which `why` tells. regions: the file of drawn regions with which it was tiled."""

    id: str
    path: Path
    tiles: dict[str, Any] | None
    why: str = ""
    regions: Path | None = None

    @property
    def geometry(self) -> Geometry:
        """Where its tiles lie. Raises StoreError, also where there are none."""
        return Geometry.of(self.tiles or {}, self.id)


class Unknown(LookupError):
    """There is no slide, run or layer of that number."""


class Gallery:
    """Everything the viewer can show. Safe to ask from several threads; `read.close` at the end.

    read: the processes in which the slides are opened, never in this one."""

    def __init__(self, work: layout.Work) -> None:
        self.work = work
        self.slides = [_shown(s.id, s.path, work.tile_store(s.id), s.regions) for s in cohort.read_cohort(work)]
        folders = sorted(p for p in work.runs.iterdir() if p.is_dir()) if work.runs.is_dir() else []
        self.left_out: list[str] = [s.why for s in self.slides if s.why]  # one line for each damaged slide or run
        self.runs: list[ShownRun] = []
        for folder, find in [*((f, runs.of_run) for f in folders), (work.root, runs.of_new_slides)]:
            try:
                found = find(folder)
                stale = present.told(found[0].present.stale(found[0].rows)) if found else ""
            except layout.StoreError as error:  # which says what to do
                self.left_out.append(f"the run in {folder} is not shown: {error}")
                continue
            except parts.DAMAGED as error:
                self.left_out.append(f"the run in {folder} cannot be read ({parts.reason(error)}); score it again")
                continue
            self.runs += found
            self.left_out += [f"{one.name}: {one.note}" for one in found if one.note]
            self.left_out += [f"{folder.name}: {stale}"] if stale else []
        self.read = Slides()
        self.maps = Maps(work)
        self._palettes = {name: colours.stops(name) for name in get_args(heatmap.Palette)}
        self.layer_png = lru_cache(maxsize=64)(self._layer_png)
        self.clusters = lru_cache(maxsize=64)(self._clusters)
        self._layers = lru_cache(maxsize=8)(self._read_layers)
        self._pointing = lru_cache(maxsize=64)(lambda run: truth.read(self.runs[run].folder).get("maps", {}))
        self.thumbnail = lru_cache(maxsize=512)(self._thumbnail)

    def index(self) -> dict[str, Any]:
        """All slides and runs, for the list."""
        slides = []
        for s in self.slides:
            known = [{"run": k, **_told(r.rows[s.id], r)} for k, r in enumerate(self.runs) if s.id in r.rows]
            classes = [p for p in known if self.runs[p["run"]].task.classes]  # a number of another run is no class
            labels = {p["label"] for p in classes or known if p["label"]}
            slides.append(
                {
                    "id": s.id,
                    "readable": s.tiles is not None,
                    "predictions": known,
                    "patient": known[0]["patient"] if known else "",
                    "label": ", ".join(sorted(labels)),
                    "why": s.why or str((s.tiles or {}).get("empty") or ""),
                }
            )
        runs = [{"name": r.name, "classes": list(r.task.classes)} for r in self.runs]
        marks = [(s.id, (s.tiles or {}).get("fingerprint")) for s in self.slides]
        marks += [(r.name, r.seal) for r in self.runs]
        version = layout.fingerprint({"shown": marks})  # in every address, so that no browser shows an older slide
        return {
            "work": self.work.root.resolve().name,
            "slides": slides,
            "runs": runs,
            "version": version,
            "palettes": self._palettes,
            "even": heatmap.EVEN[0],
            "diverging": heatmap.DIVERGING,
            "maps": self.maps.names,
        }

    def map(self, number: int) -> dict[str, Any]:
        """What `Maps.about` tells of a map."""
        self._demand_map(number)
        return self.maps.about(number, {s.id: k for k, s in enumerate(self.slides) if s.tiles is not None})

    def points(self, number: int) -> bytes:
        """The tiles of a map, as `Maps.points`."""
        self._demand_map(number)
        return self.maps.points(number)

    def _demand_map(self, number: int) -> None:
        if number >= len(self.maps.names):
            raise Unknown(f"no map {number}")

    def about(self, number: int) -> dict[str, Any]:
        """Geometry of a slide, how many tiles it has, and the names of each run's layers. All but width, height and mpp
        is in level-0 px, which `stretch` (x, y) turns into px of the finest picture; `why` a run has no layers."""
        shown = self._shown(number)
        (w, h), mpp, stretch, _ = self._ask(number, "geometry")
        place = self.layer_place(number)
        runs = []
        for k in range(len(self.runs)):
            found, why = self._layers_or_why(k, number)
            told = [{"name": x.name, "signed": x.signed, "means": x.means if x.share else ""} for x in found]
            known = any(x.name == tile_layers.TRUTH for x in found)
            runs.append({"run": k, "layers": told, "truth": known, "why": why})
        return {
            "id": shown.id,
            "width": w,
            "height": h,
            "mpp": mpp,
            "tileSize": TILE_PX,
            "tile_l0": list(shown.geometry.tile_l0),
            "tiles": len(self._coords(number)),
            "runs": runs,
            "bounds": list(shown.geometry.bounds_l0),
            "layer_l0": place.px_l0[0] * place.size_px[0],
            "stretch": list(stretch),
        }

    def places(self, number: int) -> bytes:
        """The corners of a slide's tiles, level-0 px, as `numbers.places`."""
        return numbers.places(self._coords(number))

    def values(self, run: int, layer: int, number: int) -> bytes:
        """A layer's score of each tile, as `numbers.values`."""
        return numbers.values(self._layer(run, layer, number).scores)

    def scale(self, run: int, layer: int, number: int, how: Scale) -> dict[str, Any]:
        """The scores that stand at `TICKS` of a layer's colour bar."""
        one = self._layer(run, layer, number)
        told = heatmap.at_positions(one.scores, "share" if one.share else how, one.signed, TICKS)
        return {"at": list(TICKS), "scores": told, "ends": [one.scaled(how).low, one.scaled(how).high]}

    def truth(self, run: int, number: int) -> dict[str, Any]:
        """What was drawn as the truth of a slide, as `tile_layers.truth_of`; maps: how well those of the run point at
        the truth of all slides, as `truth.json` has it; why: it cannot be read."""
        self._layers(run, number)  # there are such a run and slide
        drawn_as = tile_layers.truth_of(self.runs[run].present, self._shown(number).id)
        try:
            return drawn_as | {"maps": self._pointing(run), "why": ""}
        except parts.DAMAGED as error:  # costs the numbers alone
            return drawn_as | {"maps": {}, "why": f"{truth.FILE}: {parts.reason(error)}"}

    def crop(self, number: int, tile: int) -> bytes:
        """JPEG of one of the tiles, as the model saw it."""
        coords, geometry = self._coords(number), self._shown(number).geometry
        if not 0 <= tile < len(coords):
            raise Unknown(f"no tile {tile}")
        x, y = (int(v) for v in coords[tile])
        made: bytes = self._ask(number, "crop", (x, y, geometry.tile_px), geometry.mpp)
        return made

    def _clusters(self, run: int, number: int) -> dict[str, Any]:
        """Tiles of a slide by how they look to the run's encoder; `why` there are none."""
        slide, made = self._shown(number).id, [p.name for p in self.work.root.glob("features/*") if p.is_dir()]
        own = self.runs[run].encoder if 0 <= run < len(self.runs) else ""
        stores = [self.work.feature_store(e, slide) for e in ([own] if own else sorted(made))]
        found = next((s for s in stores if (look := seals.look(s)) is not None and not look.wrong), None)
        if found is None:
            return {"clusters": [], "why": f"{slide} has no features {'of ' + own if own else ''} in this work folder"}
        features = reading.read_array(found, "features")
        if len(features) != len(self._coords(number)):
            return {"clusters": [], "why": f"the features of {slide} are of other tiles"}
        return {"clusters": clusters.clusters(features), "why": ""}

    def regions(self, number: int) -> dict[str, Any]:
        """The drawn regions of a slide: those drawn here, else those with which it was tiled. Raises BadRegions."""
        shown = self._shown(number)
        origin = shown.geometry.bounds_l0[:2]
        own = drawn.file_of(self.work, shown.id)
        path = own if own.exists() else shown.regions
        if path is None or not path.exists():
            return {"regions": [], "file": ""}
        made = (shown.tiles or {}).get("settings") or {}
        frame = "auto" if path == own else str(made.get("input.regions_frame", "auto"))  # as it was tiled
        return {"regions": drawn.read(path, origin, frame), "file": str(path)}

    def drawing(self, number: int, sent: Any) -> str:
        """GeoJSON of regions that were drawn on a slide, "" of none. Raises BadDrawing."""
        geometry = self._shown(number).geometry
        return drawn.text(sent, geometry.bounds_l0[:2], geometry.size_l0)

    def save_regions(self, number: int, sent: Any) -> dict[str, Any]:
        """Keep regions that were drawn on a slide. Raises BadDrawing, and OSError where nothing can be written."""
        path = drawn.save(self.work, self._shown(number).id, self.drawing(number, sent))
        return {"file": str(path) if path else "", "folder": str(self.work.root / drawn.FOLDER)}

    def tile(self, number: int, level: int, column: int, row: int) -> bytes:
        """One JPEG tile of the slide: level n halves the resolution of level n + 1."""
        made: bytes = self._ask(number, "tile", (level, column, row))
        return made

    def layer_place(self, number: int) -> Frame:
        """Where the pictures of a slide's layers lie."""
        shown = self._shown(number)
        assert shown.tiles is not None
        return tile_layers.layer_frame(shown.geometry)

    def _layer_png(self, run: int, layer: int, number: int, how: Scale, palette: heatmap.Palette) -> bytes:
        """A layer as RGBA PNG."""
        values = self._layer(run, layer, number).scaled(how).values
        tile_l0 = self._shown(number).geometry.tile_l0
        laid = heatmap.raster(values, self._coords(number), tile_l0, self.layer_place(number))
        return _png(heatmap.colour(laid, name=palette))

    def tissue_png(self, number: int) -> bytes:
        """The outline of the tissue as RGBA PNG over the slide's bounds."""
        shown = self._shown(number)
        assert shown.tiles is not None
        place = MaskPlace.of(shown.tiles, self.work.tile_store(shown.id))
        w, h = place.px
        packed = reading.read_array(self.work.tile_store(shown.id), "mask")
        mask = np.unpackbits(np.asarray(packed), axis=1)[:h, :w]
        k = max(1, round(1400 / max(w, h)))
        mx, my = place.mpp
        size = (w * k, max(1, round(h * k * my / mx)))
        big = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        lines, _ = cv2.findContours(big, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        rgba = np.zeros((*big.shape, 4), np.uint8)
        cv2.drawContours(rgba, lines, -1, (0, 120, 60, 255), 2)
        return _png(rgba)

    def _thumbnail(self, number: int) -> bytes:
        """A small picture of the slide."""
        made: bytes = self._ask(number, "thumbnail")
        return made

    def _shown(self, number: int) -> Shown:
        if not 0 <= number < len(self.slides) or self.slides[number].tiles is None:
            raise Unknown(f"no slide {number} that could be read")
        return self.slides[number]

    def _coords(self, number: int) -> np.ndarray:
        return np.asarray(reading.read_array(self.work.tile_store(self._shown(number).id), "coords"))

    def _layer(self, run: int, layer: int, number: int) -> Layer:
        found = self._layers(run, number)
        if not 0 <= layer < len(found):
            raise Unknown(f"no layer {layer}")
        return found[layer]

    def _read_layers(self, run: int, number: int) -> list[Layer]:
        if not 0 <= run < len(self.runs):
            raise Unknown(f"no run {run}")
        shown = self.runs[run]
        made = tile_layers.layers_of(shown.present, self._shown(number).id, shown.task, shown.logits)
        tiles = len(self._coords(number))
        return [layer for layer in made if len(layer.scores) == tiles]  # else it was tiled again since

    def _layers_or_why(self, run: int, number: int) -> tuple[list[Layer], str]:
        """The layers of a slide, or why a run has none of it, which costs no other run's."""
        try:
            found = self._layers(run, number)
        except parts.DAMAGED as error:
            return [], parts.reason(error)
        if found:
            return found, ""
        shown = self._shown(number)
        why = str((shown.tiles or {}).get("empty") or "") or self.runs[run].present.look(shown.id)[1]
        return [], why or "scores are of other tiles: it was tiled again since"

    def _ask(self, number: int, what: What, tile: tuple[int, int, int] = (0, 0, 0), mpp: float = 0.0) -> Any:
        """What the slide's reading processes say. Raises Unknown, and SlideError where the slide cannot be read."""
        shown = self._shown(number)
        assert shown.tiles is not None
        x, y = map(float, shown.geometry.slide_mpp)
        try:
            return self.read.ask(Question(shown.path, (x, y), what, tile, mpp))
        except LookupError as error:
            raise Unknown(str(error)) from error


def _shown(slide: str, path: Path, tiles: Path, regions: Path | None) -> Shown:
    found = seals.look(tiles)
    if found is None:
        return Shown(slide, path, None)
    if found.wrong:
        return Shown(slide, path, None, reading.damage(tiles, found.wrong))
    return Shown(slide, path, found.attrs, regions=regions)


def _told(row: Row, run: ShownRun) -> dict[str, Any]:
    """A line of predictions.csv as the list shows it."""
    said = measures.of(run.task).said(row)
    return {
        "patient": row["patient"],
        "label": said.truth,
        "decision": said.decision,
        "value": said.value,
        "of": said.of,
        **verdict.cut(row, run.task.classes),
        **verdict.modalities(run.shares.get(row["patient"]), run.task),
        "wrong": said.wrong,
    }


def _png(rgba: np.ndarray) -> bytes:
    return encoded(rgba, ".png", 3)
