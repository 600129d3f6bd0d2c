"""Numbers of many tiles travel short, fast and whole."""

from __future__ import annotations

import gzip
import http.client
import time
from pathlib import Path

import numpy as np

from mhim.pipeline.store import layout, writing
from mhim.pipeline.viewer import numbers
from mhim.pipeline.viewer.data import Gallery
from tests.pipeline.viewer.serving import serving

MANY = 275_000


def test_they_come_back_as_they_were() -> None:
    coords = np.array([[7, 5], [3, 9], [200_000, 1], [0, 0]], np.int32)
    steps = np.frombuffer(numbers.places(coords), "<i4").reshape(2, -1)
    assert np.cumsum(steps, axis=1).T.tolist() == coords.tolist()
    scores = np.array([0.1, -3e-20, 5e7, 0.0])
    raw = np.frombuffer(numbers.values(scores), np.uint8).reshape(4, -1)
    assert np.ascontiguousarray(raw.T).view("<f4")[:, 0].tolist() == scores.astype(np.float32).tolist()
    assert numbers.places(np.zeros((0, 2))) == numbers.values(np.zeros(0)) == b""


def test_a_slide_of_275000_tiles_takes_less_than_2_mb_and_a_third_of_a_second(
    work: Path, gallery: Gallery, tmp_path: Path
) -> None:
    """Places and the shown layer, as a browser asks for them: that is what stands between a click and a slide."""
    big, real = layout.Work(tmp_path / "work"), layout.Work(work)
    place = np.arange(MANY)
    coords = np.stack([place % 600, place // 600], 1).astype(np.int32) * 256
    kept = np.random.default_rng(0).permutation(len(coords)) < MANY
    small = next(s for s in gallery.slides if s.id == "a.svs")
    assert small.tiles is not None
    (tmp_path / "work").mkdir()
    big.cohort.write_text(f"slide,path,mpp,regions,series\na.svs,{small.path},,,\n")
    told = {k: v for k, v in small.tiles.items() if k not in ("files", "seal_sum")}
    told |= {"size_l0": [600 * 256, 460 * 256], "bounds_l0": [0, 0, 600 * 256, 460 * 256], "tile_l0": [256, 256]}
    writer = writing.StoreWriter(big.tile_store("a.svs"), told)
    writer.write("coords", coords[kept])
    scores = writing.StoreWriter(big.run("one") / "scores" / "a.svs.zarr", {"fingerprint": "by hand"})
    scores.write("coords", coords[kept])
    scores.write("attention", np.random.default_rng(1).gamma(0.3, size=MANY).astype(np.float32))
    for name in ("predictions.csv", "metrics.json"):
        (big.run("one") / name).write_bytes((real.run("one") / name).read_bytes())
    found = Gallery(big)
    for port in serving(found):
        best, size = 9.0, 0
        for _ in range(3):
            began, size = time.monotonic(), 0
            for address in ("/places/0.bin", "/values/0/0/0.bin"):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("GET", address, headers={"Accept-Encoding": "gzip"})
                answer = connection.getresponse()
                body = answer.read()
                size += len(body)
                assert answer.getheader("Content-Encoding") == "gzip"
                assert len(gzip.decompress(body)) == MANY * (8 if "places" in address else 4)
            best = min(best, time.monotonic() - began)
        assert size < 2e6
        assert best < 0.3
    found.read.close()
