"""The extractor of one process over many slides: built once, and given up where no further slide could be encoded.

In: the settings of extraction, then jobs. Out: chunks of features, or the reason why every slide would fail. Knows no
files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mhim.configs.lookup import LookupFailed
from mhim.configs.schema import ExtractConfig
from mhim.pipeline.resume.stage import Stopped

if TYPE_CHECKING:
    from mhim.extract import SlideJob
    from mhim.extract.features import Extractor


class Encoding:
    """Picklable, since it builds nothing before `ready`. cores: as `Extractor`'s."""

    def __init__(self, config: ExtractConfig, cores: int) -> None:
        self.config = config
        self.cores = cores
        self._extractor: Extractor | None = None
        self._broken = ""

    def ready(self) -> Extractor:
        """The extractor, its encoder built. What is wrong with that would fail every slide alike: raises Stopped."""
        from mhim.extract.encoders import EncoderError, NoGpu
        from mhim.extract.features import Extractor
        from mhim.extract.weights import WeightsError

        if self._broken:
            raise Stopped(
                f"{self._broken}. That slide is recorded as failed, those after it were not tried; what was finished "
                "is kept, and so are whole chunks: run the same command again when the GPU works"
            )
        if self._extractor is None:
            extractor = Extractor(self.config, self.cores)
            try:
                extractor.encoder  # noqa: B018  built here
            except (EncoderError, WeightsError, NoGpu, LookupFailed) as error:
                raise Stopped(str(error)) from error
            self._extractor = extractor
        return self._extractor

    def encode(self, job: SlideJob, start_row: int) -> Iterator[tuple[int, np.ndarray]]:
        """As `Extractor.encode`. A GPU that failed fails this slide, and stops those that come after it."""
        from mhim.extract.encoders import GpuFailed

        try:
            yield from self.ready().encode(job, start_row)
        except GpuFailed as error:
            self._broken = str(error)
            raise

    def close(self) -> None:
        if self._extractor is not None:
            self._extractor.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_extractor": None}
