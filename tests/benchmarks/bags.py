"""How fast a bag is read from a store, beside .npy, .pt and HDF5. Run it alone on a quiet machine:

python -m tests.benchmarks.bags
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def best(work: Callable[[], object], repeats: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """Shortest of several runs, s."""
    times = []
    for _ in range(repeats):
        began = clock()
        work()
        times.append(clock() - began)
    return min(times)


def bags() -> None:
    import torch

    from mhim.pipeline.store import reading as reading_
    from mhim.pipeline.store import writing

    x = np.random.default_rng(0).standard_normal((12_000, 1024)).astype(np.float16)
    print("\nreading a bag of 12,000 x 1024 float16, page cache warm, ms (and every byte touched)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "x.npy", x)
        torch.save(torch.from_numpy(x), folder / "x.pt")
        writing.StoreWriter(folder / "x.zarr", {}).write("features", x)
        ways: dict[str, Callable[[], np.ndarray]] = {
            ".npy": lambda: np.load(folder / "x.npy"),
            "store": lambda: reading_.read_array(folder / "x.zarr", "features"),
            ".pt": lambda: torch.load(folder / "x.pt", weights_only=True).numpy(),
        }
        try:
            import h5py
        except ImportError:
            print("  (no h5py here: HDF5 left out)")
        else:
            with h5py.File(folder / "x.h5", "w") as h5:
                h5["features"] = x
                h5.create_dataset("by_row", data=x, chunks=(1, 1024))
            ways["HDF5 contiguous"] = lambda: h5py.File(folder / "x.h5")["features"][...]
            ways["HDF5, one row per chunk"] = lambda: h5py.File(folder / "x.h5")["by_row"][...]
        base = 0.0
        for title, way in ways.items():
            seconds = best(lambda way=way: np.asarray(way()).view(np.uint16).sum(dtype=np.uint64), 7)  # type: ignore[misc]
            base = base or seconds
            print(f"  {title:24} {seconds * 1000:7.1f}   {seconds / base:5.2f} x .npy")


if __name__ == "__main__":
    bags()
