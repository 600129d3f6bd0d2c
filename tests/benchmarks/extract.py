"""Figures of extraction, each with its ratio to a baseline measured in the same run. Run it alone on a quiet machine:

    python tests/benchmarks/extract.py [SLIDE.svs] [--tiles 512] [--encoders resnet50-trunc timm:vit_small_patch16_224]
                                       [--gpu] [--only reading anchors bags whole]

Reading (one thread, CPU time): the direct reader against OpenSlide and against bare JPEG decoding, at the file's own
mpp and at a 2x reduction. Anchors: both, and cuCIM where it is installed (`pip install --no-deps cucim-cu12
lazy-loader click`; needs no GPU), on a slide on and off its grid of file tiles and on other real slides, if
`../shared/slides` has them; and what the comparison with OpenSlide costs of a job of 2,000 tiles. Whole: `Extractor`
against the bare model on tiles in memory and against reading alone. Bags: 12,000 x 1024 read from a
store against .npy, .pt and HDF5. Without a slide a synthetic one is made.

FastSlide (0.8.1, Apache-2.0, kept up: nine releases from 0.6 on) was weighed as a further reader and not taken. On one
loaded core it read 2213 tiles/s of an Aperio JPEG slide where the direct reader read 3911 and OpenSlide 600 (433, 1308
and 476 of CMU's; 278, 359 and 235 of a JPEG 2000 one), so it gains nothing where the direct reader works. Its pixels
are not OpenSlide's: every JPEG tile differs, by up to 37 grey levels, so that features would depend on the reader. It
lists NDPI, MRXS and iSyntax, too: no sample was at hand to judge it by. It is measured here if installed.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # this file's own folder would hide the package `extract` behind it
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mhim.configs.processes import usable_cores
from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideJob
from mhim.extract.features import Extractor
from mhim.extract.reading.readers import open_reader
from mhim.pipeline.resume import rates
from tests.benchmarks.bags import bags, best


def make_slide(path: Path, tiles: int) -> Path:
    """A tiled JPEG slide of smooth noise in tissue colours, 8192 px wide, or as large as so many 256 px tiles need."""
    from tests.extract.slides import tissue_rgb, write_svs

    pattern = tissue_rgb(8192, 8192)
    more = max(1, -(-tiles // 560))
    return write_svs(path, np.tile(pattern, (more, 1, 1)), downsamples=(1, 4))


def tissue_corners(path: Path, step: int, most: int) -> np.ndarray:
    """Corners of file-aligned tiles whose middle is not white."""
    import openslide

    with openslide.OpenSlide(str(path)) as slide:
        w, h = slide.dimensions
        thumb = np.asarray(slide.get_thumbnail((w // 64, h // 64)))
    scale = w / thumb.shape[1]
    grid = [(x, y) for y in range(0, h - step, step) for x in range(0, w - step, step)]
    dark = [(x, y) for x, y in grid if thumb[int((y + step / 2) / scale), int((x + step / 2) / scale)].mean() < 215]
    start = max(0, (len(dark) - most) // 2)
    return np.array(dark[start : start + most], np.int32)


def reading(path: Path, tiles: int) -> None:
    print("\nreading 256 px tiles, one thread, tiles/s of CPU time")
    import cv2

    cv2.setNumThreads(1)
    for title, step, slide_mpp in (("own mpp", 256, 0.5), ("2x reduction", 512, 0.25)):
        corners = tissue_corners(path, step, tiles // (step // 256))
        job = SlideJob(path, corners, 256, 0.5, (slide_mpp, slide_mpp))
        out = np.ones((64, 256, 256, 3), np.uint8)
        rates = {}
        for name, reader, reduction in (
            ("openslide", "openslide", "area"),
            ("direct", "auto", "area"),
            ("direct, dct", "auto", "dct"),
        ):
            if step == 256 and reduction == "dct":
                continue
            opened = open_reader(job, ExtractConfig(reader=reader, reduction=reduction))  # type: ignore[arg-type]

            def all_tiles(opened: object = opened, job: SlideJob = job, out: np.ndarray = out) -> None:
                for first in range(0, len(job.coords_l0), 64):
                    part = job.coords_l0[first : first + 64]
                    opened.fill(part, out[: len(part)])  # type: ignore[attr-defined]

            rates[name] = len(corners) / best(all_tiles, clock=time.process_time)
            if reader == "auto" and opened.kind != "direct":
                print(f"  not direct: {opened.note}")
            elif name == "direct":
                bare = decode_only(opened, corners, step)
                rates["bare decoding of the same file tiles"] = len(corners) / bare
            opened.close()
        if step == 256 and (fast := fastslide_rate(path, corners)):
            rates["fastslide"] = fast
        for name, rate in rates.items():
            print(f"  {title:13} {name:38} {rate:8.0f}   {rate / rates['openslide']:5.2f} x OpenSlide")
        if "bare decoding of the same file tiles" in rates:
            share = rates["direct"] / rates["bare decoding of the same file tiles"]
            print(f"  {title:13} direct reading at {share:.2f} x bare decoding")


Tiles = Callable[[np.ndarray], None]  # fills uint8 (n, 256, 256, 3)


def through(job: SlideJob, reader: str) -> Tiles:
    """Reading all tiles of a job by a reader of ours, which is open already."""
    opened = open_reader(job, ExtractConfig(reader=reader))  # type: ignore[arg-type]

    def work(out: np.ndarray) -> None:
        for first in range(0, len(out), 64):
            opened.fill(job.coords_l0[first : first + 64], out[first : first + 64])
        opened.close()

    return work


def through_cucim(job: SlideJob) -> Tiles:
    """The same through cuCIM."""
    from cucim import CuImage

    image = CuImage(str(job.path))

    def work(out: np.ndarray) -> None:
        for i, (x, y) in enumerate(job.coords_l0.tolist()):
            out[i] = np.asarray(image.read_region((x, y), (256, 256), level=0))

    return work


def anchors(path: Path, tiles: int, rounds: int) -> None:
    """OpenSlide, the direct reader and cuCIM in turns, best of `rounds`; one thread, CPU time."""
    import importlib.util

    import cv2

    cv2.setNumThreads(1)
    shared = Path(__file__).resolve().parents[3] / "shared" / "slides"
    own = shared / "A.svs" if (shared / "A.svs").is_file() else path
    columns = [("on the grid", own, 0.5, 0), ("off the grid", own, 0.5, 100)]
    columns += [("real JPEG, 240 px", shared / "cmu-1-small-region.svs", 0.499, 0)]
    columns += [("real JPEG 2000", shared / "tcga-cr-7395-01a-01-ts1.svs", 0.25, 0)]
    print("\n256 px tiles at level 0, one thread, CPU time, x OpenSlide (tiles whose pixels differ from OpenSlide's)")
    for title, slide, mpp, shift in columns:
        if not slide.is_file():
            continue
        corners = tissue_corners(slide, 256, tiles)
        job = SlideJob(slide, corners + shift, 256, mpp, (mpp, mpp))
        ways: dict[str, Callable[[], Tiles]] = {
            "openslide": lambda job=job: through(job, "openslide"),  # type: ignore[misc]
            "direct": lambda job=job: through(job, "auto"),  # type: ignore[misc]
        }
        if importlib.util.find_spec("cucim"):
            ways["cucim"] = lambda job=job: through_cucim(job)  # type: ignore[misc]
        spent: dict[str, float] = {}
        found: dict[str, np.ndarray] = {}
        for _ in range(rounds):
            for name, way in ways.items():
                out = found.setdefault(name, np.ones((len(corners), 256, 256, 3), np.uint8))
                opened = way()
                began = time.process_time()
                opened(out)
                spent[name] = min(spent.get(name, 1e9), time.process_time() - began)
        told = []
        for name, seconds in spent.items():
            unequal = int((found[name] != found["openslide"]).any((1, 2, 3)).sum())
            told.append(f"{name} {spent['openslide'] / seconds:5.2f} ({unequal})")
        more = f"   direct {spent['cucim'] / spent['direct']:.2f} x cuCIM" if "cucim" in spent else ""
        print(f"  {title:18} {len(corners):5} tiles   " + "   ".join(told) + more)
    print(f"  comparing with OpenSlide takes {checking(own, rounds):.2%} of reading 2,000 tiles on the grid")


def checking(path: Path, rounds: int) -> float:
    """Share of the comparison with OpenSlide in opening and reading 2,000 tiles directly, CPU time."""
    from mhim.extract.slide.filetiles import FileLevels

    corners = tissue_corners(path, 256, 2000)
    job = SlideJob(path, corners, 256, 0.5, (0.5, 0.5))
    out = np.ones((len(corners), 256, 256, 3), np.uint8)
    plain, spent, shares = FileLevels._prove, [0.0], []

    def timed(self: FileLevels, *args: Any) -> None:
        began = time.process_time()
        plain(self, *args)
        spent[0] += time.process_time() - began

    FileLevels._prove = timed  # type: ignore[method-assign]
    try:
        for _ in range(rounds):
            spent[0] = 0.0
            began = time.process_time()
            through(job, "auto")(out)
            shares.append(spent[0] / (time.process_time() - began))
    finally:
        FileLevels._prove = plain  # type: ignore[method-assign]
    return sorted(shares)[len(shares) // 2]


def fastslide_rate(path: Path, corners: np.ndarray) -> float | None:
    """Tiles/s of FastSlide at level 0, where it is installed; prints how its pixels differ from OpenSlide's."""
    try:
        import fastslide
    except ImportError:
        return None
    import openslide

    out = np.ones((len(corners), 256, 256, 3), np.uint8)

    def all_tiles() -> None:
        slide = fastslide.FastSlide.from_file_path(str(path))
        for i, (x, y) in enumerate(corners.tolist()):
            out[i] = slide.read_region(location=(x, y), level=0, size=(256, 256)).numpy()[..., :3]
        slide.close()

    seconds = best(all_tiles, clock=time.process_time)
    with openslide.OpenSlide(str(path)) as judge:
        theirs = [np.asarray(judge.read_region((x, y), 0, (256, 256)))[..., :3] for x, y in corners[:64].tolist()]
    differ = np.abs(out[: len(theirs)].astype(np.int16) - np.stack(theirs))
    unequal = int((differ.reshape(len(theirs), -1).max(1) > 0).sum())
    print(f"  FastSlide's pixels: {unequal} of {len(theirs)} tiles differ from OpenSlide's, by up to {differ.max()}")
    return len(corners) / seconds


def decode_only(reader: object, corners: np.ndarray, step: int) -> float:
    """CPU seconds of decoding, bytes already in memory, the file tiles under the corners."""
    plane = reader.plane  # type: ignore[attr-defined]
    tw, th = plane.tile
    wanted = sorted(
        {
            (y + dy) // th * plane.columns + (x + dx) // tw
            for x, y in corners.tolist()
            for dx in range(0, step, tw)
            for dy in range(0, step, th)
        }
    )
    data = [reader.levels.data(plane, i) for i in wanted]  # type: ignore[attr-defined]
    return best(lambda: [plane.decode(d, 0, None) for d in data], clock=time.process_time)


def whole(path: Path, name: str, tiles: int, gpu: bool, rounds: int, more: dict[str, Any]) -> None:
    """The bare model, reading alone and the whole, in turns, best of each. Wall time, and CPU time of all threads.

    On a CPU both sides share the cores, so that wall time cannot be less than the CPU time of both over the cores:
    the CPU ratio says how much of the whole is neither model nor reading. On a GPU the bare model runs over tiles that
    lie there already, and the host waits once, at the end.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    from mhim.extract.encoders import _families, _table

    row = encoder_row(name)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "w.safetensors"
        torch.manual_seed(0)
        known = _table.rows().get(name)
        made = _families.network(known) if known else timm.create_model(name.removeprefix("timm:"), num_classes=0)
        save_file({k: v.contiguous() for k, v in made.state_dict().items()}, weights)
        config = ExtractConfig(encoder=name, weights=str(weights), offline=True, gpu=gpu, **more)
        extractor = Extractor(config)
        job = SlideJob(path, tissue_corners(path, 256, tiles), 256, 0.5, (0.5, 0.5))
        n = len(job.coords_l0)
        held = np.empty((n, 256, 256, 3), np.uint8)

        def read() -> None:
            reader = open_reader(job, config)
            for first in range(0, n, block):
                reader.fill(job.coords_l0[first : first + block], held[first : first + block])
            reader.close()

        threads = 1 if gpu else extractor.cores  # on a CPU each core has tiles of its own, as in the whole
        pool = ThreadPoolExecutor(threads)
        block = max(64, extractor.encoder.batch) if gpu else 16

        def bare_on_gpu() -> None:
            runner = extractor.encoder.encode.__self__  # type: ignore[attr-defined]
            with torch.inference_mode():
                there = torch.from_numpy(held[: runner.batch]).to(runner.device)
                for _ in range(0, n, runner.batch):
                    runner._forward(there)
                torch.cuda.synchronize()

        def bare() -> None:
            parts = [held[first : first + block] for first in range(0, n, block)]
            list(pool.map(extractor.encoder.encode, parts))

        ways = {"reading": read, "bare": bare_on_gpu if gpu else bare, "whole": lambda: list(extractor.encode(job))}
        wall, cpu = dict.fromkeys(ways, 1e9), dict.fromkeys(ways, 1e9)
        read()
        extractor.encoder.encode(held[:16])
        for _ in range(rounds):
            for way, work in ways.items():
                began, busy = time.perf_counter(), time.process_time()
                work()
                wall[way] = min(wall[way], time.perf_counter() - began)
                cpu[way] = min(cpu[way], time.process_time() - busy)
        extractor.close()
        pool.shutdown()
    read_s = wall["reading"] / extractor._threads
    where = f"{'GPU' if gpu else 'CPU'}, {extractor.encoder.info['precision']}"
    print(
        f"\n{name} on the {where}, {n} tiles, best of {rounds} in turns: bare model "
        f"{n / wall['bare']:.1f}/s, reading alone {n / read_s:.0f}/s, whole {n / wall['whole']:.1f}/s\n"
        f"  wall: whole {wall['whole'] / max(read_s, wall['bare']):.3f} x the slower of the two alone; "
        f"CPU: {cpu['whole'] / (cpu['bare'] + cpu['reading']):.3f} x the sum of both "
        f"({cpu['whole']:.2f} s, {cpu['bare']:.2f} + {cpu['reading']:.2f})\n  {rates.told(extractor.stats.numbers())}"
    )
    if not gpu:
        plain = plain_forward(row or name.removeprefix("timm:"), n, cut=row is not None)
        print(
            f"  plain forward (NCHW, batch 64, allocator as it is) {n / plain[0]:.1f}/s: whole at "
            f"{wall['whole'] / plain[0]:.2f} x its wall and {cpu['whole'] / plain[1]:.2f} x its CPU time"
        )


def encoder_row(name: str) -> str | None:
    """timm's architecture of an encoder of the table; None for `timm:` names."""
    from mhim.extract.encoders._table import rows

    return rows()[name].arch if name in rows() else None


_PLAIN = """
import sys, time, timm, torch
name, n, cut, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", int(sys.argv[4])
torch.set_num_threads(threads)
model = timm.create_model(name, num_classes=0).eval()
if cut:
    model.layer4 = torch.nn.Identity()
x = torch.randn(64, 3, 224, 224)
with torch.inference_mode():
    model(x[:8])
    wall, cpu = time.perf_counter(), time.process_time()
    for first in range(0, n, 64):
        model(x[: min(64, n - first)])
    print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def plain_forward(arch: str, n: int, cut: bool) -> tuple[float, float]:
    """(wall, CPU) seconds of n random tiles through the model as other programs run it, in a process of its own: what
    `mhim.extract.memory` tells the allocator holds for this one."""
    command = [sys.executable, "-c", _PLAIN, arch, str(n), str(cut), str(usable_cores())]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    return min(float(r[0]) for r in runs), min(float(r[1]) for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path, nargs="?")
    parser.add_argument("--tiles", type=int, default=512)
    parser.add_argument("--encoders", nargs="*", default=["resnet50-trunc", "timm:vit_small_patch16_224"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch", type=int, default=ExtractConfig().batch, help="tiles per forward pass on a GPU")
    parser.add_argument("--only", nargs="*", default=["reading", "anchors", "bags", "whole"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.slide or make_slide(Path(folder) / "bench.svs", args.tiles)
        if "reading" in args.only:
            reading(path, args.tiles)
        if "anchors" in args.only:
            anchors(path, args.tiles, args.rounds)
        if "bags" in args.only:
            bags()
        for name in args.encoders if "whole" in args.only else []:
            whole(path, name, args.tiles, args.gpu, args.rounds, {"precision": args.precision, "batch": args.batch})
    print(f"\nlargest memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
