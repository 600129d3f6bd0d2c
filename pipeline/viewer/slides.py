"""Slides read for the viewer in processes of their own: a file that crashes its decoder ends one of those, and is then
marked as broken, while the viewer and all other slides go on.

In: a slide's path and its µm per px, and what is asked of it. Out: geometry, JPEG tiles, thumbnails. It knows no cohort
and no HTTP. Each process answers one question at a time, so that it is known over which slide it died.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from mhim.configs.processes import usable_cores
from mhim.extract import SlideError
from mhim.extract.images import viewed_jpeg
from mhim.extract.recent import Recent
from mhim.extract.slide.slide import Slide, open_slide
from mhim.extract.units import Mpp
from mhim.pipeline.resume.child import Child, Died, Order
from mhim.pipeline.resume.stage import Stopped
from mhim.pipeline.viewer.pyramid import Pyramid

PROCESSES = 4  # at most; a browser asks for six tiles at once
OPEN_SLIDES = 2  # in each process: each keeps up to twice pyramid.KEPT_BYTES
TRIES = 2  # a process may also be ended from outside, for want of memory: only the second death is the slide's fault
_THUMBNAIL_PX = 240
CROP_PX = 256  # most of the edge of a tile's picture

What = Literal["geometry", "tile", "thumbnail", "crop"]


class Geometry(NamedTuple):
    """Of a slide's finest picture, as `Pyramid` has it. note: why its tiles are not decoded directly, or ""."""

    size_px: tuple[int, int]
    mpp: float
    stretch: tuple[float, float]
    note: str


@dataclass(frozen=True)
class Question:
    """mpp: µm per px of level 0, (x, y). tile: (level, column, row) where `what` is one; of a crop its corner in
    level-0 px and its edge in px of `crop_mpp` µm."""

    path: Path
    mpp: tuple[float, float]
    what: What
    tile: tuple[int, int, int] = (0, 0, 0)
    crop_mpp: float = 0.0


# ---------------------------------------------------------------------------------------------- the viewer's side


class Slides:
    """A few processes that read slides. Safe to ask from several threads; close it at the end."""

    def __init__(self, processes: int = 0) -> None:
        """processes: 0 for one per core, at most PROCESSES. They start at the first question, or with `warm`."""
        n = processes or max(1, min(PROCESSES, usable_cores()))
        self._team = [Child(Order(None, call=_answer)) for _ in range(n)]
        self._idle = list(self._team)
        self._has: dict[Child, Recent[Path, bool]] = {child: Recent(OPEN_SLIDES) for child in self._team}
        self._changed = threading.Condition()
        self._broken: dict[Path, str] = {}

    def ask(self, question: Question) -> Any:
        """The answer. Raises LookupError where there is no such tile, SlideError where the slide cannot be read, and
        Stopped where no process can be had."""
        for left in reversed(range(TRIES)):
            if question.path in self._broken:
                break
            child = self._take(question)
            try:
                kind, value = child.ask(question)
            except Died as error:
                self._has[child].clear()
                if not left:
                    self._broken[question.path] = f"the process that reads it {error}: its file is damaged"
                continue
            finally:
                self._give(child)
            if kind == "none":
                raise LookupError(value)
            if kind == "failed":
                raise SlideError(value)
            return value
        raise SlideError(f"{question.path.name}: {self._broken[question.path]}")

    def warm(self) -> None:
        """Start the processes in the background, so that the first tile need not wait for its own."""

        def start() -> None:
            child = self._take(None)
            try:
                with suppress(Died, Stopped):  # then the first question says so
                    child.ask(None)
            finally:
                self._give(child)

        for _ in self._team:
            threading.Thread(target=start, daemon=True).start()

    def close(self) -> None:
        """End the processes, whatever they are about."""
        for child in self._team:
            child.stop()
        for child in self._team:
            child.close()

    def _take(self, question: Question | None) -> Child:
        """An idle process: one that has the slide open, else one that has not started, else one that has fewest."""
        path = question.path if question else None

        def cost(child: Child) -> tuple[bool, int, bool]:
            return path not in self._has[child], len(self._has[child]), child.alive

        with self._changed:
            self._changed.wait_for(lambda: self._idle)
            child = min(self._idle, key=cost)
            self._idle.remove(child)
            if question and question.what != "thumbnail":
                self._has[child].put(question.path, True)
            return child

    def _give(self, child: Child) -> None:
        with self._changed:
            self._idle.append(child)
            self._changed.notify()


# ---------------------------------------------------------------------------------------------- in their processes

_open: Recent[Path, Pyramid] = Recent(OPEN_SLIDES)


def _answer(question: Question | None) -> tuple[str, Any]:
    """("made", the answer), ("none", why there is no such tile) or ("failed", why the slide cannot be read)."""
    if question is None:
        return "made", None
    try:
        pyramid = _open.get(question.path)
        if question.what == "thumbnail":
            if pyramid is not None:
                return "made", _thumbnail(pyramid.slide)
            with open_slide(question.path, question.mpp, file_tiles=True) as slide:  # a list of them closes no other
                return "made", _thumbnail(slide)
        if pyramid is None:
            pyramid = Pyramid(open_slide(question.path, question.mpp, file_tiles=True))
        _open.put(question.path, pyramid)
        if question.what == "tile":
            try:
                return "made", pyramid.tile(*question.tile)
            except LookupError as error:
                return "none", str(error)
        if question.what == "crop":
            x, y, edge = question.tile
            return "made", viewed_jpeg(_small(pyramid.slide.read_region(x, y, edge, Mpp(question.crop_mpp)), CROP_PX))
        return "made", Geometry(pyramid.size_px, pyramid.mpp, pyramid.stretch, pyramid.note)
    except Exception as error:  # decoders raise whatever the bytes at hand do
        return "failed", str(error) or type(error).__name__


def _small(rgb: np.ndarray, most_px: int) -> np.ndarray:
    """A picture whose longer side is at most `most_px`."""
    k = most_px / max(rgb.shape[:2])
    return rgb if k >= 1 else np.asarray(cv2.resize(rgb, None, fx=k, fy=k, interpolation=cv2.INTER_AREA))


def _thumbnail(slide: Slide) -> bytes:
    """JPEG of the slide's bounds, its pixels squares."""
    (w, h), (mx, my) = slide.bounds_l0[2:], slide.slide_mpp
    rgb, (px_x, px_y) = slide.image_at(Mpp(max(w * mx, h * my) / 320))
    h_px, w_px = rgb.shape[0] * px_y / px_x, rgb.shape[1]
    k = _THUMBNAIL_PX / max(w_px, h_px)
    size = (max(1, round(w_px * k)), max(1, round(h_px * k)))
    return viewed_jpeg(np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)))
