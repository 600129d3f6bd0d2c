"""Features do not depend on how they were fed; what is wrong with one slide is told by name and harms no other."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideError, SlideJob, UnreadableSlide, encoders
from mhim.extract.encoders import Encoder
from mhim.extract.features import Extractor, even_rows
from mhim.extract.reading import feed
from tests.extract.slides import tissue_rgb, write_svs


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[SlideJob]:
    """Three slides of 238 tiles each."""
    folder = tmp_path_factory.mktemp("features")
    coords = np.array([(x, y) for y in range(0, 1000, 72) for x in range(0, 1200, 72)], np.int32)
    return [SlideJob(write_svs(folder / f"{i}.svs", tissue_rgb(seed=i)), coords, 64, 0.5, (0.5, 0.5)) for i in range(3)]


def run(job: SlideJob, start: int = 0, extractor: Extractor | None = None, **settings: object) -> np.ndarray:
    used = extractor or Extractor(ExtractConfig(chunk_rows=100, **settings))  # type: ignore[arg-type]
    try:
        pairs = list(used.encode(job, start))
    finally:
        if extractor is None:
            used.close()
    assert [first for first, _ in pairs] == list(np.cumsum([start] + [len(c) for _, c in pairs])[:-1])
    return np.concatenate([chunk for _, chunk in pairs])


@pytest.fixture(scope="module")
def torch_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("w") / "w.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    return {"encoder": "timm:test_vit", "weights": str(file), "offline": True}


@pytest.mark.parametrize("name", ["texture", "torch"])
def test_same_bytes_however_it_is_fed(jobs: list[SlideJob], torch_settings: dict[str, object], name: str) -> None:
    """Readers, queue, reading ahead and the row of resumption change no byte."""
    settings = torch_settings if name == "torch" else {}
    changes = [{"readers": 5, "queue_mb": 16}, {"batch": 3, "readers": 1}, {"reader": "openslide"}]
    first, second = (replace(job, coords_l0=job.coords_l0[60:165]) for job in jobs[:2])
    if name == "torch":  # a model costs 20 times as much: all changes at once
        changes = [{"readers": 5, "queue_mb": 16, "batch": 3, "reader": "openslide"}]
    whole = run(first, **settings)
    assert whole.dtype == np.float16
    assert len(np.unique(whole, axis=0)) > 40
    for change in changes:
        np.testing.assert_array_equal(whole, run(first, **settings, **change))
    rows = even_rows(len(first.coords_l0), 100)
    np.testing.assert_array_equal(whole[rows:], run(first, rows, **settings))
    ahead = Extractor(ExtractConfig(chunk_rows=100, **settings))  # type: ignore[arg-type]
    ahead.prefetch(second)
    ahead.prefetch(jobs[2])
    np.testing.assert_array_equal(whole, run(first, extractor=ahead))  # not one of those read ahead
    after = run(second, extractor=ahead)
    ahead.close()
    np.testing.assert_array_equal(after, run(second, **settings))


def test_chunks_are_even_and_float32_on_wish(jobs: list[SlideJob]) -> None:
    extractor = Extractor(ExtractConfig(chunk_rows=100, dtype="float32"))
    lengths = [len(chunk) for _, chunk in extractor.encode(jobs[0])]
    extractor.close()
    assert lengths == [80, 80, 78]
    np.testing.assert_array_equal(run(jobs[0], dtype="float32").astype(np.float16), run(jobs[0]))


def test_buffers_come_back(jobs: list[SlideJob]) -> None:
    """After every end, also an early one, no buffer is lost: a long run would otherwise come to a halt."""
    extractor = Extractor(ExtractConfig(chunk_rows=100, queue_mb=16), cores=2)
    for _ in range(3):
        extractor.prefetch(jobs[1])
        extractor.prefetch(jobs[2])
        broken_off = extractor.encode(jobs[0])
        next(broken_off)
        broken_off.close()
        run(jobs[2], extractor=extractor)
    inside = extractor._feed
    assert inside is not None
    extractor.close()
    assert inside.in_use == 0
    assert len(inside.free) <= inside.most


def test_the_open_files_are_closed(jobs: list[SlideJob], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    closed: list[object] = []
    plain = feed.open_reader

    def watched(job: SlideJob, config: ExtractConfig) -> object:
        reader = plain(job, config)
        opened.append(reader)
        close = reader.close
        reader.close = lambda: (closed.append(reader), close())[1]  # type: ignore[method-assign,func-returns-value]
        return reader

    monkeypatch.setattr(feed, "open_reader", watched)
    extractor = Extractor(ExtractConfig())
    extractor.prefetch(jobs[1])
    run(jobs[0], extractor=extractor)
    extractor.close()
    assert len(opened) >= 1
    assert len(closed) == len(opened) == len({id(r) for r in closed})


def own(encode: object, dim: int = 2) -> Encoder:
    return Encoder("own", encode, dim, None, None, "1")  # type: ignore[arg-type]


def test_nan_and_overflow_name_the_tile(jobs: list[SlideJob], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [0]

    def spoil(value: float) -> Encoder:
        seen[0] = 0

        def encode(tiles: np.ndarray) -> np.ndarray:
            out = np.ones((len(tiles), 2), np.float32)
            if seen[0] <= 137 < seen[0] + len(tiles):
                out[137 - seen[0], 1] = value
            seen[0] += len(tiles)
            return out

        return own(encode)

    x, y = jobs[0].coords_l0[137].tolist()
    for value, text in ((np.nan, "NaN or Inf"), (1e6, "too large for float16"), (-np.inf, "NaN or Inf")):
        monkeypatch.setattr(encoders, "build", lambda config, v=value: spoil(v))
        with pytest.raises(SlideError, match=rf"0\.svs: tile 137 at level-0 \({x}, {y}\).*{text}"):
            run(jobs[0])
    monkeypatch.setattr(encoders, "build", lambda config: spoil(1e6))
    assert run(jobs[0], dtype="float32")[137, 1] == 1e6


def test_declared_width_is_asserted(jobs: list[SlideJob], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "build", lambda config: own(lambda t: np.zeros((len(t), 3), np.float32)))
    with pytest.raises(encoders.EncoderError, match="declares 2"):
        run(jobs[0])
    shared = replace(own(lambda t: np.zeros((len(t), 3), np.float32)), threadsafe=True)  # encoded by reading threads
    monkeypatch.setattr(encoders, "build", lambda config: shared)
    with pytest.raises(encoders.EncoderError, match="declares 2"):
        run(jobs[0])


def test_a_slide_that_dies_half_way_harms_no_other(jobs: list[SlideJob], tmp_path: Path) -> None:
    """Cut in the middle, not a slide at all, gone: its own error each, and the extractor goes on."""
    data = jobs[0].path.read_bytes()
    cut = tmp_path / "cut.svs"
    cut.write_bytes(data[: len(data) // 2])
    (tmp_path / "text.svs").write_text("no slide")
    alone = run(jobs[0])
    extractor = Extractor(ExtractConfig(chunk_rows=100))
    for name in ("cut.svs", "text.svs", "gone.svs"):
        bad = replace(jobs[0], path=tmp_path / name)
        extractor.prefetch(bad)
        with pytest.raises(SlideError, match=name.replace(".", r"\.")):
            list(extractor.encode(bad))
        np.testing.assert_array_equal(run(jobs[0], extractor=extractor), alone)
    extractor.close()


def test_a_reader_that_breaks_is_one_slides_failure(jobs: list[SlideJob], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any exception in a reading thread ends that slide, with its cause; nothing hangs."""

    class Broken:
        kind, note = "direct", ""

        def fill(self, coords: np.ndarray, out: np.ndarray) -> None:
            raise MemoryError("no more")

        def close(self) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(feed, "open_reader", lambda job, config: Broken())
        extractor = Extractor(ExtractConfig())
        with pytest.raises(UnreadableSlide, match=r"0\.svs: tiles 0 to 63 failed: MemoryError"):
            list(extractor.encode(jobs[0]))
    assert len(run(jobs[1], extractor=extractor)) == len(jobs[1].coords_l0)
    extractor.close()


def test_no_tiles_no_chunks(jobs: list[SlideJob]) -> None:
    empty = SlideJob(jobs[0].path, np.empty((0, 2), np.int32), 64, 0.5, (0.5, 0.5))
    extractor = Extractor(ExtractConfig())
    extractor.prefetch(empty)
    assert list(extractor.encode(empty)) == []
    extractor.close()


def test_reading_runs_ahead_of_the_encoder(jobs: list[SlideJob], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the encoder works on the first block, later blocks and the next slide are being read, within bounds."""
    read: list[str] = []
    lock = threading.Lock()
    plain = feed.open_reader

    class Watched:
        def __init__(self, job: SlideJob, config: ExtractConfig) -> None:
            self.inner = plain(job, config)
            self.kind, self.note, self.name = self.inner.kind, "", job.path.name

        def fill(self, coords: np.ndarray, out: np.ndarray) -> None:
            self.inner.fill(coords, out)
            with lock:
                read.append(self.name)

        def close(self) -> None:
            self.inner.close()

    monkeypatch.setattr(feed, "open_reader", Watched)
    ahead = threading.Event()

    def encode(tiles: np.ndarray) -> np.ndarray:
        for _ in range(400):
            with lock:
                if "1.svs" in read:
                    ahead.set()
                    break
            threading.Event().wait(0.01)
        return np.ones((len(tiles), 2), np.float32)

    monkeypatch.setattr(encoders, "build", lambda config: own(encode))
    extractor = Extractor(ExtractConfig(), cores=4)
    extractor.prefetch(jobs[1])
    list(extractor.encode(jobs[0]))
    extractor.close()
    assert ahead.is_set()
    assert extractor.stats.numbers()["tiles"] == len(jobs[0].coords_l0)


@pytest.mark.parametrize("name", ["reinhard", "macenko"])
def test_stain_normalisation_brings_two_stainings_together(name: str) -> None:
    """The same tissue stained darker and redder ends nearer to the first than it began; glass stays glass."""
    from mhim.extract.reading.stain import normaliser

    change = normaliser(name)
    assert change is not None
    rng = np.random.default_rng(0)
    amount = rng.gamma(2, 0.5, (96, 96, 2))
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])

    def stained(strength: tuple[float, float]) -> np.ndarray:
        return np.clip(245 * np.exp(-(amount * strength) @ stains), 0, 255).astype(np.uint8)

    pair = np.stack([stained((0.7, 0.5)), stained((1.0, 0.9))])
    before = np.abs(pair[0].astype(int) - pair[1]).mean()
    once = pair.copy()
    change(once)
    assert np.abs(once[0].astype(int) - once[1]).mean() < 0.35 * before
    again = pair.copy()
    change(again)
    np.testing.assert_array_equal(once, again)
    glass = np.full((1, 96, 96, 3), 244, np.uint8)
    change(glass)
    assert (glass == 244).all()
