"""Staged copies: the same bytes of features, never more than the limit, never removed under a reader."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideJob
from mhim.extract.features import Extractor
from mhim.extract.reading import cache
from tests.extract.slides import tissue_rgb, write_svs


@pytest.fixture
def slides(tmp_path: Path) -> list[Path]:
    return [write_svs(tmp_path / f"{i}.svs", tissue_rgb(512, 512, seed=i), downsamples=(1,)) for i in range(3)]


def settings(folder: Path, size: int) -> ExtractConfig:
    return ExtractConfig(cache_dir=str(folder), cache_gb=size / (1 << 30))


def copies(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix == ".svs")


def test_features_are_the_same(slides: list[Path], tmp_path: Path) -> None:
    coords = np.array([(x, y) for y in (0, 256) for x in (0, 256)], np.int32)
    for config in (ExtractConfig(), settings(tmp_path / "cache", 1 << 30)):
        extractor = Extractor(config)
        found = [next(iter(extractor.encode(SlideJob(p, coords, 256, 0.5, (0.5, 0.5)))))[1] for p in slides]
        extractor.close()
        if config.cache_dir is None:
            plain = found
    np.testing.assert_array_equal(plain, found)
    assert len(copies(tmp_path / "cache")) == 3
    assert not [p for p in (tmp_path / "cache").iterdir() if ".use-" in p.name], "nothing is in use any more"


def test_limit_and_use(slides: list[Path], tmp_path: Path) -> None:
    """Room for two: the third pushes out the one used longest ago, but not one that is in use."""
    folder = tmp_path / "cache"
    config = settings(folder, int(2.5 * max(p.stat().st_size for p in slides)))
    first = cache.stage(slides[0], config)
    second = cache.stage(slides[1], config)
    os.utime(first.path, (1, 1))
    second.release()
    third = cache.stage(slides[2], config)
    assert first.path.is_file(), "in use"
    assert not second.path.is_file()
    assert third.path.read_bytes() == slides[2].read_bytes()
    first.release()
    again = cache.stage(slides[1], config)
    assert len(copies(folder)) == 2
    assert again.path.is_file()


def test_changed_slide_is_copied_anew_and_marks_of_the_dead_go(slides: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    config = settings(folder, 1 << 30)
    old = cache.stage(slides[0], config)
    slides[0].write_bytes(slides[1].read_bytes())
    new = cache.stage(slides[0], config)
    assert new.path != old.path
    assert new.path.read_bytes() == slides[1].read_bytes()
    (folder / f"{new.path.name}.use-999999999-0").touch()
    cache.make_room(folder, 1 << 30)
    assert not (folder / f"{new.path.name}.use-999999999-0").exists()


def test_what_cannot_be_cached_is_read_in_place(slides: list[Path], tmp_path: Path) -> None:
    small = cache.stage(slides[0], settings(tmp_path / "cache", 1000))
    assert small.path == slides[0]
    assert "larger" in small.note
    (tmp_path / "file").write_text("in the way")
    blocked = cache.stage(slides[0], settings(tmp_path / "file", 1 << 30))
    assert blocked.path == slides[0]
    assert "not cached" in blocked.note
    many = tmp_path / "x.mrxs"
    many.write_bytes(b"x")
    assert cache.stage(many, settings(tmp_path / "cache", 1 << 30)).path == many


def test_half_copies_of_the_dead_go_and_those_of_the_living_stay(slides: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    dead, living = folder / f".a.svs.{2**22 + 1}", folder / f".b.svs.{os.getpid()}"
    for half in (dead, living):
        half.write_bytes(b"half")
    cache.make_room(folder, 1 << 30)
    assert not dead.exists()
    assert living.exists()
