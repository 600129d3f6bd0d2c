"""What was found of one file of a cohort."""

from __future__ import annotations

from dataclasses import dataclass

OK = "ok"


EMPTY = "empty"


NO_MPP = "no mpp"


UNREADABLE = "unreadable"


UNFIT = "unfit"


UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Finding:
    """One file of the cohort. state: one of the constants above; problems need a person, warnings are to be known."""

    slide: str
    state: str
    vendor: str = ""
    megabytes: float = 0.0
    width: int = 0
    height: int = 0
    levels: int = 0
    mpp_x: float | None = None
    mpp_y: float | None = None
    mpp_source: str = ""
    tissue_fraction: float | None = None  # None: it was never looked for
    tiles: int = 0
    tiles_per_s: float = 0.0
    quickhash: str = ""
    images: str = ""
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    thumbnail: bytes = b""
