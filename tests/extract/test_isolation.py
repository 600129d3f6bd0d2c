"""What is wrong with one slide stays with it: whatever encoder, reader and order, exactly the bad ones fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideError, SlideJob, encoders
from mhim.extract.encoders import Encoder
from mhim.extract.features import Extractor
from mhim.extract.reading import feed
from tests.extract.slides import tissue_rgb, write_svs

ORDER = "bgbbbggb"  # bad ones before, between and after good ones, more in a row than there are buffers in flight


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One slide of tissue, and one that is wholly black, on which the encoders here break."""
    folder = tmp_path_factory.mktemp("isolation")
    black = np.zeros((640, 640, 3), np.uint8)
    return {"g": write_svs(folder / "good.svs", tissue_rgb(seed=1)), "b": write_svs(folder / "bad.svs", black)}


def jobs(files: dict[str, Path], order: str = ORDER, tiles: int = 150) -> list[SlideJob]:
    """One job per letter, each of its own number of tiles, so that no two are the same."""
    grid = np.array([(x, y) for y in range(0, 560, 40) for x in range(0, 560, 40)], np.int32)
    return [SlideJob(files[kind], grid[: tiles + n], 64, 0.5, (0.5, 0.5)) for n, kind in enumerate(order)]


def nan(tiles: np.ndarray, features: np.ndarray) -> np.ndarray:
    return np.where(tiles.reshape(len(tiles), -1).any(axis=1)[:, None], features, np.nan).astype(np.float32)


def raises(tiles: np.ndarray, features: np.ndarray) -> np.ndarray:
    if not tiles.any():
        raise RuntimeError("the model does not like black")
    return features


def narrow(tiles: np.ndarray, features: np.ndarray) -> np.ndarray:
    return features if tiles.any() else features[:, :1]


def spoiled(encoder: Encoder, how: Callable[[np.ndarray, np.ndarray], np.ndarray], early: bool) -> Encoder:
    """`encoder`, breaking on black tiles: while it waits for the device, or (early) as it starts on a batch."""

    def launch(tiles: np.ndarray) -> Callable[[], np.ndarray]:
        assert encoder.launch is not None
        wait, seen = encoder.launch(tiles), tiles.copy()
        if early:
            how(seen, np.zeros((len(seen), encoder.dim), np.float32))
        return lambda: how(seen, wait())

    return replace(
        encoder,
        encode=lambda tiles: how(tiles, encoder.encode(tiles)),
        launch=launch if encoder.launch else None,
    )


def own(threadsafe: bool) -> Encoder:
    """A user's own encoder: the mean colour of each tile."""
    means: Callable[[np.ndarray], np.ndarray] = lambda tiles: tiles.mean((1, 2)).astype(np.float32)  # noqa: E731
    return Encoder("own", means, 3, None, None, "1", threadsafe=threadsafe)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("w") / "w.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    return file


def check(work: list[SlideJob], bad: Path, settings: dict[str, Any]) -> None:
    """Encode all jobs twice with one extractor: exactly those of the file `bad` fail, the others give what they give
    alone."""
    with_one = Extractor(ExtractConfig(chunk_rows=80, **settings), cores=1)
    alone = Extractor(ExtractConfig(chunk_rows=80, **settings), cores=1)
    right = {n: np.concatenate([c for _, c in alone.encode(job)]) for n, job in enumerate(work) if job.path != bad}
    for _ in range(2):
        for number, job in enumerate(work):
            for ahead in work[number + 1 : number + 2]:
                with_one.prefetch(ahead)
            if job.path == bad:
                with pytest.raises((SlideError, RuntimeError, encoders.EncoderError), match=r"black|NaN|declares"):
                    list(with_one.encode(job))
            else:
                made = np.concatenate([chunk for _, chunk in with_one.encode(job)])
                np.testing.assert_array_equal(made, right[number])
    inside = with_one._feed
    assert inside is not None
    with_one.close()
    alone.close()
    assert inside.in_use == 0


@pytest.mark.parametrize(("how", "reader"), [(nan, "auto"), (nan, "openslide"), (raises, "auto"), (narrow, "auto")])
@pytest.mark.parametrize("threadsafe", [True, False])
def test_exactly_the_bad_fail_with_an_own_encoder(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, how: Any, reader: str, threadsafe: bool
) -> None:
    monkeypatch.setattr(encoders, "build", lambda config: spoiled(own(threadsafe), how, early=False))
    check(jobs(files), files["b"], {"encoder": "own.own", "reader": reader, "queue_mb": 16, "readers": 2})


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_exactly_the_bad_fail_with_a_torch_encoder(
    files: dict[str, Path], weights: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, early: bool
) -> None:
    """compile: such a model is not called by several threads; a real compilation would only cost its minute here."""
    import torch

    monkeypatch.setattr(torch, "compile", lambda module: module)
    build = encoders.build
    monkeypatch.setattr(encoders, "build", lambda config: spoiled(build(config), raises if early else nan, early))
    settings = {"encoder": "timm:test_vit", "weights": str(weights), "offline": True, "compile": compiled}
    check(jobs(files, "bbgbg", 70), files["b"], settings | {"queue_mb": 16, "readers": 2})


def test_a_slide_waits_for_buffers_that_a_failed_one_still_reads_into(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow reads of a slide that was given up hold every buffer: the next slide gets them when they are done."""
    slow, first_done = threading.Event(), threading.Event()
    plain = feed.open_reader

    class Slow:
        kind, note = "direct", ""

        def fill(self, coords: np.ndarray, out: np.ndarray) -> None:
            out[...] = 0
            if first_done.is_set():
                slow.wait(10)
            first_done.set()

        def close(self) -> None:
            pass

    def chosen(job: SlideJob, config: ExtractConfig) -> Any:
        return Slow() if job.path == files["b"] else plain(job, config)

    monkeypatch.setattr(feed, "open_reader", chosen)
    monkeypatch.setattr(encoders, "build", lambda config: spoiled(own(False), nan, early=False))
    extractor = Extractor(ExtractConfig(encoder="own.own", queue_mb=16, readers=8))
    bad, good = jobs(files)[0], jobs(files)[1]
    with pytest.raises(SlideError, match="NaN"):
        list(extractor.encode(replace(bad, coords_l0=np.repeat(bad.coords_l0, 4, axis=0))))
    threading.Timer(0.3, slow.set).start()
    assert sum(len(chunk) for _, chunk in extractor.encode(good)) == len(good.coords_l0)
    extractor.close()


def test_features_that_are_a_view_of_the_tiles_are_copied(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that hands the tiles' own memory back would see it change under the next block."""
    corner: Callable[[np.ndarray], np.ndarray] = lambda tiles: tiles[:, 0, 0]  # noqa: E731
    monkeypatch.setattr(encoders, "build", lambda config: replace(own(False), encode=corner))
    job = jobs(files)[1]
    many = replace(job, coords_l0=np.concatenate([job.coords_l0, job.coords_l0[::-1]] * 2))
    extractor = Extractor(ExtractConfig(encoder="own.own", queue_mb=16, readers=2))
    made = np.concatenate([chunk for _, chunk in extractor.encode(many)])
    extractor.close()
    half = len(made) // 2
    np.testing.assert_array_equal(made[:half], made[half:])
    assert len(np.unique(made, axis=0)) > 10
