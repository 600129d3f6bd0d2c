"""What of a stored map may be shown: what a run said is left out once that run's trainings are there no more.

In: a work folder and a map's name. Out: the map, without the colours of a run that was trained again since, and a line
that tells so. Tiles, clusters and labels are of the features and stay.
"""

from __future__ import annotations

from dataclasses import replace

from mhim.pipeline.maps import stored
from mhim.pipeline.results.present import Present
from mhim.pipeline.store.layout import Work


def read(work: Work, name: str) -> tuple[stored.Stored, str]:
    """The map, and what is to be told of it, "" of nothing. Raises StoreError where it is missing or damaged."""
    one = stored.read(work.maps / name)
    run, models = one.card["run"], one.card.get("models")
    if run is None or models is None:
        return one, ""
    present = Present(work.run(run))
    if present.folder.is_dir() and not present.are_gone(models):
        return one, ""
    kept = [c for c in one.card["colours"] if c["kind"] != "rank"]
    told = (
        f"what the run {run} said is of trainings that are there no more, and is left out of this map; give `pipeline "
        "map` again"
    )
    return replace(one, card={**one.card, "colours": kept, "attention": False, "run": None}), told
