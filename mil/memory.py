"""How this process keeps memory that the next training step or bag needs again. In: nothing. Out: nothing."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

# mallopt's options. No block is mapped by itself, whatever its size, and the heap is given back only beyond 1 GiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


@cache
def keep_freed() -> None:
    """Tell glibc to keep freed memory for the next use; elsewhere nothing happens. Once per process.

    A step on a large bag otherwise hands every intermediate result back to the system and faults it in again: 2 ms per
    4 MB, as much as the product that fills them takes for width 64. No result depends on it.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: nothing to tell it
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 16 << 20)):
        mallopt(option, value)
