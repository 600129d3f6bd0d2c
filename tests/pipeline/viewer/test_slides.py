"""The viewer's slides are read by processes of their own: what ends one of them costs the slide it was on, no other."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mhim.extract import SlideError
from mhim.extract.slide.slide import open_slide
from mhim.pipeline.viewer.pyramid import Pyramid
from mhim.pipeline.viewer.slides import OPEN_SLIDES, Geometry, Question, Slides
from tests.extract.dicoms import write_instance
from tests.extract.slides import tissue_rgb, write_svs

MPP = (0.5, 0.5)


@pytest.fixture
def slides() -> Iterator[Slides]:
    made = Slides(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("v") / "good.svs", tissue_rgb(700, 1000))


def pids(slides: Slides) -> list[int]:
    return [child._process.pid for child in slides._team if child._process]


def test_they_say_what_the_pyramid_says(slides: Slides, good: Path) -> None:
    here = Pyramid(open_slide(good, MPP, file_tiles=True))
    assert slides.ask(Question(good, MPP, "geometry")) == Geometry(here.size_px, here.mpp, here.stretch, "")
    places = [(here.top, 1, 0), (here.top, 0, 1), (here.top - 1, 0, 0), (here.top - 3, 0, 0)] * 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p: slides.ask(Question(good, MPP, "tile", p)), places))
    assert found == [here.tile(*p) for p in places]
    with pytest.raises(LookupError, match="no tile 9, 9"):
        slides.ask(Question(good, MPP, "tile", (here.top, 9, 9)))
    assert slides.ask(Question(good, MPP, "thumbnail"))[:2] == b"\xff\xd8"


def test_a_slide_that_crashes_its_decoder_is_marked_and_the_others_go_on(slides: Slides, good: Path) -> None:
    """OpenSlide 4.0 ends by SIGSEGV over a sparse DICOM that does not say where its frames lie."""
    volume = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    bad = write_instance(
        good.parent / "bad.dcm", np.full((512, 512, 3), 200, np.uint8), "1.2.3", "1.2.3.1", volume,
        DimensionOrganizationType="TILED_SPARSE",
    )  # fmt: skip
    slides.ask(Question(good, MPP, "geometry"))
    with pytest.raises(SlideError, match=r"bad\.dcm: .*(SIGSEGV|cannot)"):
        slides.ask(Question(bad, MPP, "geometry"))
    before = pids(slides)
    for what in ("geometry", "thumbnail"):
        with pytest.raises(SlideError, match=r"bad\.dcm"):
            slides.ask(Question(bad, MPP, what))  # type: ignore[arg-type]
    assert pids(slides) == before  # it is not tried again
    assert slides.ask(Question(good, MPP, "geometry")).size_px == (1000, 700)


def test_a_process_that_is_ended_from_outside_marks_no_slide(slides: Slides, good: Path) -> None:
    slides.ask(Question(good, MPP, "geometry"))
    for pid in pids(slides):
        os.kill(pid, signal.SIGKILL)
    assert slides.ask(Question(good, MPP, "geometry")).size_px == (1000, 700)


def test_one_process_keeps_a_slide_that_is_looked_at(slides: Slides, good: Path) -> None:
    """Not every process opens every slide, and only the latest stay open."""
    for _ in range(3):
        slides.ask(Question(good, MPP, "tile", (8, 0, 0)))
    assert sum(good in has for has in slides._has.values()) == 1
    for n in range(3 * OPEN_SLIDES):
        other = good.parent / f"other{n}.svs"
        if not other.exists():
            other.symlink_to(good)
        slides.ask(Question(other, MPP, "geometry"))
    assert all(len(has) <= OPEN_SLIDES for has in slides._has.values())


def test_what_cannot_be_read_is_said(slides: Slides, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="no such file"):
        slides.ask(Question(tmp_path / "gone.svs", MPP, "thumbnail"))
