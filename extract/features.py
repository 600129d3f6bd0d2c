"""One slide and an encoder -> chunks of features, with reading ahead across the borders of slides.

In: `SlideJob`s and the settings. Out: (first row, chunk) pairs in the order of the coordinates, the same bytes whatever
the readers, the queue or the row it resumes at. Knows nothing of files that are written, nor of cohorts.

Reading, decoding and resizing run in threads (decoders and OpenSlide release the GIL) into a fixed set of reused
buffers, so that memory is `queue_mb` whatever the slide's size; blocks of the current slide go first, and what is left
of the set reads the next one.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from configs.schema import ExtractConfig
from extract import SlideError, SlideJob, UnreadableSlide, stain
from extract import encoders as _encoders
from extract.encoders import Encoder
from extract.readers import TileReader, open_reader

BLOCK_ROWS = 64  # tiles read by one task on a CPU: 12 MiB at 256 px, a few ms of decoding
_MOST_AHEAD = 2  # slides that may be read ahead


@dataclass
class Stats:
    """What one slide took. read_s and encode_s are seconds of work (read_s over all threads), wait_s is the encoder's
    waiting for tiles, wall_s all of it."""

    tiles: int = 0
    read_s: float = 0.0
    encode_s: float = 0.0
    wait_s: float = 0.0
    wall_s: float = 0.0
    threads: int = 1
    reader: str = ""
    note: str = ""
    retreats: int = 0

    @property
    def limit(self) -> str:
        """Which side limits: `reading` if the encoder waited for more than a tenth of the time."""
        return "reading" if self.wait_s > 0.1 * max(self.wall_s, 1e-9) else "encoder"

    def numbers(self) -> dict[str, float]:
        """Rates for the run log, tiles/s."""
        return {
            "tiles": self.tiles,
            "read_tiles_s": round(self.tiles * self.threads / max(self.read_s, 1e-9), 1),
            "encode_tiles_s": round(self.tiles / max(self.encode_s, 1e-9), 1),
            "tiles_s": round(self.tiles / max(self.wall_s, 1e-9), 1),
            "waited_s": round(self.wait_s, 3),
        }

    def __str__(self) -> str:
        n = self.numbers()
        return (
            f"{self.tiles} tiles at {n['tiles_s']:g}/s (reading {n['read_tiles_s']:g}/s by {self.reader}, "
            f"encoding {n['encode_tiles_s']:g}/s; limited by {self.limit})"
        )


def even_rows(n: int, most: int) -> int:
    """Rows per chunk of `n` rows: at most `most`, evened out so that the last chunk is not a splinter."""
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


def whole_machine(config: ExtractConfig) -> bool:
    """True if one extraction uses all cores or a GPU, so that slides should be taken one after the other."""
    return config.encoder != "texture"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Extractor:
    """Turns slides into features. `prefetch` is a hint; `encode` does the work; `close` when done.

    cores: CPU cores this extractor may use; 0 is all that the process may run on. stats: of the last slide.
    """

    def __init__(self, config: ExtractConfig, cores: int = 0) -> None:
        self.config = config
        self.cores = cores or usable_cores()
        self.stats = Stats()
        self._encoder: Encoder | None = None
        self._threads = config.readers or self.cores
        self._pool: ThreadPoolExecutor | None = None
        self._feed: _Feed | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder, built at first use."""
        if self._encoder is None:
            if self.config.encoder != "texture" and not self.config.gpu:
                _limit_torch(self.cores)
            self._encoder = _encoders.build(self.config)
        return self._encoder

    def attrs(self) -> dict[str, Any]:
        """What is stored with the features: encoder, weights, width, pooling, transform, precision, licence."""
        e = self.encoder
        return {
            "encoder": e.name,
            "weights_id": e.weights_id,
            "dim": e.dim,
            **e.info,
            "stain_norm": self.config.stain_norm,
        }

    def prefetch(self, job: SlideJob, start_row: int = 0) -> None:
        """Begin to read `job` ahead of its `encode`; bounded, and forgotten if other slides come first."""
        self._feeder(job).ahead(job, start_row)

    def encode(self, job: SlideJob, start_row: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, features (rows, dim) of `config.dtype`) from `start_row`, the start of a chunk, on.

        Chunks have `even_rows(N, chunk_rows)` rows. Raises SlideError for what concerns this slide only.
        """
        n = len(job.coords_l0)
        rows = even_rows(n, self.config.chunk_rows)
        if start_row % rows and start_row < n:
            raise ValueError(f"start_row {start_row} is not the start of a chunk of {rows} rows")
        began = time.perf_counter()
        self.stats = stats = Stats(threads=self._threads)
        if start_row >= n:
            return
        feed = self._feeder(job)
        reading = feed.begin(job, start_row)
        try:
            for first in range(start_row, n, rows):
                chunk = np.empty((min(rows, n - first), self.encoder.dim), self.config.dtype)
                for row, features in self._blocks(feed, reading, first, first + len(chunk), stats):
                    _store(chunk, row - first, features, job, row)
                stats.tiles += len(chunk)
                stats.wall_s = time.perf_counter() - began
                stats.read_s, stats.retreats = reading.read_s, self.encoder.retreats()
                stats.encode_s += reading.take_encode_s()
                stats.reader, stats.note = reading.description()
                yield first, chunk
        finally:
            feed.end(reading)

    def close(self) -> None:
        """Stop reading ahead and let go of threads and files."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _feeder(self, job: SlideJob) -> _Feed:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="reader")
        if self._feed is None or self._feed.tile_px != job.tile_px:
            if self._feed is not None:
                self._feed.close()
            encoder = self.encoder
            block_rows = encoder.batch if encoder.batch > BLOCK_ROWS else BLOCK_ROWS
            most = 6 if self.config.queue_mb < 64 else max(4, 3 * self._threads)
            self._feed = _Feed(self.config, self._pool, job.tile_px, block_rows, most, encoder)
        return self._feed

    def _blocks(
        self, feed: _Feed, reading: _Reading, first: int, stop: int, stats: Stats
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(row, float32 features) of every block between two rows, one launch kept in flight on a device."""
        flying: deque[tuple[int, _Block, Callable[[], np.ndarray]]] = deque()
        launch = self.encoder.launch or (lambda tiles: partial(self.encoder.encode, tiles))
        for row in feed.rows_of(reading, first, stop):
            waited = time.perf_counter()
            block = feed.take(reading, row)
            worked = time.perf_counter()
            stats.wait_s += worked - waited
            if block.features is not None:  # encoded where it was read
                yield row, block.features
                continue
            flying.append((row, block, launch(block.tiles)))
            landed = self._land(feed, flying.popleft()) if len(flying) > 1 else None
            stats.encode_s += time.perf_counter() - worked
            if landed:
                yield landed
        while flying:
            worked = time.perf_counter()
            landed = self._land(feed, flying.popleft())
            stats.encode_s += time.perf_counter() - worked
            yield landed

    def _land(self, feed: _Feed, flight: tuple[int, _Block, Callable[[], np.ndarray]]) -> tuple[int, np.ndarray]:
        row, block, wait = flight
        features = wait()
        rows = len(block.tiles)
        feed.give_back(block)
        if features.shape != (rows, self.encoder.dim):
            raise _encoders.EncoderError(
                f"encoder {self.encoder.name!r} gave {features.shape} for {rows} tiles and declares {self.encoder.dim}"
            )
        return row, features


def _store(chunk: np.ndarray, at: int, features: np.ndarray, job: SlideJob, row: int) -> None:
    """Put float32 rows into the chunk; a number that is not finite there names its tile."""
    target = chunk[at : at + len(features)]
    with np.errstate(over="ignore"):
        target[...] = features
    if np.isfinite(target).all():
        return
    bad = int(np.flatnonzero(~np.isfinite(target).all(axis=1))[0])
    x, y = (int(v) for v in job.coords_l0[row + bad])
    where = f"{job.path.name}: tile {row + bad} at level-0 ({x}, {y})"
    if np.isfinite(features[bad]).all():
        top = float(np.abs(features[bad]).max())
        raise SlideError(
            f"{where}: its features reach {top:g}, too large for float16: store them with --set extract.dtype=float32"
        )
    raise SlideError(
        f"{where}: the encoder gave NaN or Inf: try --set extract.precision=float32, and look at that tile"
    )


def _limit_torch(cores: int) -> None:
    import torch

    torch.set_num_threads(cores)


@dataclass(frozen=True, eq=False)
class _Block:
    """Tiles that were read, in the buffer they lie in; or their features, if they were encoded at once."""

    buffer: np.ndarray
    tiles: np.ndarray
    features: np.ndarray | None = None


@dataclass(eq=False)
class _Reading:
    """One slide being read: which blocks were scheduled, and what became of them."""

    job: SlideJob
    blocks: list[tuple[int, int]]  # (first row, stop row) in order
    next: int = 0  # first block that is not scheduled yet
    futures: dict[int, Future[_Block]] = field(default_factory=dict)  # by first row
    lock: threading.Lock = field(default_factory=threading.Lock)
    reader: TileReader | None = None
    active: int = 0  # tasks inside the reader: the file stays open for them
    dropped: bool = False
    read_s: float = 0.0
    encode_s: float = 0.0

    def description(self) -> tuple[str, str]:
        return (self.reader.kind, self.reader.note) if self.reader else ("", "")

    def take_encode_s(self) -> float:
        with self.lock:
            seconds, self.encode_s = self.encode_s, 0.0
        return seconds

    def enter(self, config: ExtractConfig) -> TileReader:
        """The open reader; `leave` when done with it."""
        with self.lock:
            if self.dropped:
                raise UnreadableSlide(f"{self.job.path.name}: reading was given up")
            if self.reader is None:
                self.reader = open_reader(self.job, config)
            self.active += 1
            return self.reader

    def leave(self, read_s: float, encode_s: float) -> None:
        with self.lock:
            self.active -= 1
            self.read_s += read_s
            self.encode_s += encode_s
            self._close_if_idle()

    def drop(self) -> None:
        with self.lock:
            self.dropped = True
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self.dropped and not self.active and self.reader is not None:
            self.reader.close()
            self.reader = None


def _same(a: SlideJob, b: SlideJob) -> bool:
    """True if both ask for the same tiles of the same file."""
    return a is b or (
        (a.path, a.tile_px, a.mpp, a.slide_mpp) == (b.path, b.tile_px, b.mpp, b.slide_mpp)
        and np.array_equal(a.coords_l0, b.coords_l0)
    )


class _Feed:
    """Reads blocks of tiles ahead into a bounded set of buffers; the current slide first."""

    def __init__(
        self,
        config: ExtractConfig,
        pool: ThreadPoolExecutor,
        tile_px: int,
        block_rows: int,
        most: int,
        encoder: Encoder,
    ) -> None:
        self.config = config
        self.pool = pool
        self.tile_px = tile_px
        self.block_rows = block_rows
        self.encoder = encoder
        block_bytes = block_rows * tile_px * tile_px * 3
        self.most = max(3, min(most, config.queue_mb * (1 << 20) // block_bytes))
        self.normalise = stain.normaliser(config.stain_norm)
        self.free: list[np.ndarray] = []
        self.in_use = 0
        self.lock = threading.RLock()
        self.current: _Reading | None = None
        self.waiting: list[_Reading] = []  # read ahead, in order

    # ------------------------------------------------------------------ slides

    def ahead(self, job: SlideJob, start_row: int) -> None:
        with self.lock:
            if any(_same(r.job, job) for r in [*self.waiting, *([self.current] if self.current else [])]):
                return
            self.waiting.append(self._plan(job, start_row))
            while len(self.waiting) > _MOST_AHEAD:
                self._drop(self.waiting.pop(0))
            self._pump()

    def begin(self, job: SlideJob, start_row: int) -> _Reading:
        with self.lock:
            plan = self._plan(job, start_row)
            found = next((r for r in self.waiting if _same(r.job, job) and r.blocks == plan.blocks), None)
            for stale in [r for r in self.waiting if _same(r.job, job)]:
                self.waiting.remove(stale)
                if stale is not found:
                    self._drop(stale)
            self.current = found or plan
            self._pump()
            return self.current

    def end(self, reading: _Reading) -> None:
        with self.lock:
            if self.current is reading:
                self.current = None
            self._drop(reading)
            self._pump()

    def close(self) -> None:
        with self.lock:
            readings = [*self.waiting, *([self.current] if self.current else [])]
            self.waiting, self.current = [], None
            for reading in readings:
                self._drop(reading)

    def rows_of(self, reading: _Reading, first: int, stop: int) -> list[int]:
        return [a for a, _ in reading.blocks if first <= a < stop]

    def take(self, reading: _Reading, row: int) -> _Block:
        """The block that starts at `row`, when it is there; `give_back` unless it holds features."""
        with self.lock:
            self._pump()
            future = reading.futures.pop(row)
        return future.result()

    def give_back(self, block: _Block) -> None:
        self._release(block.buffer)

    # ------------------------------------------------------------------ scheduling

    def _plan(self, job: SlideJob, start_row: int) -> _Reading:
        n = len(job.coords_l0)
        rows = even_rows(n, self.config.chunk_rows)
        blocks = [
            (a, min(a + self.block_rows, chunk + rows, n))
            for chunk in range(start_row, n, rows)
            for a in range(chunk, min(chunk + rows, n), self.block_rows)
        ]
        return _Reading(job, blocks)

    def _pump(self) -> None:
        """Schedule as many blocks as there are buffers; two stay reserved for the current slide."""
        for reading in ([self.current] if self.current else []) + self.waiting:
            spare = 0 if reading is self.current else 2
            while reading.next < len(reading.blocks) and self.in_use + spare < self.most:
                first, stop = reading.blocks[reading.next]
                reading.next += 1
                self.in_use += 1
                buffer = self.free.pop() if self.free else None
                reading.futures[first] = self.pool.submit(self._fill, reading, first, stop, buffer)

    def _fill(self, reading: _Reading, first: int, stop: int, buffer: np.ndarray | None) -> _Block:
        keep = False
        try:
            if buffer is None:
                shape = (self.block_rows, self.tile_px, self.tile_px, 3)
                buffer = self.encoder.empty(shape) if self.encoder.empty else np.empty(shape, np.uint8)
            tiles = buffer[: stop - first]
            began = time.perf_counter()
            read = encoded = 0.0
            try:
                reader = reading.enter(self.config)
            except SlideError:
                raise
            except Exception as error:
                raise UnreadableSlide(
                    f"{reading.job.path.name}: cannot be opened: {type(error).__name__}: {error}"
                ) from error
            try:
                reader.fill(reading.job.coords_l0[first:stop], tiles)
                if self.normalise is not None:
                    self.normalise(tiles)
                read = time.perf_counter() - began
                if self.encoder.threadsafe:
                    features = self.encoder.encode(tiles)
                    encoded = time.perf_counter() - began - read
                    return _Block(buffer, tiles, features)
            except SlideError:
                raise
            except Exception as error:
                raise UnreadableSlide(
                    f"{reading.job.path.name}: tiles {first} to {stop - 1} failed: {type(error).__name__}: {error}"
                ) from error
            finally:
                reading.leave(read, encoded)
            keep = True
            return _Block(buffer, tiles)
        finally:
            if not keep:
                self._release(buffer)

    def _release(self, buffer: np.ndarray | None) -> None:
        with self.lock:
            if buffer is not None:
                self.free.append(buffer)
            self.in_use -= 1
            self._pump()

    def _drop(self, reading: _Reading) -> None:
        """Give up what was not taken: cancel what has not begun, take back the buffers of the rest."""
        reading.next = len(reading.blocks)
        reading.drop()
        for future in reading.futures.values():
            if future.cancel():
                self.in_use -= 1
            else:
                future.add_done_callback(self._recycle)
        reading.futures.clear()

    def _recycle(self, future: Future[_Block]) -> None:
        if future.exception() is None and future.result().features is None:
            self.give_back(future.result())
