"""The reader of one slide's tiles: the direct one where the file allows it, OpenSlide for everything else.

In: a `SlideJob` and the settings. Out: an object that fills arrays with tiles and says how it reads. Knows nothing of
encoders.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideJob, memory
from mhim.extract.reading import cache
from mhim.extract.slide.slide import Slide, open_slide


class TileReader(Protocol):
    """Reads tiles of one slide, from several threads. kind: `direct` or `openslide`. note: why not direct."""

    kind: str
    note: str

    def fill(self, coords_l0: np.ndarray, out: np.ndarray) -> None:
        """Read tiles at int (n, 2) corners into uint8 (n, tile_px, tile_px, 3). Raises SlideError."""

    def close(self) -> None: ...


class OpenSlideReader:
    """Tiles through `Slide.read_region`: every format, and the judge of the direct reader."""

    kind = "openslide"

    def __init__(self, job: SlideJob, slide: Slide, note: str = "") -> None:
        self.job = job
        self.slide = slide
        self.note = note

    def fill(self, coords_l0: np.ndarray, out: np.ndarray) -> None:
        for i, (x, y) in enumerate(coords_l0.tolist()):
            out[i] = self.slide.read_region(x, y, self.job.tile_px, self.job.mpp)

    def close(self) -> None:
        self.slide.close()


def open_job(job: SlideJob) -> Slide:
    """The job's slide at the µm per px that its tiles were laid out with, whatever the file says today."""
    return open_slide(job.path, mpp=job.slide_mpp)


def open_reader(job: SlideJob, config: ExtractConfig) -> TileReader:
    """The reader of `job` that the settings ask for, OpenSlide where a direct one is impossible. Raises SlideError."""
    memory.keep_freed()
    staged = cache.stage(job.path, config)
    try:
        reader = _open(replace(job, path=staged.path), config)
    except BaseException:
        staged.release()
        raise
    if staged.note:
        reader.note = "; ".join(n for n in (reader.note, staged.note) if n)
    return reader if staged.path == job.path else _Cached(reader, staged)


class _Cached:
    """A reader of a staged copy, which gives the copy free when it closes."""

    def __init__(self, reader: TileReader, staged: cache.Staged) -> None:
        self.reader = reader
        self.staged = staged
        self.kind = reader.kind

    @property
    def note(self) -> str:
        return self.reader.note

    @note.setter
    def note(self, value: str) -> None:
        self.reader.note = value

    def fill(self, coords_l0: np.ndarray, out: np.ndarray) -> None:
        self.reader.fill(coords_l0, out)

    def close(self) -> None:
        self.reader.close()
        self.staged.release()


def _open(job: SlideJob, config: ExtractConfig) -> TileReader:
    slide = open_job(job)
    try:
        if config.reader == "openslide":
            return OpenSlideReader(job, slide, "asked for")
        from mhim.extract.reading.direct import DirectReader
        from mhim.extract.slide.planes import NotDirect

        try:
            return DirectReader(job, slide, config.reduction)
        except (NotDirect, ImportError) as reason:
            return OpenSlideReader(job, slide, str(reason))
    except BaseException:
        slide.close()
        raise
