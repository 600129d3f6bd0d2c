"""What the machinery costs at the size of an archive: planning, resuming and status of 100,000 items, and each item's
overhead here and through Dask, with no work in them.

    python -m tests.benchmarks.scale [--n 10000 100000] [--items 400] [--slides FOLDER]

Each figure comes from a process of its own (so that its memory is its own). Overheads are set beside a bare baseline of
the same run: the same files written, flushed and renamed, without any of the machinery. --slides: a folder of real
slides, to measure how well `tile` uses two processes; beside it, how well two bare loops do on this machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhim.configs.schema import ClusterConfig
from mhim.pipeline.resume import runner
from mhim.pipeline.resume.stage import Item, Made, Outcome, Stage, plan
from mhim.pipeline.store import layout, seals, writing

STORED = ("features/zarr.json", "features/c/0/0", "coords/zarr.json", "coords/c/0/0")  # the files of a slide's features


@dataclass
class Idle(Stage):
    """Items with nothing to do but one small file."""

    root: Path
    n: int
    name: str = "idle"
    heavy: bool = False

    def items(self) -> list[Item]:
        return [Item(f"site/{i:06d}.svs", self.root / f"site/{i:06d}.svs.zarr", {"i": i}) for i in range(self.n)]

    def settings(self) -> dict[str, Any]:
        return {f"idle.{i}": i for i in range(20)}  # as many as `tile` has

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        out.mkdir()
        (out / "data").write_bytes(b"1")
        return Made()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed_plan(folder: Path, n: int) -> dict[str, float]:
    """Plan `n` items, none or all of them made before."""
    from tests.benchmarks.scale import Idle as Imported

    stage = Imported(folder / "tiles", n)
    base = peak_mb()
    start, cpu = time.perf_counter(), time.process_time()
    todo = plan(stage, stage.items())
    took = {"s": time.perf_counter() - start, "s of the processor": time.process_time() - cpu}
    return {**took, "MB": peak_mb() - base, "done": len(todo.done), "to do": len(todo.todo)}


def timed_seal(folder: Path, n: int) -> dict[str, float]:
    """Seal `n` feature stores of 10,000 x 1024 float16 (20 MB), beside flushing the same stores to the disk."""
    import numpy as np

    took = flushed = 0.0
    for i in range(n):
        out = folder / f"{i}.zarr"
        writer = writing.StoreWriter(out, {})
        writer.write("features", np.full((10_000, 1024), 1 + i, np.float16))
        start = time.perf_counter()
        writing.fsync(out)
        middle = time.perf_counter()
        writing.seal(out, {"i": i})
        took += time.perf_counter() - middle
        flushed += middle - start
    return {"ms per store": 1000 * took / n, "ms to flush it": 1000 * flushed / n}


def timed_status(folder: Path, n: int) -> dict[str, float]:
    from mhim.pipeline.upkeep import status

    base = peak_mb()
    start, cpu = time.perf_counter(), time.process_time()
    stages = status.read(layout.Work(folder))
    read = time.perf_counter() - start
    files = sum(1 for _ in status.files(folder))
    took = time.perf_counter() - start
    times = {"s": took, "s of the processor": time.process_time() - cpu, "s of it counting files": took - read}
    return {**times, "MB": peak_mb() - base,
            "done": len(stages[0].keys["done"]), "failed": len(stages[0].keys["failed"]), "files": files}  # fmt: skip


def timed_items(folder: Path, n: int, backend_name: str, workers: int) -> dict[str, float]:
    """Make `n` items. The first batch, of a tenth, pays for the start of processes; the second is timed."""
    import importlib

    from tests.benchmarks.scale import Idle as Imported

    module = importlib.import_module(f"mhim.pipeline.backends.{backend_name}")
    params = {"dashboard": "127.0.0.1:0"} if backend_name == "dask" else {}
    cluster = ClusterConfig(workers=workers, backend=backend_name, backend_params=params)
    seen: list[float] = []

    def backend(stage: Stage, items: list[Item], replace: bool, remake: bool) -> Iterator[Outcome]:
        yield from module.run(stage, items, replace, remake, cluster)

    stage = Imported(folder / "tiles", n)
    cpu = time.process_time()
    report = runner.run(plan(stage, stage.items()), backend, watch=lambda outcome: seen.append(time.perf_counter()))
    cpu = time.process_time() - cpu
    assert report.exit_code == 0, report
    skip = n // 10
    each = 1000 * (seen[-1] - seen[skip]) / (n - 1 - skip)
    return {"ms per item": each, "ms of the commanding process": 1000 * cpu / n}


def timed_bare(folder: Path, n: int) -> dict[str, float]:
    """The same files without the machinery: written, flushed, renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for i in range(n):
        tmp = folder / f".{i}"
        tmp.mkdir()
        (tmp / "data").write_bytes(b"1")
        (tmp / "manifest.json").write_text(json.dumps({f"idle.{k}": k for k in range(20)}, indent=2))
        writing.fsync(tmp)
        os.rename(tmp, folder / str(i))
    return {"ms per item": 1000 * (time.perf_counter() - start) / n}


def spin(n: int) -> None:
    x = 0
    for i in range(n):
        x ^= i


def timed_spin(folder: Path, n: int) -> dict[str, float]:
    """How much two bare loops at once gain on this machine over two in a row: 1 is a second core all to itself."""
    start = time.perf_counter()
    spin(n)
    spin(n)
    one = time.perf_counter() - start
    start = time.perf_counter()
    team = [multiprocessing.get_context("fork").Process(target=spin, args=(n,)) for _ in range(2)]
    for process in team:
        process.start()
    for process in team:
        process.join()
    return {"efficiency": one / (time.perf_counter() - start) / 2}


def stock(folder: Path, n: int) -> None:
    """A work folder with `n` tiled slides (a hundredth of them failed), as plain and fast as it can be written."""
    stage = Idle(folder / "tiles", n)
    items = stage.items()
    (folder / "runs").mkdir(parents=True)
    (folder / "tiles" / "site").mkdir(parents=True)
    with open(folder / "cohort.csv", "w") as cohort, open(folder / "runs" / "20260101T000000-tile-a.jsonl", "w") as log:
        cohort.write("slide,path,mpp\n")
        log.write(json.dumps({"event": "start", "t": "2026-01-01T00:00:00Z", "command": []}) + "\n")
        for i, item in enumerate(items):
            cohort.write(f"{item.key},/slides/{item.key},0.5\n")
            state = "failed" if i % 100 == 99 else "done"
            event = {"event": "item", "t": "2026-01-01T00:00:01Z", "stage": "tile", "key": item.key, "state": state,
                     "seconds": 1.0, "message": "" if state == "done" else "cannot be read"}  # fmt: skip
            log.write(json.dumps(event) + "\n")
            if state == "done":
                files = {}
                for name in STORED:
                    (item.output / name).parent.mkdir(parents=True, exist_ok=True)
                    (item.output / name).write_bytes(b"1")
                    files[name] = "1 6b86b273ff34fce1"
                fields = stage.fields(item)
                attrs = {"fingerprint": layout.fingerprint(fields), "settings": fields, seals.FILES: files}
                meta = {"zarr_format": 3, "node_type": "group", "attributes": attrs}
                (item.output / "zarr.json").write_text(json.dumps(meta, indent=2))


def alone(what: str, folder: Path, n: int, *more: object) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--measure", what, str(folder), str(n), *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def say(what: str, figures: dict[str, float]) -> None:
    texts = [f"{v:,.3g} {k}" if v < 1000 else f"{v:,.0f} {k}" for k, v in figures.items()]
    print(f"{what:46s} {', '.join(texts)}", flush=True)


def tile(slides: Path, folder: Path) -> None:
    """Wall time of `tile` with one and two processes, and of the two bare loops beside each."""
    seconds = {}
    for workers in (1, 2):
        command = [sys.executable, "-m", "mhim.pipeline", "tile", str(slides), "--work", str(folder / f"w{workers}")]
        start = time.perf_counter()
        subprocess.run([*command, "--workers", str(workers)], capture_output=True, check=False)
        seconds[workers] = time.perf_counter() - start
    efficiency = seconds[1] / seconds[2] / 2
    say("tile: two processes against one", {"s alone": seconds[1], "s with two": seconds[2], "efficiency": efficiency})
    say("  bare loops on this machine", alone("spin", folder, 20_000_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--n", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--slides", type=Path)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, folder, n, *more = args.measure
        kinds = {"plan": timed_plan, "status": timed_status, "bare": timed_bare, "spin": timed_spin, "seal": timed_seal}
        if what == "items":
            figures = timed_items(Path(folder), int(n), more[0], int(more[1]))
        else:
            figures = kinds[what](Path(folder), int(n))
        print(json.dumps(figures))
        return
    here = Path(tempfile.mkdtemp(prefix="scale"))
    try:
        print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        for n in args.n:
            say(f"plan {n:,} new items", alone("plan", here / "none", n))
            stock(here / str(n), n)
            say(f"plan {n:,} items made before (resume)", alone("plan", here / str(n), n))
            say(f"status of {n:,} slides", alone("status", here / str(n), n))
        say("seal a store of 20 MB", alone("seal", here / "seal", 10))
        bare = alone("bare", here / "bare", args.items)
        say("one item, bare files", bare)
        for label, backend, workers in (
            ("one process", "local", 1),
            ("two processes", "local", 2),
            ("Dask, two workers", "dask", 2),
        ):
            figures = alone("items", here / label.replace(" ", "-"), args.items, backend, workers)
            say(f"one item, {label}", {**figures, "times bare": figures["ms per item"] / bare["ms per item"]})
        if args.slides:
            tile(args.slides, here)
    finally:
        shutil.rmtree(here)


if __name__ == "__main__":
    main()
