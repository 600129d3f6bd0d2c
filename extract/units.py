"""Units as types, for the signatures in which two of them meet: a length for a resolution is then an error of mypy.

They cost nothing when the program runs. Arithmetic gives a plain float, which is named again where it goes
on.
"""

from __future__ import annotations

from typing import NewType

Mpp = NewType("Mpp", float)  # µm per px, of level 0 or of a picture
Microns = NewType("Microns", float)  # a length on the slide
PxL0 = NewType("PxL0", float)  # a length or place in px of level 0; not always whole
