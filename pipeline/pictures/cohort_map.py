"""The report's section of maps: those of the features that a run was trained on, pictures, clusters and gallery.

In: the maps of a work folder. Out: values of `assets/map.html`. A map coloured by another run's scores is shown without
these. A damaged map is told, not shown.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mhim.extract.images import encoded
from mhim.pipeline.maps import shown, stored
from mhim.pipeline.pictures.layers import file_name
from mhim.pipeline.pictures.parts import DAMAGED, Parts
from mhim.pipeline.store import layout, pages
from mhim.pipeline.store.layout import StoreError

TILE_PX = 72
MOST = 2  # maps in a report


def sections(
    work: layout.Work, run: Path, features: dict[str, Any], parts: Parts
) -> tuple[list[dict[str, Any]], list[str]]:
    """One for each map of the same features, those coloured by the run first, MOST of them; and the names of the
    others. features: what the run tells of its own. A damaged map costs its own section alone."""
    found, made = [], []
    for name in stored.names(work):
        try:
            one, told = shown.read(work, name)
            if stored.alike(one.card["features"], features):
                found.append((one.card["run"] != run.name, name, one, told))
        except DAMAGED as error:
            parts.fail(f"the map {name}", error)
    found.sort(key=lambda each: each[:2])
    for _, name, one, told in found[:MOST]:
        section = parts.make(f"the map {name}", partial(_section, one, run.name, told, parts), None)
        made += [section] if section is not None else []
    return made, [name for _, name, *_ in found[MOST:]]


def _section(one: stored.Stored, run: str, told: str, parts: Parts) -> dict[str, Any]:
    card = one.card
    own = card["run"] == run
    pictures = []
    for what in ("tiles", "patients"):
        method = card["methods"][what][-1]
        names = ["cluster", "slide"] if what == "tiles" else []
        names += ["attention"] if what == "tiles" and card["attention"] and own else []
        names += [c["name"] for c in card["colours"] if c["kind"] != "rank" or own]
        for name in names:
            file = one.folder / f"{what}_{method}_{file_name(name)}.png"
            if file.is_file():
                title = f"{what}, {method.upper()}, by {name}"
                pictures.append((title, pages.data_uri("image/png", file.read_bytes())))
    rows = one.rows("clusters")
    columns = list(dict.fromkeys((r["labels"], r["class"]) for r in rows))
    cells = {(r["cluster"], r["labels"], r["class"]): r for r in rows}
    patients = {c: next(r["patients"] for r in rows if (r["labels"], r["class"]) == c) for c in columns}
    heads = [f"{b or 'all'} ({patients[a, b]} patients)" for a, b in columns]
    table = []
    for k in sorted({int(r["cluster"]) for r in rows}):
        each = [cells.get((str(k), a, b)) for a, b in columns]
        table.append((str(k), *("" if r is None else f"{100 * float(r['share']):.1f} %" for r in each)))
    variance = " + ".join(f"{100 * v:.0f}" for v in card["variance"][:2])
    return {
        "name": one.name,
        "note": told,
        "told": f"{card['tiles']} tiles of {card['slides']} slides, {card['patients']} patients; the first two "
        f"principal components hold {variance} % of the variance of {card['features'].get('encoder')} features.",
        "pictures": pictures,
        "columns": ("cluster", *heads),
        "clusters": table,
        "gallery": _gallery(one, parts),
    }


def _gallery(one: stored.Stored, parts: Parts) -> list[dict[str, Any]]:
    """Per cluster and class the tiles that were cut."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in one.rows("prototypes"):
        file = one.folder / stored.GALLERY / row["slide"] / f"{row['tile']}.jpg"
        called = f"cluster {row['name']}" if row["of"] == "cluster" else f"{row['of']} {row['name']}"
        if file.is_file():
            told = f"tile {row['tile']} of {row['slide']}, patient {row['patient']}, cluster {row['cluster']}"
            if small := parts.make(f"the map {one.name}, {called}", partial(_small, file), b""):
                groups.setdefault(called, []).append((told, pages.data_uri("image/jpeg", small)))
    return [{"name": name, "tiles": tiles} for name, tiles in groups.items()]


def _small(path: Path) -> bytes:
    import cv2

    picture = cv2.imread(str(path))
    if picture is None:
        raise StoreError(f"{path} is damaged; give `pipeline verify --repair`, then `pipeline map` again")
    small = cv2.resize(picture, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)
    return encoded(small[..., ::-1], ".jpg", 80)
