"""Tiling, step by step: seconds, peak memory and MB/s, as ratios to a naive program measured in the same run.

    python tests/benchmarks/tile.py [SLIDE ...]

Without arguments it takes a generated 50,000 x 40,000 px slide at 0.25 µm/px, and shared/slides/A.svs if there.
Seconds are those of the processor (all runs on one core), so that a busy machine tells the same as an idle one.
The naive program does what the field's scripts do: thumbnail, HSV saturation and Otsu, cv2 contours, a Python loop of
point-in-polygon tests over the whole grid, one Zarr array written. Each measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "slides"


def generated(path: Path, width: int = 50_000, height: int = 40_000) -> Path:
    """An Aperio-style pyramid, levels 1/4/16/32, about 30 % tissue, from a repeated textured tile."""
    import cv2
    import numpy as np
    import tifffile

    rng = np.random.default_rng(0)
    grain = cv2.GaussianBlur(rng.standard_normal((1024, 1024)).astype(np.float32), (0, 0), 2.5)[..., None] * 150
    tissue = np.clip(np.array([200, 115, 170], np.float32) + grain, 0, 255).astype(np.uint8)
    glass = np.clip(243 + rng.standard_normal((1024, 1024, 1)) * [1, 1, 1], 0, 255).astype(np.uint8)

    def tiles(k: int) -> Iterator[np.ndarray]:
        for y in range(0, -(-(height // k) // 256) * 256, 256):
            for x in range(0, -(-(width // k) // 256) * 256, 256):
                at_x, at_y = (x + 128) * k / width - 0.5, (y + 128) * k / height - 0.5
                inside = (at_x / 0.36) ** 2 + (at_y / 0.265) ** 2 < 1 + 0.25 * np.sin(9 * at_x + 7 * at_y)
                source = tissue if inside else glass
                yield np.ascontiguousarray(source[y % 1024 : y % 1024 + 256, x % 1024 : x % 1024 + 256])

    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for i, k in enumerate((1, 4, 16, 32)):
            tif.write(tiles(k), shape=(height // k, width // k, 3), dtype=np.uint8, tile=(256, 256), photometric="rgb",
                      compression="jpeg", compressionargs={"level": 80}, metadata=None, subfiletype=int(i > 0),
                      description=f"Aperio Image Library v12\r\n{width}x{height}|AppMag = 40|MPP = 0.25")  # fmt: skip
    return path


def ours(slide: Path, out: Path) -> dict[str, float]:
    """The steps of `pipeline tile`, each timed; then the whole, as the command calls it."""
    from mhim.configs.schema import TileConfig

    steps: dict[str, float] = {}
    mark = time.process_time()

    def step(name: str) -> None:
        nonlocal mark
        steps[name] = time.process_time() - mark
        mark = time.process_time()

    from mhim.extract.slide.slide import open_slide
    from mhim.extract.tiles.tiling import find_tissue, tile_slide

    step("import")
    config = TileConfig()
    handle = open_slide(slide)
    step("open")
    handle.image_at(config.segment_mpp)
    step("read low resolution")
    mark = time.process_time()
    find_tissue(handle, config)
    step("read, segment, artefacts")
    handle.close()
    mark = time.process_time()
    tiled = tile_slide(slide, config)
    step("whole slide without writing")
    _write(out, tiled.arrays, tiled.attrs, tiled.overlay)
    step("write")
    steps["work"] = steps["whole slide without writing"] + steps["write"]
    steps["tiles"] = float(len(tiled.arrays["coords"]))
    return steps


def naive(slide: Path, out: Path) -> dict[str, float]:
    """Thumbnail, contours, a loop of point-in-polygon tests."""
    import cv2
    import numpy as np
    import openslide

    start = time.process_time()
    handle = openslide.OpenSlide(str(slide))
    mpp = float(handle.properties["openslide.mpp-x"])
    scale = 8.0 / mpp
    w, h = handle.dimensions
    rgb = np.array(handle.get_thumbnail((w / scale, h / scale)).convert("RGB"))
    saturation = cv2.medianBlur(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1], 7)
    _, mask = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((4, 4), np.uint8))
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contours = [c for c in contours if cv2.contourArea(c) > 300]
    size = 128.0 / mpp
    coords = []
    for row in range(int(h / size)):
        for column in range(int(w / size)):
            centre = ((column + 0.5) * size / scale, (row + 0.5) * size / scale)
            if any(cv2.pointPolygonTest(c, centre, False) >= 0 for c in contours):
                coords.append((round(column * size), round(row * size)))
    for x, y in coords:
        corner, opposite = (int(x / scale), int(y / scale)), (int((x + size) / scale), int((y + size) / scale))
        cv2.rectangle(rgb, corner, opposite, (0, 0, 255), 1)
    _write(out, {"coords": np.array(coords, np.int32)}, {"mpp": 0.5}, rgb)
    return {"work": time.process_time() - start, "tiles": float(len(coords))}


def _write(out: Path, arrays: dict, attrs: dict, picture: Any) -> None:
    import cv2

    from mhim.pipeline.store.writing import StoreWriter

    writer = StoreWriter(out, attrs)
    for name, array in arrays.items():
        writer.write(name, array)
    cv2.imwrite(str(out) + ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])


def measure(which: str, slide: Path, repeats: int) -> dict[str, float]:
    """The fastest of `repeats` processes, and its peak memory in MB."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            code = (
                "import sys, json, resource; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
                "import zarr, cv2; cv2.setNumThreads(1); import tests.benchmarks.tile as t\n"
                "got = getattr(t, sys.argv[2])(Path(sys.argv[3]), Path(sys.argv[4]))\n"
                "got['peak MB'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
                "print(json.dumps(got))"
            )
            argv = [sys.executable, "-c", code, str(ROOT), which, str(slide), str(Path(folder) / "o.zarr")]
            got = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
        if not best or got["work"] < best["work"]:
            best = got
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slides = args.slides or [generated(Path(folder) / "generated.svs")]
        if not args.slides and (SHARED / "A.svs").exists():
            slides.append(SHARED / "A.svs")
        for slide in slides:
            megabytes = slide.stat().st_size / 1e6
            mine, other = measure("ours", slide, args.repeats), measure("naive", slide, args.repeats)
            print(f"\n{slide.name}: {megabytes:.0f} MB")
            for name, value in mine.items():
                rate = f"{megabytes / value:10.0f} MB/s" if name not in ("tiles", "peak MB") and value else ""
                print(f"  {name:30} {value:10.3f}{rate}")
            print(f"  naive: work {other['work']:.3f} s, peak {other['peak MB']:.0f} MB, {other['tiles']:.0f} tiles")
            work, memory = mine["work"] / other["work"], mine["peak MB"] / other["peak MB"]
            print(f"  ratio to naive: work {work:.2f}, memory {memory:.2f}")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mhim.pipeline", "tile", "--help"], check=True, capture_output=True, cwd=ROOT)
    print(f"\n`pipeline tile --help`: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
