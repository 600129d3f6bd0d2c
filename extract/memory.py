"""How this process keeps memory that it will need again at once. In: nothing. Out: nothing."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

# mallopt's options and their values: blocks up to 32 MiB (glibc's limit) come from the heap, and the heap is
# given back only beyond 1 GiB.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD = -3, -1, -2


@cache
def keep_freed() -> None:
    """Tell glibc to keep freed memory for the next use; elsewhere nothing happens. Once per process.

    Convolutions on a CPU otherwise hand their activations back to the system after each layer and fault them in again:
    half of the time of a ResNet-50 at batch 64. A decoded file tile (192 KiB) is just above the usual threshold, too.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: nothing to tell it
        return
    for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 16 << 20)):
        mallopt(option, value)
