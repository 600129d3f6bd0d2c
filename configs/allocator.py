"""Settings of glibc's allocator for this process: the one place that speaks to it. Elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

# the numbers that mallopt knows its settings by (malloc.h)
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4


def tell(settings: Mapping[int, int]) -> None:
    """Hand each setting to glibc: its number -> bytes, or how many."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: nothing to tell it
        return
    for number, value in settings.items():
        mallopt(number, value)
