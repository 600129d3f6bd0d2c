"""How fast people can look: heatmaps, the viewer's tiles, the report. Prints figures and ratios; asserts nothing.

    python tests/benchmarks/look.py [folder for the demo slide and the made-up cohort]

Baselines are measured in the same run: a heatmap by painting one tile after the other; a viewer tile by OpenSlide's own
Deep Zoom generator.
"""

from __future__ import annotations

import http.client
import io
import resource
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def heatmaps() -> None:
    """100,000 tiles on an image of 6400 x 4000 px."""
    from mhim.mil import heatmap

    n = 100_000
    coords = np.stack(np.meshgrid(np.arange(400), np.arange(250)), -1).reshape(-1, 2) * 512
    scores = np.random.default_rng(0).random(n)
    frame = heatmap.Frame((0, 0), (32, 32), (6400, 4000), 8.0)
    began, worked = time.perf_counter(), time.process_time()
    layer = heatmap.draw(scores, coords, 512, frame)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"heatmap of {n} tiles on 6400 x 4000 px: {seconds:.2f} s (CPU {cpu:.2f} s), peak memory {memory:.0f} MB")
    began = time.perf_counter()
    total, count = np.zeros((4000, 6400)), np.zeros((4000, 6400))
    for (x, y), v in zip((coords // 32).tolist(), heatmap.scaled(scores, "percentile").values, strict=True):
        total[y : y + 16, x : x + 16] += v
        count[y : y + 16, x : x + 16] += 1
    plain = heatmap.colour((total / count).astype(np.float32))
    loop = time.perf_counter() - began
    same = (plain == layer).all(-1).mean()
    print(f"  painted tile by tile: {loop:.2f} s, {loop / seconds:.1f} times as long; equal pixels: {same:.4f}")


def viewer(folder: Path) -> None:
    """Tiles of a demo slide through the real server, against OpenSlide's Deep Zoom generator."""
    import openslide
    import psutil
    from openslide.deepzoom import DeepZoomGenerator

    from mhim.pipeline.cli.main import _main
    from mhim.pipeline.demo import cohort
    from mhim.pipeline.store import layout
    from mhim.pipeline.viewer.data import Gallery
    from mhim.pipeline.viewer.server import make_server

    slide = cohort.plan_cohort(n=2)[0]
    (folder / "slides").mkdir(parents=True)
    picture = cohort.paint(slide.plan, cohort.build_library(7, slide.plan.mpp))
    cohort.write_slide(folder / "slides" / slide.name, picture, slide)
    assert _main(["tile", str(folder / "slides"), "--work", str(folder / "work"), "--workers", "1"]) == 0
    gallery = Gallery(layout.Work(folder / "work"))
    gallery.read.warm()
    while not all(child.alive for child in gallery.read._team):
        time.sleep(0.05)
    server = make_server(gallery)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]

    own = threading.local()

    def get(path: str) -> tuple[float, int]:
        if not hasattr(own, "connection"):  # a browser keeps its connections, too
            own.connection = http.client.HTTPConnection("127.0.0.1", port)
        connection = own.connection
        began = time.perf_counter()
        connection.request("GET", path)
        size = len(connection.getresponse().read())
        return time.perf_counter() - began, size

    w, h = gallery.about(0)["width"], gallery.about(0)["height"]
    top = int(np.ceil(np.log2(max(w, h))))
    pids = [child._process.pid for child in gallery.read._team if child._process]

    def busy() -> float:
        """Processor seconds, of the processes that read the slides too."""
        times = [psutil.Process(pid).cpu_times() for pid in pids]
        return time.process_time() + sum(t.user + t.system for t in times)

    first, _ = get(f"/tile/0/{top - 4}/0_0.jpg")
    paths = []
    for level in (top, top - 1, top - 2, top - 3):
        columns, rows = (min(8, -(-s // 2 ** (top - level) // 512)) for s in (w, h))
        paths += [f"/tile/0/{level}/{x}_{y}.jpg" for y in range(rows) for x in range(columns)]
    began, worked = time.perf_counter(), busy()
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(get, paths))
    seconds, cpu = time.perf_counter() - began, busy() - worked
    rate = len(paths) / seconds
    print(
        f"viewer: first tile {1000 * first:.0f} ms; {len(paths)} tiles by 4 connections: {rate:.0f} tiles/s, "
        f"median {1000 * statistics.median(t for t, _ in told):.0f} ms, "
        f"processor {1000 * cpu / len(paths):.1f} ms a tile"
    )
    server.shutdown()
    gallery.read.close()
    deep = DeepZoomGenerator(openslide.OpenSlide(str(folder / "slides" / slide.name)), 512, 0)
    addresses = [(int(p.split("/")[3]), *map(int, p.split("/")[4][:-4].split("_"))) for p in paths]
    began, worked = time.perf_counter(), time.process_time()
    for level, x, y in addresses:
        deep.get_tile(level, (x, y)).save(io.BytesIO(), "JPEG", quality=82)
    alone = len(addresses) / (time.perf_counter() - began)
    theirs = (time.process_time() - worked) / len(addresses)
    print(
        f"  OpenSlide's Deep Zoom generator, one thread, no HTTP: {alone:.0f} tiles/s, processor "
        f"{1000 * theirs:.1f} ms a tile; ours takes {cpu / len(paths) / theirs:.2f} of that"
    )


def report(folder: Path, n: int = 1000) -> None:
    """The report of a made-up run of `n` slides with a picture each."""
    from mhim.pipeline.pictures import report as module
    from mhim.pipeline.pictures.layers import save_png
    from mhim.pipeline.store import layout, tables
    from tests.pipeline import records

    work = layout.Work(folder / "many")
    run = work.run("big")
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 255, (100, 160, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    rows = []
    for i in range(n):
        (run / "heatmaps" / f"s{i}.svs").mkdir(parents=True)
        save_png(run / "heatmaps" / f"s{i}.svs" / "attention.png", np.roll(picture, i, axis=1))
        p = float(np.clip(rng.normal(0.5 + 0.2 * (i % 2) - 0.1, 0.2), 0.01, 0.99))
        rows.append(
            {
                "slide": f"s{i}.svs",
                "patient": f"p{i}",
                "repeat": 0,
                "fold": i % 5,
                "seed": 1,
                "label": ("a", "b")[i % 2],
                "p_a": 1 - p,
                "p_b": p,
            }
        )
    (run / "predictions.csv").write_text(tables.of_mappings(rows))
    (run / "splits.csv").write_text("repeat,fold,patient,split\n")  # the columns that are read
    told = records.metrics(patients=n, folds=5, trainings=5, confusion=[[300, 200], [200, 300]])
    (run / "metrics.json").write_text(told.text())
    (run / "fold_0").mkdir()
    (run / "fold_0" / "model.json").write_text(records.card().text())
    began, worked = time.perf_counter(), time.process_time()
    file = module.write(work, run)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    print(f"report of {n} slides: {seconds:.1f} s (CPU {cpu:.1f} s), {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    heatmaps()
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        viewer(Path(place))
        report(Path(place))
