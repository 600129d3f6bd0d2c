"""`pipeline extract` as a whole: what is refused, what is recorded, and where a broken run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mhim.configs.schema import ClusterConfig
from mhim.extract.encoders import _families, _table
from mhim.pipeline.backends import local
from mhim.pipeline.resume.runner import run_items
from mhim.pipeline.resume.stage import Item, Outcome, Stage
from mhim.pipeline.store import layout, reading
from tests.pipeline import failing_encoders

Cli = Callable[..., tuple[int, str]]
ENCODERS = "tests.pipeline.failing_encoders"


@pytest.fixture(scope="module")
def tiled(demo_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder in which one slide is tiled twice as finely as its encoder would like: some 200 tiles."""
    from mhim.pipeline.cli.main import _main

    work = tmp_path_factory.mktemp("extract") / "work"
    slide = demo_cohort / "slides" / "case_01.svs"
    assert _main(["tile", str(slide), "--work", str(work), "--tile-px", "128", "--workers", "1"]) == 0
    return work


@pytest.fixture
def work(tiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiled, tmp_path / "work"))


def features(work: Path, encoder: str) -> Path:
    return layout.Work(work).feature_store(encoder, "case_01.svs")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are made here, where a test has put things in place of others; commands never do that with slides."""

    def run(stage: Stage, items: list[Item], replace: bool, remake: bool, cluster: ClusterConfig) -> Iterator[Outcome]:
        return run_items(stage, items, cluster.lease_s, replace, remake)

    monkeypatch.setattr(local, "run", run)


@pytest.mark.usefixtures("in_this_process")
def test_tiles_of_another_size_are_refused_and_on_request_recorded(
    cli: Cli, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "lunit-vits16"
    row = _table.rows()[name]
    little = row.model_copy(update={"kwargs": {**row.kwargs, "depth": 1, "embed_dim": 24, "num_heads": 2}, "dim": 24})
    monkeypatch.setitem(_table.rows(), name, little)
    torch.manual_seed(0)
    save_file(_families.network(little).state_dict(), tmp_path / f"{name}.safetensors")
    args = ["extract", "--work", work, "--encoder", name, "--weights", tmp_path, "--offline"]
    code, text = cli(*args)
    assert code == 1
    assert "224 px tiles, not 128" in " ".join(text.split())
    assert "--allow-mismatch" in text
    assert not features(work, name).exists()
    code, text = cli(*args, "--allow-mismatch")
    assert code == 0, text
    attrs = reading.read_attrs(features(work, name))
    assert "224 px tiles, not 128" in attrs["mismatch"]
    assert attrs["dim"] == 24
    assert "class token" in attrs["pooling"]
    assert attrs["transform"].startswith("resize 224 bicubic")
    assert len(attrs["weights_id"]) == 64


def test_stain_normalisation_is_part_of_the_fingerprint(cli: Cli, work: Path) -> None:
    assert cli("extract", "--work", work)[0] == 0
    plain = np.array(reading.read_array(features(work, "texture"), "features"))
    code, text = cli("extract", "--work", work, "--set", "extract.stain_norm=reinhard")
    assert code == 3
    assert "extract.stain_norm: 'none' there, 'reinhard' now" in text
    assert cli("extract", "--work", work, "--set", "extract.stain_norm=reinhard", "--replace")[0] == 0
    assert reading.read_attrs(features(work, "texture"))["stain_norm"] == "reinhard"
    assert np.abs(plain - reading.read_array(features(work, "texture"), "features")).max() > 0.01


@pytest.mark.usefixtures("in_this_process")
def test_a_broken_slide_goes_on_at_its_last_whole_chunk(
    cli: Cli, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that were finished are not encoded again, and the bytes are those of a run that was never broken."""
    encoder = f"{ENCODERS}.gpu_fails"
    args = ["extract", "--encoder", encoder, "--set", "extract.chunk_rows=64", "--work"]
    whole = shutil.copytree(work, tmp_path / "whole")
    monkeypatch.setattr(failing_encoders, "FAIL_AT", 3)
    failing_encoders.ENCODED.clear()
    assert cli(*args, whole)[0] == 0, "without a flag nothing fails"
    total = sum(failing_encoders.ENCODED)
    assert total > 192
    monkeypatch.setenv("FAIL_FLAG", str(tmp_path / "flag"))
    failing_encoders.ENCODED.clear()
    assert cli(*args, work)[0] == 1
    kept = sum(failing_encoders.ENCODED)
    assert 0 < kept < total
    assert len(list(layout.Work(work).features(encoder).rglob(".partial/**/*.npy"))) == 2
    failing_encoders.ENCODED.clear()
    code, text = cli(*args, work)
    assert code == 0, text
    assert sum(failing_encoders.ENCODED) == total - kept
    there, here = features(whole, encoder), features(work, encoder)
    files = sorted(p.relative_to(there) for p in there.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(here) for p in here.rglob("*") if p.is_file())
    assert all((there / f).read_bytes() == (here / f).read_bytes() for f in files)
    assert not (layout.Work(work).features(encoder) / ".partial").exists()
