"""What a TCGA barcode tells: whose slide it is, and of which kind of tissue.

In: the name of a slide (`TCGA-AA-1000-01Z-00-DX1.<uuid>.svs`) or of a patient (`TCGA-AA-1000`). Out: parts of it. A
name that is no barcode tells nothing. Knows no tables and no files.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_CASE = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(?:-(\d{2})[A-Z]?(?![A-Z0-9]).*)?", re.DOTALL)
NORMAL = range(10, 20)  # sample types of normal tissue and blood; 01 to 09 are tumours


def patient(name: str) -> str | None:
    """`TCGA-AA-1000` of a slide's name or path, or of the patient's own id; None for what is no barcode."""
    found = _CASE.fullmatch(PurePosixPath(name).name)
    return found[1] if found else None


def is_slide(name: str) -> bool:
    """Whether the name goes on after the patient: a sample, and so a slide."""
    found = _CASE.fullmatch(PurePosixPath(name).name)
    return found is not None and found[2] is not None


def normal_tissue(name: str) -> bool | None:
    """True for a slide of normal tissue (sample type 11 and its neighbours), False for a tumour's, None if unknown."""
    found = _CASE.fullmatch(PurePosixPath(name).name)
    return None if found is None or found[2] is None else int(found[2]) in NORMAL
