"""How this process keeps memory that the next training step or bag needs again. In: nothing. Out: nothing."""

from __future__ import annotations

from functools import cache

from mhim.configs import allocator

# No block is mapped by itself, whatever its size, and the heap is given back only beyond 1 GiB.
_SETTINGS = {allocator.MMAP_MAX: 0, allocator.TRIM_THRESHOLD: 1 << 30, allocator.TOP_PAD: 16 << 20}


@cache
def keep_freed() -> None:
    """Tell glibc to keep freed memory for the next use; elsewhere nothing happens. Once per process.

    A step on a large bag otherwise hands every intermediate result back to the system and faults it in again: 2 ms per
    4 MB, as much as the product that fills them takes for width 64. No result depends on it.
    """
    allocator.tell(_SETTINGS)
