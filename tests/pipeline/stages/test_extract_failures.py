"""What breaks under an extraction: one clear message, that slide recorded, the rest goes on, nothing half-made left."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.configs.schema import ClusterConfig, Config, ExtractConfig
from mhim.pipeline.backends import local
from mhim.pipeline.cohort import slides as cohort
from mhim.pipeline.resume.runner import run_items
from mhim.pipeline.resume.stage import Outcome, State, Stopped
from mhim.pipeline.stages.extract import Extract
from mhim.pipeline.store import layout, reading

Cli = Callable[..., tuple[int, str]]
ENCODERS = "tests.pipeline.failing_encoders"


@pytest.fixture(scope="module")
def tiled(demo_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with slides/ (eight good ones) and work/, in which they are tiled."""
    from mhim.pipeline.cli.main import _main

    folder = tmp_path_factory.mktemp("failures")
    (folder / "slides").mkdir()
    for slide in sorted((demo_cohort / "slides").glob("case_*.svs")):
        shutil.copy(slide, folder / "slides")
    assert _main(["tile", str(folder / "slides"), "--work", str(folder / "work"), "--workers", "1"]) == 0
    return folder


@pytest.fixture
def work(tiled: Path, tmp_path: Path) -> Path:
    """A copy of the work folder for one test; the slides themselves are shared."""
    shutil.copytree(tiled / "work", tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(autouse=True)
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAIL_FLAG", str(tmp_path / "flag"))
    return tmp_path / "flag"


def made(work: Path, encoder: str) -> dict[str, np.ndarray]:
    """Features of every finished slide."""
    root = layout.Work(work).features(encoder)
    return {p.stem: np.array(reading.read_array(p, "features")) for p in root.glob("*.zarr")}


def on_two_devices(work: Path, encoder: str) -> list[Outcome]:
    found = layout.Work(work)
    config = Config(extract=ExtractConfig(encoder=encoder, gpus=(0, 1)))
    stage = Extract(found, config, cohort.read_cohort(found))
    return list(local.run(stage, stage.items(), False, False, ClusterConfig()))


def test_a_gpu_that_vanishes_fails_its_slide_and_stops_the_rest_with_one_message(cli: Cli, work: Path) -> None:
    encoder = f"{ENCODERS}.gpu_fails"
    code, text = cli("extract", "--work", work, "--encoder", encoder)
    assert code == 1
    lines = text.splitlines()
    assert sum("failed" in line and ".svs: encoding stopped after" in line for line in lines) >= 1
    assert "uncorrectable ECC error" in text
    assert "not tried" in text
    assert "1 failed" in text
    assert "the rest is complete" not in text
    before = made(work, encoder)
    assert len(before) < 8, "those after it were not tried"
    code, text = cli("extract", "--work", work, "--encoder", encoder)  # the GPU is back
    assert code == 0, text
    after = made(work, encoder)
    assert len(after) == 8
    for name, features in before.items():
        np.testing.assert_array_equal(features, after[name])


@pytest.mark.parametrize(
    ("name", "failed", "words"),
    [
        ("gpu_fails", 1, "uncorrectable ECC error"),
        ("killed", 0, ""),  # once, while it read ahead: its item is made again alone, and only then blamed
        ("gpu_gone", 0, ""),
    ],
)
def test_one_of_two_devices_breaks_and_the_other_goes_on(work: Path, name: str, failed: int, words: str) -> None:
    outcomes = on_two_devices(work, f"{ENCODERS}.{name}")
    assert len(outcomes) == 8
    bad = [o for o in outcomes if o.state is not State.DONE]
    assert len(bad) == failed, outcomes
    assert all(words in o.message for o in bad)
    assert len(made(work, f"{ENCODERS}.{name}")) == 8 - failed


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_bad_weights_stop_the_run_once(cli: Cli, work: Path, tmp_path: Path) -> None:
    """Of another shape, cut off, or a pickle in disguise: told once, and not once per slide."""
    import timm
    import torch
    from safetensors.torch import save_file

    state = timm.create_model("test_vit").state_dict()
    files = {n: tmp_path / n for n in ("shape.safetensors", "cut.safetensors", "trap.safetensors", "trap.pth")}
    save_file({**state, "pos_embed": torch.zeros(1, 3, 5)}, files["shape.safetensors"])
    save_file(state, files["cut.safetensors"])
    files["cut.safetensors"].write_bytes(files["cut.safetensors"].read_bytes()[:-999])
    sprung = tmp_path / "sprung"
    for trap in ("trap.safetensors", "trap.pth"):
        files[trap].write_bytes(pickle.dumps({"pos_embed": _Trap(str(sprung))}))
    words = {
        "shape.safetensors": "of another shape (pos_embed",
        "cut.safetensors": "damaged",
        "trap.safetensors": "damaged or not a safetensors file",
        "trap.pth": "could run code when opened",
    }
    asked = ["extract", "--work", work, "--encoder", "timm:test_vit", "--weights", files["trap.safetensors"]]
    code, text = cli(*asked, "--offline")  # from the command, whose encoder is in a process of its own
    assert code == 1, text
    assert text.count(words["trap.safetensors"]) == 1, text
    assert "case_" not in text, "no slide is blamed"
    found = layout.Work(work)
    for name, file in files.items():  # and each in this process, since another imports torch and timm anew
        config = Config(extract=ExtractConfig(encoder="timm:test_vit", weights=str(file), offline=True))
        stage = Extract(found, config, cohort.read_cohort(found))
        with pytest.raises(Stopped, match=re.escape(words[name])) as told:
            list(run_items(stage, stage.items(), config.cluster.lease_s))
        assert "case_" not in str(told.value)
    assert not sprung.exists()
    assert made(work, "timm:test_vit") == {}


def moved_slides(tiled: Path, work: Path) -> Path:
    """The slides copied beside `work`, and its cohort pointing at the copies."""
    slides = work.parent / "slides"
    shutil.copytree(tiled / "slides", slides)
    file = work / "cohort.csv"
    file.write_text(file.read_text().replace(str(tiled / "slides"), str(slides)))
    return slides


def test_a_slide_that_dies_half_way(cli: Cli, tiled: Path, work: Path) -> None:
    """Half of its bytes turned to nothing after it was tiled: it fails, by name; the others are as without it."""
    bad = moved_slides(tiled, work) / "case_03.svs"
    data = bytearray(bad.read_bytes())
    data[len(data) // 4 : len(data) * 3 // 4] = bytes(len(data) * 3 // 4 - len(data) // 4)
    bad.write_bytes(data)
    code, text = cli("extract", "--work", work, "--workers", 1)
    assert code == 1
    assert "failed case_03.svs" in text
    assert "1 failed" in text
    assert sorted(made(work, "texture")) == [f"case_0{i}.svs" for i in range(1, 9) if i != 3]
    assert not [p for p in layout.Work(work).features("texture").rglob("*") if "case_03" in p.name and p.is_dir()]


def test_tiles_of_another_file_are_refused(cli: Cli, tiled: Path, work: Path) -> None:
    """The slide was changed, or the tiles are of a cohort that used the same names."""
    slides = moved_slides(tiled, work)
    shutil.copy(slides / "case_01.svs", slides / "case_02.svs")
    code, text = cli("extract", "--work", work, "--workers", 1)
    assert code == 1
    assert "case_02.svs is not the file that its tiles are of" in " ".join(text.split())
    assert len(made(work, "texture")) == 7


def test_a_full_disk_keeps_whole_slides_and_goes_on_later(cli: Cli, tiled: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount: a small file system")
    encoder = f"{ENCODERS}.wide"

    asked = ["--encoder", encoder, "--set", "extract.dtype=float32", "--set", "extract.chunk_rows=64"]
    try:
        shutil.copytree(tiled / "work", disk / "work")
        shutil.rmtree(disk / "work" / "overlays")
        code, text = cli("extract", "--work", disk / "work", *asked)
        assert code == 1
        assert "disk is full" in text, text
        assert "Traceback" not in text
        assert text.count("disk is full") == 1
        subprocess.run(["mount", "-o", "remount,size=512m", disk], check=True)
        half = made(disk / "work", encoder)
        assert len(half) < 8
        code, text = cli("extract", "--work", disk / "work", *asked)
        assert code == 0, text
        shutil.copytree(tiled / "work", tmp_path / "work")
        assert cli("extract", "--work", tmp_path / "work", *asked)[0] == 0
        want, got = made(tmp_path / "work", encoder), made(disk / "work", encoder)
        assert want.keys() == got.keys()
        assert len(got) == 8
        for name, features in want.items():
            np.testing.assert_array_equal(features, got[name])
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
