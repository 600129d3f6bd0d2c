"""Which file names may be slides: suffixes only, no file is opened and nothing heavy is imported.

In: a path. Out: which reader would take it. Knows nothing of what is inside the files.
"""

from __future__ import annotations

from pathlib import PurePath

# What OpenSlide 4 reads. `.tif` and `.tiff` cover generic tiled, Philips, Ventana and OME TIFF.
OPENSLIDE_SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm"}
)
# Plain images carry no reliable mpp: a folder scan may pass them by with a word, a manifest that names them
# (with its `mpp` column) means them. Striped and flat TIFFs have the suffixes above.
PLAIN_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp"})
SUFFIXES = OPENSLIDE_SUFFIXES | PLAIN_SUFFIXES


def suffix(path: PurePath) -> str:
    """The suffix in lower case, with its dot; empty without one."""
    return path.suffix.lower()


def may_be_dicom(path: PurePath) -> bool:
    """True for a name that a DICOM file may have: archives write them as `.dcm`, or by their number, without suffix."""
    end = suffix(path)
    return end in (".dcm", "") or end[1:].isdigit()


def is_slide(path: PurePath) -> bool:
    """True for a name that OpenSlide may read as a slide."""
    return suffix(path) in OPENSLIDE_SUFFIXES


def is_plain_image(path: PurePath) -> bool:
    """True for a plain image, which counts as a slide only where its mpp is given."""
    return suffix(path) in PLAIN_SUFFIXES
