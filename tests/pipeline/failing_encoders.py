"""Encoders that break as machines break. FAIL_FLAG: a file; whoever creates it first fails, and nobody after that."""

from __future__ import annotations

import os
import signal

import numpy as np

from mhim.extract.encoders import Encoder, GpuFailed, NoGpu

ENCODED: list[int] = []  # tiles of each batch that was encoded in this process
FAIL_AT = 2


def _mine() -> bool:
    """True once, for one process and one call."""
    try:
        os.close(os.open(os.environ["FAIL_FLAG"], os.O_CREAT | os.O_EXCL))
    except (FileExistsError, KeyError):
        return False
    return True


def _means(tiles: np.ndarray) -> np.ndarray:
    return tiles[:, ::16, ::16].mean((1, 2), dtype=np.float32)  # of every pixel they take a quarter of a second a batch


def gpu_fails() -> Encoder:
    """A device that breaks off at batch FAIL_AT."""
    calls = [0]

    def encode(tiles: np.ndarray) -> np.ndarray:
        calls[0] += 1
        if calls[0] == FAIL_AT and _mine():
            raise GpuFailed("cuda:0 failed (CUDA error: uncorrectable ECC error encountered)")
        ENCODED.append(len(tiles))
        return _means(tiles)

    return Encoder("gpu_fails", encode, 3, None, None, "1")


def gpu_gone() -> Encoder:
    """A device that is no longer there when the process starts."""
    if _mine():
        raise NoGpu("--gpus 1: this machine has GPUs 0 to 0")
    return Encoder("gpu_gone", _means, 3, None, None, "1")


def killed() -> Encoder:
    """A process that the system kills while it encodes."""

    def encode(tiles: np.ndarray) -> np.ndarray:
        if _mine():
            os.kill(os.getpid(), signal.SIGKILL)
        return _means(tiles)

    return Encoder("killed", encode, 3, None, None, "1")


def wide() -> Encoder:
    """Features that fill a disk: 64 KiB a tile in float32."""
    return Encoder("wide", lambda tiles: np.repeat(_means(tiles), 5461, axis=1), 16383, None, None, "1")
