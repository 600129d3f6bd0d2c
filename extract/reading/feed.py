"""Tiles of one or more slides read ahead by threads into a bounded set of buffers; the current slide goes first.

In: `SlideJob`s in the order in which they may be wanted. Out: blocks of tiles, or of features where the encoder may be
called by the reading threads. Knows nothing of chunks that are stored, nor of number types.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideError, SlideJob, UnreadableSlide
from mhim.extract.encoders import Encoder
from mhim.extract.reading import stain
from mhim.extract.reading.readers import TileReader, open_reader

_MOST_AHEAD = 2  # slides that may be read ahead


def even_rows(n: int, most: int) -> int:
    """Rows per chunk of `n` rows: at most `most`, evened out so that the last chunk is not a splinter."""
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


@dataclass(frozen=True, eq=False)
class Block:
    """Tiles that were read, in the buffer they lie in; or their features, if they were encoded at once."""

    buffer: np.ndarray
    tiles: np.ndarray
    features: np.ndarray | None = None


@dataclass(eq=False)
class Reading:
    """One slide being read: which blocks were scheduled, and what became of them."""

    job: SlideJob
    blocks: list[tuple[int, int]]  # (first row, stop row) in order
    next: int = 0  # first block that is not scheduled yet
    futures: dict[int, Future[Block]] = field(default_factory=dict)  # by first row
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


class Feed:
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
        self.released = threading.Condition(self.lock)  # told whenever a buffer comes back
        self.current: Reading | None = None
        self.waiting: list[Reading] = []  # read ahead, in order

    # ------------------------------------------------------------------ slides

    def ahead(self, job: SlideJob, start_row: int) -> None:
        with self.lock:
            if any(_same(r.job, job) for r in [*self.waiting, *([self.current] if self.current else [])]):
                return
            self.waiting.append(self._plan(job, start_row))
            while len(self.waiting) > _MOST_AHEAD:
                self._drop(self.waiting.pop(0))
            self._pump()

    def begin(self, job: SlideJob, start_row: int) -> Reading:
        with self.lock:
            plan = self._plan(job, start_row)
            found = next((r for r in self.waiting if _same(r.job, job) and r.blocks == plan.blocks), None)
            for stale in [r for r in self.waiting if _same(r.job, job)]:
                self.waiting.remove(stale)
                if stale is not found:
                    self._drop(stale)
            if self.current is not None:  # never ended: its blocks must not take the place of this slide's
                self._drop(self.current)
            self.current = found or plan
            self._pump()
            return self.current

    def end(self, reading: Reading) -> None:
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

    def rows_of(self, reading: Reading, first: int, stop: int) -> list[int]:
        return [a for a, _ in reading.blocks if first <= a < stop]

    def take(self, reading: Reading, row: int) -> Block:
        """The block that starts at `row`, when it is there; `give_back` unless it holds features.

        Threads that are still inside a slide that was given up may hold every buffer: then this waits for one of them.
        """
        with self.released:
            self._pump()
            while row not in reading.futures:
                if reading.dropped:
                    raise UnreadableSlide(f"{reading.job.path.name}: reading was given up")
                self.released.wait()
                self._pump()
            future = reading.futures.pop(row)
        return future.result()

    def give_back(self, block: Block) -> None:
        self._release(block.buffer)

    # ------------------------------------------------------------------ scheduling

    def _plan(self, job: SlideJob, start_row: int) -> Reading:
        n = len(job.coords_l0)
        rows = even_rows(n, self.config.chunk_rows)
        blocks = [
            (a, min(a + self.block_rows, chunk + rows, n))
            for chunk in range(start_row, n, rows)
            for a in range(chunk, min(chunk + rows, n), self.block_rows)
        ]
        return Reading(job, blocks)

    def _pump(self) -> None:
        """Schedule as many blocks as there are buffers; two stay reserved for the current slide."""
        for reading in ([self.current] if self.current else []) + self.waiting:
            spare = 0 if reading is self.current else 2
            while reading.next < len(reading.blocks) and self.in_use + spare < self.most:
                first, stop = reading.blocks[reading.next]
                reading.next += 1
                self.in_use += 1
                reading.futures[first] = self.pool.submit(self._fill, reading, first, stop)

    def _fill(self, reading: Reading, first: int, stop: int) -> Block:
        keep = False
        with self.lock:  # taken here and not when scheduled: a block that is called off has none to lose
            buffer = self.free.pop() if self.free else None
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
                    return Block(buffer, tiles, features)
            except SlideError:
                raise
            except Exception as error:
                raise UnreadableSlide(
                    f"{reading.job.path.name}: tiles {first} to {stop - 1} failed: {type(error).__name__}: {error}"
                ) from error
            finally:
                reading.leave(read, encoded)
            keep = True
            return Block(buffer, tiles)
        finally:
            if not keep:
                self._release(buffer)

    def _release(self, buffer: np.ndarray | None) -> None:
        with self.lock:
            if buffer is not None:
                self.free.append(buffer)
            self.in_use -= 1
            self._pump()
            self.released.notify_all()

    def _drop(self, reading: Reading) -> None:
        """Give up what was not taken: cancel what has not begun, take back the buffers of the rest."""
        reading.next = len(reading.blocks)
        reading.drop()
        for future in reading.futures.values():
            if future.cancel():
                self.in_use -= 1
            else:
                future.add_done_callback(self._recycle)
        reading.futures.clear()
        self.released.notify_all()

    def _recycle(self, future: Future[Block]) -> None:
        if future.exception() is None and future.result().features is None:
            self.give_back(future.result())
