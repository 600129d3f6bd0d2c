"""One scored work folder, its gallery and a viewer of it, per file of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mhim.pipeline.store import layout
from mhim.pipeline.viewer.data import Gallery
from tests.pipeline import scored
from tests.pipeline.browser import shared
from tests.pipeline.viewer.serving import TOKEN, serving


@pytest.fixture(scope="package", autouse=True)
def one_browser() -> Iterator[None]:
    with shared():
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, demo_cohort: Path) -> Path:
    return scored.make(tmp_path_factory.mktemp("viewer"), demo_cohort)


@pytest.fixture(scope="module")
def gallery(work: Path) -> Iterator[Gallery]:
    made = Gallery(layout.Work(work))
    yield made
    made.read.close()


@pytest.fixture(scope="module")
def port(gallery: Gallery) -> Iterator[int]:
    yield from serving(gallery)


@pytest.fixture(scope="module")
def with_token(gallery: Gallery) -> Iterator[int]:
    yield from serving(gallery, token=TOKEN)
