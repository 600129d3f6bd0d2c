"""Where the truth of tiles is known: whether the maps of a run point at it. `truth.json` of its results.

In: per slide a file of drawn regions or a table of tiles, maps, and the trainings that they are of. Out: of each map
the tile AUC, the pointing game and FROC. A slide's own file is `<slide id>` with `.geojson`, `.geojson.gz`, `.json`
or `.xml` (regions as `tile --regions` takes them; nothing drawn: no finding; drawn beside all tiles: not used) or
`.csv` (x, y, truth: corner of each tile in level-0 px, and the share of it, or the label, from 0 to 1). Knows no stage
and no model.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.errors import UserError
from mhim.extract.tiles import regions
from mhim.mil import evidence
from mhim.pipeline.results.present import SCORES, slides
from mhim.pipeline.store import layout, reading, seals, tables, writing

FILE = "truth.json"
HALF = 0.5  # a tile is a true one from this share on
_ENDS = (".geojson", ".geojson.gz", ".json", ".xml", ".csv")


class BadTruth(UserError, ValueError):
    """The truth of a slide cannot be used; the message says why."""


@dataclass(frozen=True)
class Known:
    """A slide whose truth is known. true: bool (n,). maps: name -> scores (n,). grid: int (n, 2), column and row.
    training: what the maps are of; scores of different trainings have no common scale. bag_tiles: tiles of all slides
    of its bag, over which attention sums to one."""

    slide: str
    true: np.ndarray
    maps: Mapping[str, np.ndarray]
    grid: np.ndarray
    training: str
    bag_tiles: int


def file_of(folder: Path, slide: str) -> Path | None:
    """The file that tells of a slide; None where there is none. Raises BadTruth of several."""
    found = [path for end in _ENDS if (path := folder / f"{slide}{end}").is_file()]
    if len(found) > 1:
        raise BadTruth(f"{' and '.join(p.name for p in found)} both tell of it; keep one")
    return found[0] if found else None


def of_no_slide(folder: Path, slides: Iterable[str]) -> list[str]:
    """The files below `folder` that are called as truth is, and as none of the slides; sorted, as paths from it."""
    own = {f"{slide}{end}" for slide in slides for end in _ENDS}
    there = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.name.endswith(_ENDS) and p.is_file())
    return sorted(name for name in there if name not in own)


@dataclass(frozen=True)
class Told:
    """What a file tells of a slide's tiles. shares: float64 (n,), of each tile in what is drawn, or as the table has
    it. rings: what is drawn, and what is cut out of it, float64 (k, 2) each, level-0 px. notes: how the file was read,
    where that may be meant otherwise."""

    shares: np.ndarray
    rings: tuple[np.ndarray, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def true(self) -> np.ndarray:
        """Whether each tile is a true one, bool (n,)."""
        found: np.ndarray = self.shares >= HALF
        return found


def of_tiles(path: Path, coords_l0: np.ndarray, attrs: Mapping[str, Any], frame: Any = "auto") -> Told:
    """What a slide's file tells of its tiles. attrs: of the store of its features, which tell tile_l0 and where the
    scanned bounds begin. frame: `tile.regions_frame`. Raises BadTruth and BadRegions."""
    if path.suffix == ".csv":
        return Told(_of_table(path, coords_l0))
    edges = attrs.get("tile_l0")
    if not isinstance(edges, (list, tuple)) or len(edges) != 2 or min(edges) <= 0:
        raise BadTruth("its features do not tell how large their tiles are: give a .csv of the tiles")
    x, y, *_ = attrs.get("bounds_l0") or (0, 0)
    drawn = regions.read(path, (int(x), int(y)), frame, may_be_empty=True)
    shares = regions.covered(drawn, coords_l0, (float(edges[0]), float(edges[1])))
    notes = drawn.notes
    if shares.size and any(r.role == regions.INCLUDE for r in drawn.regions):  # a finding, which no tile may show
        if not shares.any():
            raise BadTruth(f"the regions of {path.name} cover none of its tiles ({drawn})")
        if shares.max() < HALF:
            notes += (f"its regions cover no tile by half, at most by {shares.max():.0%}: counted as without finding",)
    rings = (ring for r in drawn.regions if r.role != regions.TISSUE for polygon in r.polygons for ring in polygon)
    return Told(shares, tuple(rings), notes)


def grid_of(coords_l0: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    """Column and row of each tile, int64 (n, 2), from the first on. attrs: as of `of_tiles`."""
    at = coords_l0.astype(np.float64)
    at -= at.min(axis=0, initial=np.inf)  # a grid that begins at half a tile would round to either side
    found: np.ndarray = np.rint(at / np.asarray(attrs.get("tile_l0") or (1, 1), np.float64)).astype(np.int64)
    return found


def _of_table(path: Path, coords_l0: np.ndarray) -> np.ndarray:
    try:
        rows = tables.read(path)
        told = {(int(float(r["x"])), int(float(r["y"]))): float(r["truth"]) for r in rows}
    except (KeyError, TypeError) as error:
        raise BadTruth(f"{path.name} has no columns x, y, truth in each row ({error})") from error
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise BadTruth(f"{path.name} is no table of tiles: {error}") from error
    if len(told) < len(rows):
        raise BadTruth(f"{path.name} tells {len(rows) - len(told)} tiles twice")
    if not all(0 <= v <= 1 for v in told.values()):
        raise BadTruth(f"{path.name}: truth goes from 0 to 1")
    places = [(x, y) for x, y in coords_l0.tolist()]
    lacking = sum(place not in told for place in places)
    if lacking:
        raise BadTruth(f"{path.name} says nothing of {lacking} of the {len(places)} tiles (x, y in px of level 0)")
    return np.array([told[place] for place in places], np.float64)


def measured(known: Sequence[Known]) -> dict[str, Any]:
    """Map -> numbers. auc: of the tiles, mean and sd (of two or more) over the slides that have tiles of both kinds.
    pointing: share of the slides with true tiles whose highest tile is one. froc: mean share of findings met at
    `FALSE_POSITIVES` false tiles a slide, inside each training, weighted by its findings; attention, and contributions
    by it, in multiples of the bag's mean attention."""
    from sklearn.metrics import roc_auc_score

    made = {}
    for name in dict.fromkeys(name for one in known for name in one.maps):
        of = [one for one in known if name in one.maps and len(one.true)]
        aucs = [float(roc_auc_score(o.true, o.maps[name])) for o in of if o.true.any() and not o.true.all()]
        points = [hit for o in of if (hit := evidence.points(o.maps[name], o.true)) is not None]
        met, findings = [], []
        for training in sorted({o.training for o in of}):
            own = [o for o in of if o.training == training]
            groups = [evidence.found_in(o.true, o.grid) for o in own]
            # shares of a bag's attention: without its size a small bag would seem to be sure of every tile
            of_attention = name.startswith(("attention", "contribution"))
            maps = [np.asarray(o.maps[name]) * (o.bag_tiles if of_attention else 1) for o in own]
            met.append(evidence.froc(maps, [o.true for o in own], groups))
            findings.append(sum(len(np.unique(g[g > 0])) for g in groups))
        made[name] = {
            "slides": len(aucs),
            "auc": {"mean": float(np.mean(aucs)), "sd": float(np.std(aucs, ddof=1)) if aucs[1:] else None}
            if aucs
            else None,
            "pointing": float(np.mean(points)) if points else None,
            "findings": sum(findings),
            "froc": sum(m * n for m, n in zip(met, findings, strict=True) if n) / sum(findings)
            if sum(findings)
            else None,
        }
    return made


def write(out: Path, known: Sequence[Known], without: int, failed: Mapping[str, str]) -> dict[str, Any]:
    """Write and return `truth.json` of the results in `out`. without: slides of which nothing is told."""
    found = {
        "slides": len(known),
        "with_findings": sum(bool(one.true.any()) for one in known),
        "without_truth": without,
        "failed": dict(failed),
        "false_tiles_per_slide": list(evidence.FALSE_POSITIVES),
        "scores": _scores_of(out),
        "maps": measured(known),
    }
    writing.write_atomic(out / FILE, json.dumps(found, indent=1) + "\n")
    return found


def read(out: Path) -> dict[str, Any]:
    """What `truth.json` says of the scores that lie there now; {} where nothing was measured, or of other scores."""
    if not (out / FILE).is_file():
        return {}
    found = reading.read_json(out / FILE)
    return found if found.get("scores") == _scores_of(out) else {}


COLUMNS = ("map", "slides", "tile AUC ± sd", "highest tile is true", "findings", "FROC")


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line of `COLUMNS` for each map."""
    made: list[tuple[str, ...]] = []
    for name, one in found.get("maps", {}).items():
        auc = "undefined" if one["auc"] is None else f"{one['auc']['mean']:.3f}"
        auc += f" ± {one['auc']['sd']:.3f}" if one["auc"] and one["auc"]["sd"] is not None else ""
        shares = ["undefined" if one[k] is None else f"{one[k]:.3f}" for k in ("pointing", "froc")]
        made.append((name.replace("_", " "), str(one["slides"]), auc, shares[0], str(one["findings"]), shares[1]))
    return made


def _scores_of(out: Path) -> str:
    """One mark of all scores that lie in `out`."""
    stores = sorted(Path(f"{slide}.zarr") for slide in slides(out))
    found = ((store, seals.look(out / SCORES / store)) for store in stores)
    marks = [(store.as_posix(), look.fingerprint) for store, look in found if look is not None]
    return layout.fingerprint({"scores": marks})
