"""One slide and an encoder -> chunks of features, with reading ahead across the borders of slides.

In: `SlideJob`s and the settings. Out: (first row, chunk) pairs in the order of the coordinates, the same bytes whatever
the readers, the queue or the row it resumes at. Knows nothing of files that are written, nor of cohorts.

Reading, decoding and resizing run in threads (decoders and OpenSlide release the GIL) into a fixed set of reused
buffers, so that memory is `queue_mb` whatever the slide's size; blocks of the current slide go first, and what is left
of the set reads the next one. On a CPU the same threads encode what they read, each on its own core.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mhim.configs.processes import usable_cores
from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideError, SlideJob
from mhim.extract import encoders as _encoders
from mhim.extract.encoders import Encoder, GpuFailed
from mhim.extract.reading.feed import Block, Feed, Reading, even_rows

BLOCK_ROWS = 64  # tiles read by one task on a CPU: 12 MiB at 256 px, a few ms of decoding


@dataclass
class Stats:
    """What one slide took. read_s and encoded_s: seconds of work over all reading threads (encoded_s: of encoding, if
    they do that, too); encode_s: the encoder's own; wait_s: its waiting for tiles; wall_s: all of it."""

    tiles: int = 0
    read_s: float = 0.0
    encoded_s: float = 0.0
    encode_s: float = 0.0
    wait_s: float = 0.0
    wall_s: float = 0.0
    threads: int = 1
    reader: str = ""
    note: str = ""
    retreats: int = 0

    def numbers(self) -> dict[str, float]:
        """For the run log, whose sums over slides mean something (they are turned into tiles/s).

        read_s: as long as the threads together would have read, had they all been busy."""
        encode_s = self.encode_s + self.encoded_s / self.threads
        seconds = {"read_s": self.read_s / self.threads, "encode_s": encode_s, "waited_s": self.wait_s}
        return {"tiles": self.tiles, **{k: round(v, 3) for k, v in seconds.items()}, "work_s": round(self.wall_s, 3)}


def whole_machine(config: ExtractConfig) -> bool:
    """True if one extraction uses all cores or a GPU, so that slides should be taken one after the other."""
    return config.encoder != "texture"


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
        self._feed: Feed | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder, built at first use."""
        if self._encoder is None:
            self._encoder = _encoders.build(self.config)
            if self.config.encoder != "texture" and not (self.config.gpu or self.config.gpus):
                # Each core runs the model on tiles of its own: threads that share one batch wait for each other at
                # every layer. Beside other busy programs that cost a ResNet-50 on two cores twice the time.
                _limit_torch(1 if self._encoder.threadsafe else self.cores)
        return self._encoder

    def attrs(self) -> dict[str, Any]:
        """What is stored with the features: encoder, weights, width, pooling, transform, precision, licence.

        The encoder is called as the settings call it; what it calls itself (`encoder_name`) is a note."""
        e = self.encoder
        own = {"encoder_name": e.name} if e.name != self.config.encoder else {}
        return {
            "encoder": self.config.encoder,
            **own,
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
        done = start_row
        try:
            for first in range(start_row, n, rows):
                chunk = np.empty((min(rows, n - first), self.encoder.dim), self.config.dtype)
                with closing(self._blocks(feed, reading, first, first + len(chunk), stats)) as blocks:
                    for row, features in blocks:
                        _store(chunk, row - first, features, job, row)
                        done = row + len(features)
                stats.tiles += len(chunk)
                stats.wall_s = time.perf_counter() - began
                stats.read_s, stats.retreats = reading.read_s, self.encoder.retreats()
                stats.encoded_s += reading.take_encode_s()
                stats.reader, stats.note = reading.description()
                yield first, chunk
        except GpuFailed as error:
            raise GpuFailed(f"{job.path.name}: encoding stopped after {done} of {n} tiles: {error}") from error
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

    def _feeder(self, job: SlideJob) -> Feed:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="reader")
        if self._feed is None or self._feed.tile_px != job.tile_px:
            if self._feed is not None:
                self._feed.close()
            encoder = self.encoder
            # of large tiles fewer, so that eight blocks find room and as many threads read
            room = self.config.queue_mb * (1 << 20) // (8 * 3 * job.tile_px**2)
            block_rows = min(max(encoder.batch, BLOCK_ROWS), max(room, 16))
            if encoder.threadsafe and encoder.batch:  # short blocks: every core has work, also on a small slide
                block_rows = 2 * encoder.batch
            most = 6 if self.config.queue_mb < 64 else max(4, 3 * self._threads)
            self._feed = Feed(self.config, self._pool, job.tile_px, block_rows, most, encoder)
        return self._feed

    def _blocks(
        self, feed: Feed, reading: Reading, first: int, stop: int, stats: Stats
    ) -> Generator[tuple[int, np.ndarray]]:
        """(row, float32 features) of every block between two rows, one launch kept in flight on a device.

        Close it: however it ends, every block in flight is given back, so that no slide takes buffers from the next."""
        flying: deque[tuple[int, Block, Callable[[], np.ndarray]]] = deque()
        launch = self.encoder.launch or (lambda tiles: partial(self.encoder.encode, tiles))
        try:
            for row in feed.rows_of(reading, first, stop):
                waited = time.perf_counter()
                block = feed.take(reading, row)
                worked = time.perf_counter()
                stats.wait_s += worked - waited
                if block.features is not None:  # encoded where it was read
                    yield row, self._checked(block.features, len(block.tiles))
                    continue
                try:
                    flying.append((row, block, launch(block.tiles)))
                except BaseException:
                    feed.give_back(block)
                    raise
                landed = self._land(feed, flying.popleft()) if len(flying) > 1 else None
                stats.encode_s += time.perf_counter() - worked
                if landed:
                    yield landed
            while flying:
                worked = time.perf_counter()
                landed = self._land(feed, flying.popleft())
                stats.encode_s += time.perf_counter() - worked
                yield landed
        finally:
            for _, block, _ in flying:
                feed.give_back(block)

    def _land(self, feed: Feed, flight: tuple[int, Block, Callable[[], np.ndarray]]) -> tuple[int, np.ndarray]:
        row, block, wait = flight
        rows = len(block.tiles)
        try:
            features = self._checked(wait(), rows)
            if np.may_share_memory(features, block.buffer):
                features = features.copy()  # a view of the tiles would change with the buffer's next use
        finally:
            feed.give_back(block)
        return row, features

    def _checked(self, features: np.ndarray, rows: int) -> np.ndarray:
        """Raise EncoderError unless there is a vector of the declared width for each tile."""
        if features.shape != (rows, self.encoder.dim):
            raise _encoders.EncoderError(
                f"encoder {self.encoder.name!r} gave {features.shape} for {rows} tiles and declares {self.encoder.dim}"
            )
        return features


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
    """Threads of torch. To import it for that would cost an encoder that does without 3 s: one that imports it later,
    in `encode`, starts with what the environment says."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(cores)
    else:
        os.environ["OMP_NUM_THREADS"] = str(cores)
