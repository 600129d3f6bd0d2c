"""How this process keeps memory that it will need again at once. In: nothing. Out: nothing."""

from __future__ import annotations

from functools import cache

from mhim.configs import allocator

# Blocks up to 32 MiB (glibc's limit) come from the heap, and the heap is given back only beyond 1 GiB.
_SETTINGS = {allocator.MMAP_THRESHOLD: 32 << 20, allocator.TRIM_THRESHOLD: 1 << 30, allocator.TOP_PAD: 16 << 20}


@cache
def keep_freed() -> None:
    """Tell glibc to keep freed memory for the next use; elsewhere nothing happens. Once per process.

    Convolutions on a CPU otherwise hand their activations back to the system after each layer and fault them in again:
    half of the time of a ResNet-50 at batch 64. A decoded file tile (192 KiB) is just above the usual threshold, too.
    """
    allocator.tell(_SETTINGS)
