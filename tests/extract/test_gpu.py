"""On a GPU: the CPU's features, the same bytes however they are fed, and a real shortage of memory survived."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mhim.configs.schema import ExtractConfig
from mhim.extract import SlideJob, encoders
from mhim.extract.encoders import NoGpu
from mhim.extract.features import Extractor, even_rows
from mhim.extract.tissue import network
from tests.extract.slides import tissue_rgb, write_svs
from tests.extract.tissue.test_network import params, save

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> SlideJob:
    coords = np.array([(x, y) for y in range(0, 1000, 72) for x in range(0, 1200, 72)], np.int32)
    path = write_svs(tmp_path_factory.mktemp("gpu") / "a.svs", tissue_rgb())
    return SlideJob(path, coords, 64, 0.5, (0.5, 0.5))


def run(job: SlideJob, folder: Path, start: int = 0, **settings: object) -> np.ndarray:
    config = ExtractConfig.model_validate(
        {"weights": str(folder), "offline": True, "gpu": True, "chunk_rows": 100} | settings
    )
    extractor = Extractor(config)
    try:
        return np.concatenate([chunk for _, chunk in extractor.encode(job, start)])
    finally:
        extractor.close()


def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine similarity of rows."""
    a, b = (x.astype(np.float64) for x in (one, other))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("encoder", ["timm:test_vit", "resnet50-trunc"])
@pytest.mark.parametrize(("precision", "least"), [("float32", 0.99999), ("bfloat16", 0.998), ("float16", 0.9999)])
def test_the_features_are_those_of_the_cpu(
    job: SlideJob, folder: Path, encoder: str, precision: str, least: float
) -> None:
    near = run(job, folder, encoder=encoder, gpu=False)
    far = run(job, folder, encoder=encoder, precision=precision)
    assert len(np.unique(near, axis=0)) > 40
    assert alike(near, far).min() > least, np.abs(near.astype(np.float32) - far.astype(np.float32)).max()


def test_the_same_bytes_however_they_are_fed(job: SlideJob, folder: Path) -> None:
    settings = {"encoder": "timm:test_vit", "batch": 32}
    whole = run(job, folder, **settings)
    np.testing.assert_array_equal(whole, run(job, folder, **settings, readers=5, queue_mb=16, reader="openslide"))
    rows = even_rows(len(job.coords_l0), 100)
    np.testing.assert_array_equal(whole[rows:], run(job, folder, rows, **settings))


def test_a_real_shortage_of_memory_halves_the_batch(job: SlideJob, folder: Path) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2048, 160, 160, 3), np.uint8)
    config = ExtractConfig(encoder="timm:test_vit", weights=str(folder), offline=True, gpu=True, batch=2048)
    encoder = encoders.build(config)
    whole = encoder.encode(tiles)
    assert encoder.retreats() == 0
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:  # its float32 input alone takes 630 MB
        torch.cuda.set_per_process_memory_fraction(600e6 / total)
        short = encoders.build(config)
        found = short.encode(tiles)
        assert short.retreats() > 0
        np.testing.assert_allclose(found, whole, rtol=1e-2, atol=1e-2)
        np.testing.assert_array_equal(short.encode(tiles), found)  # the smaller batch stays
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e6 / total)
        with pytest.raises(NoGpu, match="no memory"):
            short.encode(tiles)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_array_equal(encoder.encode(tiles), whole)


def test_a_network_that_finds_tissue(tmp_path: Path) -> None:
    weights = save(tmp_path / "w.safetensors", (0.0, 1.0))
    rgb = tissue_rgb(90, 130)
    assert network.segment(rgb, 8.0, params(weights, device="cuda")).all()
