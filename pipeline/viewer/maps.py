"""Maps of the cohort for the viewer: points as bytes, and what they are coloured by as JSON.

In: `maps/<name>/` of a work folder, asked for by their place in `names`. Out: JSON values, and columns of numbers one
after the other, little-endian. It knows no HTTP and opens no slide.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mhim.pipeline.maps import shown, stored
from mhim.pipeline.store import layout


class Maps:
    """Those that were there at the start. Safe to ask from several threads."""

    def __init__(self, work: layout.Work) -> None:
        self.work = work
        self.names = stored.names(work)
        self._read = lru_cache(maxsize=4)(self._stored)

    def _stored(self, number: int) -> tuple[stored.Stored, str]:
        return shown.read(self.work, self.names[number])

    def about(self, number: int, slides: dict[str, int]) -> dict[str, Any]:
        """A map's slides with what they are coloured by, its patients and prototypes. slides: id -> the viewer's
        number. Raises StoreError."""
        one, told = self._read(number)
        card = one.card
        colours = []
        for c in card["colours"]:
            number_of = c["kind"] != "classes"
            values = [_value(r[c["column"]], number_of) for r in one.slides]
            colours.append({"name": c["name"], "kind": c["kind"], "values": values})
        patients = []
        for r in one.rows("patients"):
            places = {m: [float(r[a]) for a in stored.AXES[m]] for m in card["methods"]["patients"]}
            by = [_value(r[c["column"]], c["kind"] != "classes") for c in card["colours"]]
            patients.append({"id": r["patient"], "slide": r["slides"].split(";")[0], "at": places, "by": by})
        return {
            "name": one.name,
            "run": card["run"],
            "told": told,
            "methods": card["methods"],
            "tiles": card["tiles"],
            "attention": card["attention"],
            "slides": [{"id": r["slide"], "number": slides.get(r["slide"], -1)} for r in one.slides],
            "colours": colours,
            "patients": patients,
            "prototypes": [
                {**{k: r[k] for k in ("of", "name", "slide", "patient", "cluster")}}
                | {k: int(r[k]) for k in ("tile", "x_l0", "y_l0")}
                | {"number": slides.get(r["slide"], -1)}
                for r in one.rows("prototypes")
            ],
        }

    def points(self, number: int) -> bytes:
        """int32 slide, tile, x_l0, y_l0, cluster; then float32 x and y of each method, and attention where there is
        any: each (n,)."""
        one, _ = self._read(number)
        tiles = one.tiles
        whole = [tiles[name].astype("<i4") for name in ("slide", "tile", "x_l0", "y_l0", "cluster")]
        rest = [tiles[axis] for method in one.card["methods"]["tiles"] for axis in stored.AXES[method]]
        rest += [tiles["attention"]] if one.card["attention"] else []
        return b"".join([*(a.tobytes() for a in whole), *(a.astype("<f4").tobytes() for a in rest)])


def _value(text: str, number: bool) -> str | float | None:
    return None if not text else float(text) if number else text
