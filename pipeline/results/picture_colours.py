"""In which colours the saved pictures of a run are: what `score.palette=auto` stands for.

In: the folder of a run's pictures. Out: a choice of palette. Pictures made before there was a choice do not record one;
they stay as they are, and those drawn beside them later look alike.
"""

from __future__ import annotations

import os
from pathlib import Path

from mhim.mil.heatmap import Choice
from mhim.pipeline.store import layout, seals

FIELD = "score.palette"
UNRECORDED: Choice = "classic"  # what pictures are in that record no palette


def resolved(chosen: Choice, pictures: Path) -> Choice:
    """What `score.palette` stands for in the folder `pictures`, which need not be there. `auto` is `even`, unless the
    first picture that is there records no palette."""
    if chosen != "auto":
        return chosen
    return UNRECORDED if are_old(pictures) else "even"


def are_old(pictures: Path) -> bool:
    """Whether the first picture that is there does not record its palette: one small file is read."""
    for folder, names, files in os.walk(pictures):
        names[:] = sorted(name for name in names if not name.startswith("."))  # no farther than needed
        found = seals.look(Path(folder)) if layout.SEAL in files else None
        if found is not None and found.settings:
            return FIELD not in found.settings
    return False
