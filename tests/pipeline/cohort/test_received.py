"""What is received (a run, features, packed stores, tables) runs nothing and reaches nothing outside its place."""

from __future__ import annotations

import json
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.store import ids, reading, writing
from mhim.pipeline.store import layout as store
from mhim.pipeline.upkeep import pack
from tests.conftest import once

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def sent(tmp_path_factory: pytest.TempPathFactory, tiled_cohort: Path, demo_cohort: Path) -> Path:
    """A trained run of two folds, in a folder by itself. Not to be changed: copy it."""
    from mhim.pipeline.cli.main import _main

    def make(folder: Path) -> None:
        work = shutil.copytree(tiled_cohort, folder / "work")
        args = ["--labels", str(demo_cohort / "labels.csv"), "--model", "mean", "--name", "R"]
        few = ["--set", "train.folds=2", "--epochs", "1", "--workers", "1"]
        assert _main(["train", "--work", str(work), *args, *few]) == 0

    return once(tmp_path_factory, "sent", make) / "work" / "runs" / "R"


@pytest.fixture
def received(sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, beside a package of a stranger's that leaves `mark` when it is imported."""
    (tmp_path / "stranger_r").mkdir()
    for name in ("__init__", "code"):
        (tmp_path / "stranger_r" / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'a').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Path(shutil.copytree(sent, tmp_path / "R"))


def a_new_slide(demo_cohort: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(sorted((demo_cohort / "slides").glob("case_*.svs"))[0], folder / "fresh.svs")
    return folder


def edited(run: Path, section: str, **values: object) -> None:
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(raw))


SCORE = ["--workers", "1", "--set", "score.heatmaps=none", "--set", "score.bootstrap=5"]


def test_an_untouched_run_scores_new_slides(cli: Cli, received: Path, demo_cohort: Path) -> None:
    slides = a_new_slide(demo_cohort, received.parent / "new")
    code, text = cli("score", slides, "--name", received, "--work", "victim", *SCORE)
    assert code == 0, text
    assert "1 slides of 1 patients scored" in text


POISONS: dict[str, Callable[[Path], None]] = {
    "shell": lambda run: edited(run, "extract", encoder="subprocess.getoutput", encoder_params={"cmd": "touch mark"}),
    "encoder": lambda run: edited(run, "extract", encoder="stranger_r.code.make"),
    "segmenter": lambda run: edited(run, "tile", segmenter="stranger_r.code"),
    "fallback": lambda run: edited(run, "tile", fallback_segmenter="stranger_r.code"),
    "weights": lambda run: edited(run, "extract", weights="/etc/hostname"),
    "cache": lambda run: edited(run, "extract", cache_dir="mark"),
    "remote code": lambda run: edited(run, "extract", encoder="hibou-b", encoder_params={"trust_remote_code": True}),
    "aliases": lambda run: (run / "config.yaml").write_text("tile: &a [*a]\n") and None,
    "deep": lambda run: (run / "config.yaml").write_text("tile: " + "[" * 90_000) and None,
    "model": lambda run: card(run, model="stranger_r.code"),
    "a model's student": lambda run: card(run, model="mhim", model_params={"student": "stranger_r.code"}),
    "deep card": lambda run: next(run.glob("fold_0/model.json")).write_text("[" * 200_000) and None,
    "another card": lambda run: next(run.glob("fold_0/model.json")).write_text("[1]") and None,
}


def card(run: Path, **values: object) -> None:
    for file in run.glob("fold_*/model.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("how", POISONS)
def test_a_poisoned_run_is_one_message_and_runs_nothing(how: str, cli: Cli, received: Path, demo_cohort: Path) -> None:
    slides = a_new_slide(demo_cohort, received.parent / "new")
    POISONS[how](received)
    code, text = cli("score", slides, "--name", received, "--work", "victim", "--set", "extract.offline=true", *SCORE)
    assert code in (1, 2, 3), text
    assert "fault of the program" not in text
    assert len(text) < 4000
    if how in ("shell", "encoder", "segmenter", "fallback", "model", "a model's student"):
        assert code == 2
        assert "--allow-plugin" in text
        assert "stranger_r.code" in text or "subprocess.getoutput" in text
    assert not (received.parent / "mark").exists()


def test_what_is_allowed_by_name_is_run(cli: Cli, received: Path, demo_cohort: Path) -> None:
    slides = a_new_slide(demo_cohort, received.parent / "new")
    edited(received, "tile", segmenter="tests.pipeline.slow_tissue")
    for card in received.glob("fold_*/model.json"):  # the models' own record, with which the settings must agree
        told = json.loads(card.read_text())
        told["made"] |= {"tile.segmenter": "tests.pipeline.slow_tissue"}
        of_the_other = ("tile.segmenter_defaults", "tile.segmenter_code")
        told["made"] = {k: v for k, v in told["made"].items() if k not in of_the_other}
        card.write_text(json.dumps(told))
        seal = json.loads((card.parent / "manifest.json").read_text())  # who writes a folder can seal it, too
        kept = {k: v for k, v in seal.items() if k not in ("files", "seal_sum")}
        (card.parent / "manifest.json").write_text(json.dumps(kept))
    assert cli("score", slides, "--name", received, "--work", "victim", *SCORE)[0] == 2
    allowed = ("--allow-plugin", "tests.pipeline.slow_tissue")
    code, text = cli("score", slides, "--name", received, "--work", "victim", *SCORE, *allowed)
    assert code == 0, text
    assert cli("score", "--allow-plugin", "subprocess", "--name", received)[0] == 2
    assert cli("score", "--allow-plugin=../x", "--name", received)[0] == 2


# ------------------------------------------------------------------------------------------------------ ids

OUT = ["../x", "../../../x", "/abs/x", "\\\\host\\x", "C:\\x", "a/../../x", "a\\..\\..\\x", "x\0y"]
ODD = [*OUT, "", "C:x", "a\tb", "a\x1bb", " a", "a ", "a//b", "./a", ".", ".hidden", "a/.hidden", "a.zarr/b", "x" * 300]


@pytest.mark.parametrize("name", ODD)
def test_an_id_that_is_no_name_in_the_folder_is_told(name: str) -> None:
    assert ids.wrong(name)
    assert bool(ids.leaves_the_folder(name)) == (name in [*OUT, ""])


@pytest.mark.parametrize("name", ["a", "site/0.svs", "ä b.svs", "..a", "a..b", "TCGA-AA-01.x", "日本", "ab:c"])
def test_an_id_that_is_a_name_is_taken(name: str) -> None:
    assert ids.leaves_the_folder(name) == ""
    if name != "..a":
        assert ids.wrong(name) == ""


@pytest.mark.parametrize("name", ["../../../x", "/tmp/absolute_x", "a\x07b", "C:x", "a.zarr/b", ".x"])
def test_a_table_with_such_a_bag_writes_nothing(name: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bags.csv").write_text(f'label,bag,f1\n0,fine,1\n1,"{name}",2\n')
    code, text = cli("import", tmp_path / "bags.csv", "--work", tmp_path / "w", "--encoder", "e")
    assert code == 2
    assert "row 3, column bag" in text
    assert [p.name for p in tmp_path.rglob("*")] == ["bags.csv"]


def test_a_table_that_contradicts_what_is_there_changes_nothing(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bags.csv").write_text("label,bag,f1\n0,a,1\n")
    assert cli("import", tmp_path / "bags.csv", "--work", tmp_path / "w")[0] == 0
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "bags.csv").write_text("label,bag,f1\n0,new,1\n0,a,9\n")
    assert cli("import", tmp_path / "bags.csv", "--work", tmp_path / "w")[0] == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_received_cohort_table_leads_nowhere(tmp_path: Path) -> None:
    work = store.Work(tmp_path)
    work.cohort.write_text("slide,path,mpp\n../../x.svs,/data/x.svs,\n")
    with pytest.raises(CohortError, match="leads out of the folder"):
        read_cohort(work)
    assert work.features("..").parent == work.root / "features"
    assert work.features("..").name != ".."


# ------------------------------------------------------------------------------------------------------ HDF5


def hdf5(tmp_path: Path, how: str) -> Path:
    h5py = pytest.importorskip("h5py")
    other, raw, file = tmp_path / "other.h5", tmp_path / "raw.bin", tmp_path / "in" / "a.h5"
    file.parent.mkdir()
    x = np.full((20, 8), 7, np.float32)
    x.tofile(raw)
    with h5py.File(other, "w") as f:
        f["features"] = x
        f["coords"] = np.zeros((20, 2), np.int32)
    with h5py.File(file, "w") as f:
        f["coords"] = np.zeros((20, 2), np.int32)
        if how == "external link":
            f["features"] = h5py.ExternalLink(str(other), "features")
        elif how == "coordinates elsewhere":
            f["features"] = x
            del f["coords"]
            f["coords"] = h5py.ExternalLink(str(other), "coords")
        elif how == "external storage":
            f.create_dataset("features", x.shape, "f4", external=[(str(raw), 0, x.nbytes)])
        elif how == "virtual dataset":
            layout = h5py.VirtualLayout(x.shape, "f4")
            layout[:] = h5py.VirtualSource(str(other), "features", x.shape)
            f.create_virtual_dataset("features", layout)
        elif how == "soft link through an external one":
            f["far"] = h5py.ExternalLink(str(other), "/")
            f["features"] = h5py.SoftLink("/far/features")
        elif how == "in a group":
            f.create_group("features")["uni"] = h5py.ExternalLink(str(other), "features")
        elif how == "never written":
            f.create_dataset("features", x.shape, "f4", chunks=(4, 8))
        elif how == "soft link within":
            f["mine"] = x
            f["features"] = h5py.SoftLink("/mine")
    return file.parent


@pytest.mark.parametrize(
    "how",
    [
        "external link",
        "coordinates elsewhere",
        "external storage",
        "virtual dataset",
        "soft link through an external one",
        "in a group",
        "never written",
    ],
)
def test_hdf5_whose_data_lies_elsewhere_is_refused_by_name(how: str, cli: Cli, tmp_path: Path) -> None:
    code, text = cli("import", hdf5(tmp_path, how), "--work", tmp_path / "w", "--encoder", "e")
    assert code == 2, text
    assert "a.h5: /" in text
    assert not (tmp_path / "w").exists()


def test_hdf5_with_a_link_within_is_taken(cli: Cli, tmp_path: Path) -> None:
    assert cli("import", hdf5(tmp_path, "soft link within"), "--work", tmp_path / "w", "--encoder", "e")[0] == 0
    path = store.Work(tmp_path / "w").feature_store("e", "a")
    assert np.array_equal(reading.read_array(path, "features"), np.full((20, 8), 7, np.float32))


# ------------------------------------------------------------------------------------------------------ packed stores


def packed(work: store.Work, how: str) -> Path:
    path = work.tile_store("a.svs")
    writer = writing.StoreWriter(path, {"fingerprint": "0" * 16})
    writer.write("coords", np.zeros((3, 2), np.int32))
    pack.pack(work)
    file = Path(f"{path}.zip")
    file.chmod(0o644)
    with zipfile.ZipFile(file, "a") as z:
        if how == "outside":
            z.writestr("../../out", "x")
        elif how == "absolute":
            z.writestr("/tmp/out_of_a_pack", "x")
        elif how == "twice":
            z.writestr(zipfile.ZipInfo("zarr.json"), "{}")
        elif how == "compressed":
            z.writestr("bomb", b"\0" * 10_000_000, zipfile.ZIP_DEFLATED)
        else:
            link = zipfile.ZipInfo("link")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            z.writestr(link, "/etc/passwd")
    return file


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("how", ["outside", "absolute", "twice", "compressed", "link"])
def test_a_pack_that_no_pack_command_made_is_refused(how: str, cli: Cli, tmp_path: Path) -> None:
    work = store.Work(tmp_path / "w")
    file = packed(work, how)
    before = sorted(tmp_path.rglob("*"))
    code, text = cli("unpack", "--work", work.root)
    assert code != 0
    assert re.search(r"member '.*' is refused", text)
    assert file.exists()
    assert sorted(p for p in tmp_path.rglob("*") if ".claims" not in p.parts) == before
