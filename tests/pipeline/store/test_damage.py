"""Damaged and half-copied outputs: told by name, made anew, and never in the way of the others."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.configs.schema import TrainConfig
from mhim.pipeline.cohort import patients
from mhim.pipeline.cohort.labels.rows import Row
from mhim.pipeline.resume.stage import plan
from mhim.pipeline.store import layout, reading, seals, writing
from mhim.pipeline.upkeep import pack, verify
from tests.pipeline.toys import Toy, run, tree

Cli = Callable[..., tuple[int, str]]


def made(path: Path, n: int = 3000, compress: bool = False) -> Path:
    """A sealed store with three chunks of features, one of them of zeros alone, and coords."""
    writer = writing.StoreWriter(path, {"encoder": "e", "dim": 2, "mpp": 0.5})
    features = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    features[1000:2000] = 0
    writer.write("features", features, 1000, compress)
    writer.write("coords", np.arange(2 * n, dtype=np.int32).reshape(n, 2))
    writing.seal(path, {"stage": "test", "of": path.name})
    return path


def spoil(file: Path, how: str) -> None:
    raw = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
        return
    if how == "flip":
        raw[len(raw) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(bytes(len(raw)) if how == "zero" else raw[:40] if how == "cut" else raw)


def of(work: layout.Work, n: int = 5) -> list[Path]:
    return [made(work.feature_store("e", f"s{i}.svs")) for i in range(n)]


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_lost_or_short_chunk_is_an_error_wherever_it_is_read(tmp_path: Path, how: str, compress: bool) -> None:
    path = made(tmp_path / "x.zarr", compress=compress)
    whole = np.array(reading.read_array(path, "features"))
    assert not whole[1000:2000].any()
    assert whole[2000:].all()
    assert not (path / "features/c/1/0").exists(), "a chunk of zeros has no file, and that is no damage"
    spoil(path / "features/c/2/0", how)
    with pytest.raises(layout.StoreError, match=r"features/c/2/0|c/2/0 has 40 bytes"):
        reading.read_array(path, "features")
    with pytest.raises(layout.StoreError, match="is damaged: features/c/2/0"):
        reading.read_attrs(path)
    np.testing.assert_array_equal(
        reading.read_array(path, "coords")[0], [0, 1]
    )  # damage of another array is not its own


def test_a_store_of_an_earlier_version_still_opens(tmp_path: Path) -> None:
    path = made(tmp_path / "x.zarr")
    meta = json.loads((path / "zarr.json").read_text())
    for key in (seals.FILES, seals.OWN):
        del meta["attributes"][key]
    (path / "zarr.json").write_text(json.dumps(meta, indent=2))
    assert reading.read_attrs(path)["encoder"] == "e"
    assert reading.read_array(path, "features").shape == (3000, 2)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"zarr_format": 3}', '{"zarr_format": 3, "attributes": 1}', "\0" * 90, "[" * 99999]
)
def test_any_seal_is_read_or_told(tmp_path: Path, text: str) -> None:
    path = made(tmp_path / "x.zarr")
    (path / "zarr.json").write_text(text)
    found = seals.look(path)
    assert found is not None
    assert "zarr.json is damaged" in found.wrong
    with pytest.raises(layout.StoreError, match=r"zarr\.json is damaged"):
        reading.read_attrs(path)


def test_a_damaged_array_description_is_told(tmp_path: Path) -> None:
    path = made(tmp_path / "x.zarr")
    size = (path / "features/zarr.json").stat().st_size
    for text in ("{" * size, "{}".ljust(size), '{"shape": 3}'.ljust(size)):
        (path / "features/zarr.json").write_text(text)
        with pytest.raises(layout.StoreError, match="array 'features' cannot be read"):
            reading.read_array(path, "features")


@pytest.mark.parametrize("packed", [False, True])
def test_a_description_that_unfolds_to_a_vast_one_is_not_read(
    tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kB of a zip can stand for gigabytes; what is larger than any seal is damage, by name and size."""
    monkeypatch.setattr(seals, "LARGEST", 1 << 20)
    path = tmp_path / "x.zarr"
    vast = b'{"zarr_format": 3, "attributes": {"a": "' + b" " * (2 << 20) + b'"}}'
    for member in ("zarr.json", "features/zarr.json"):
        if packed:
            with zipfile.ZipFile(f"{path}.zip", "w", zipfile.ZIP_DEFLATED) as z:
                z.writestr(member, vast)
        else:
            (path / member).parent.mkdir(parents=True, exist_ok=True)
            (path / member).write_bytes(vast)
    found = seals.look(path)
    assert found is not None
    assert found.wrong
    with pytest.raises(layout.StoreError, match="has more than the 1 MiB of any description"):
        reading.read_array(path, "features")


def test_seals_are_deterministic(tmp_path: Path) -> None:
    assert tree(made(tmp_path / "a" / "x.zarr")) == tree(made(tmp_path / "b" / "x.zarr"))


# ------------------------------------------------------------------------------------------ planning


@pytest.mark.parametrize("file", ["a", "b", "manifest.json"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_an_output_that_lost_something_is_made_anew(tmp_path: Path, file: str, how: str) -> None:
    """A copy cut short at any place: without its seal, or with the seal and without a file, or with a shorter one."""
    run(Toy(tmp_path / "fresh", n=3))
    stage = Toy(tmp_path / "t", n=3, calls=tmp_path / "calls")
    run(stage)
    spoil(stage.root / "item_001" / file, how)
    shutil.rmtree(tmp_path / "calls")
    assert list(plan(stage, stage.items()).damaged) == ["item_001"]
    report = run(stage)
    assert report.exit_code == 0
    assert {o.key[-1]: o.state.value for o in report.outcomes} == {"0": "skipped", "1": "done", "2": "skipped"}
    assert len(list((tmp_path / "calls").iterdir())) == 1
    assert tree(stage.root) == tree(tmp_path / "fresh")


def test_what_cannot_be_made_anew_stays_as_it_is(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=2)
    run(stage)
    spoil(stage.root / "item_001" / "a", "cut")
    before = tree(stage.root)
    report = run(Toy(tmp_path / "t", n=2, bad=("item_001",)))
    assert report.exit_code == 1
    assert tree(stage.root) == before


# ------------------------------------------------------------------------------------------ training on what is left


def test_training_leaves_out_patients_with_damaged_features_and_names_them(tmp_path: Path) -> None:
    work = layout.Work(tmp_path)
    paths = of(work, 6)
    spoil(paths[1] / "zarr.json", "cut")
    spoil(paths[4] / "features/c/0/0", "cut")
    rows = [Row(i, f"s{i}.svs", f"p{i // 2}" if i < 4 else f"p{i}", "ab"[i // 2 % 2]) for i in range(6)]
    data = patients.labelled(rows, work.features("e"), TrainConfig())
    assert [p.id for p in data.patients] == ["p1", "p5"]  # a bag without one of its slides is another bag
    assert data.damaged == ("s1.svs", "s4.svs")
    text = "\n".join(data.notes)
    assert "s1.svs.zarr is damaged: zarr.json" in text
    assert "s4.svs.zarr is damaged: features/c/0/0 has 40 bytes" in text
    assert "1 slides are of patients with a damaged one: s0.svs" in text
    assert [p.id for p in patients.unlabelled(work.features("e"), rows).patients] == ["p1", "p5"]


# ------------------------------------------------------------------------------------------ verify


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", ["flip", "zero", "cut", "gone"])
def test_verify_names_exactly_the_damaged(tmp_path: Path, how: str, packed: bool) -> None:
    work = layout.Work(tmp_path / "w")
    paths = of(work)
    run(Toy(work.run("r"), n=2))
    (work.run("r") / "item_000").rename(work.run("r") / "fold_0")
    assert verify.verify(work).damaged == {}
    if packed:
        pack.pack(work)
        archive = Path(f"{paths[2]}.zip")
        with zipfile.ZipFile(archive) as z:
            at = z.getinfo("features/c/2/0").header_offset
        raw = bytearray(archive.read_bytes())
        raw[at + 100] ^= 1
        archive.chmod(0o644)
        archive.write_bytes(raw if how in ("flip", "zero") else raw[: at + 50])
    else:
        spoil(paths[2] / "features/c/2/0", how)
    spoil(work.run("r") / "fold_0" / "b", "flip")
    found = verify.verify(work)
    assert list(found.damaged) == ["features/e/s2.svs", "runs/r/fold_0"]
    if not packed:
        assert "features/c/2/0" in found.damaged["features/e/s2.svs"][0]
    assert found.damaged["runs/r/fold_0"] == ["b holds other bytes than were written"]
    assert found.sound == 5
    assert verify.verify(work, repair=True).moved.keys() == found.damaged.keys()
    assert reading.stored(paths[2]) is None
    assert verify.verify(work).damaged == {}
    assert not list(work.root.rglob(".*")), "nothing private is left"


def test_a_changed_attribute_is_damage(tmp_path: Path) -> None:
    work = layout.Work(tmp_path)
    path = of(work, 1)[0]
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"mpp": 0.5', '"mpp": 0.7'))
    assert verify.verify(work).damaged == {"features/e/s0.svs": ["what its seal says was changed"]}


def test_verify_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = layout.Work(tmp_path)
    of(work, 6)
    looked: list[str] = []
    plain = verify._check

    def watched(output: verify.Output, before: set[str]) -> tuple[str, list[str] | None]:
        mark, wrong = plain(output, before)
        if mark not in before:
            looked.append(output.name)
        if len(looked) == 4 and not before:
            raise KeyboardInterrupt
        return mark, wrong

    monkeypatch.setattr(verify, "_check", watched)
    with pytest.raises(KeyboardInterrupt):
        verify.verify(work, workers=1)
    first = set(looked)
    looked.clear()
    assert verify.verify(work, workers=1).sound == 6
    assert 2 <= len(looked) < 6
    assert first | set(looked) == {f"features/e/s{i}.svs" for i in range(6)}
    assert not (tmp_path / verify.NOTES).exists()


def test_outputs_of_earlier_versions_are_not_checkable_but_sizes_are(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "w")
    for path in of(work, 2):
        meta = json.loads((path / "zarr.json").read_text())
        del meta["attributes"][seals.FILES], meta["attributes"][seals.OWN]
        (path / "zarr.json").write_text(json.dumps(meta, indent=2))
    code, text = cli("verify", "--work", work.root)
    assert code == 0
    assert "not checkable, made by a version that kept no sums: 2" in text
    spoil(work.feature_store("e", "s1.svs") / "coords/c/0/0", "cut")
    code, text = cli("verify", "--work", work.root)
    assert code == 1
    assert "damaged features/e/s1.svs" in text


def test_packing_leaves_damaged_stores_and_goes_on(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "w")
    paths = of(work, 3)
    spoil(paths[1] / "features/c/0/0", "gone")
    code, text = cli("pack", "--work", work.root)
    assert code == 1
    assert "packed 2 stores" in text
    assert "s1.svs.zarr is damaged: features/c/0/0 is missing" in text
    assert paths[1].is_dir()
    assert not paths[0].exists()


# ------------------------------------------------------------------------------------------ the verbs


def test_the_verbs_go_round_damage(cli: Cli, tiled_cohort: Path, demo_cohort: Path, tmp_path: Path) -> None:
    """Tiles and features of single slides damaged: every verb names them, does the others, and heals them."""
    work = layout.Work(tmp_path / "w")
    shutil.copytree(tiled_cohort, work.root)
    tiles = sorted(p for p in work.tiles.glob("*.zarr") if not reading.read_attrs(p).get("empty"))
    features = sorted(work.features("texture").glob("*.zarr"))
    before = tree(work.root / "features")
    spoil(tiles[0] / "zarr.json", "zero")
    shutil.rmtree(features[0])
    spoil(features[1] / "features" / "zarr.json", "gone")
    (features[2] / "zarr.json").unlink()
    code, text = cli("status", "--work", work.root)
    assert code == 1
    assert f"tile: failed {tiles[0].stem}" in text
    for path in features[1:3]:
        assert f"extract texture: failed {path.stem}" in text
    code, text = cli("extract", "--work", work.root, "--workers", "1")
    assert code == 1
    assert "2 done" in text
    assert "1 failed" in text
    assert tiles[0].stem in text
    code, text = cli("qupath", "--work", work.root)
    assert code == 1
    assert "zarr.json is damaged" in text
    code, text = cli("tile", demo_cohort / "slides", "--work", work.root, "--workers", "1")
    assert "1 done" in text
    assert cli("extract", "--work", work.root, "--workers", "1")[0] == 0
    assert tree(work.root / "features") == before
    code, text = cli("verify", "--work", work.root)
    assert code == 0, text


def test_the_viewer_shows_the_rest(tiled_cohort: Path, tmp_path: Path) -> None:
    from mhim.pipeline.viewer.data import Gallery

    work = layout.Work(tmp_path / "w")
    shutil.copytree(tiled_cohort, work.root)
    tiles = sorted(work.tiles.glob("*.zarr"))
    spoil(tiles[0] / "zarr.json", "cut")
    work.run("old").mkdir(parents=True)
    (work.run("old") / "metrics.json").write_text('{"ta')
    (work.run("old") / "predictions.csv").write_text("slide\n")
    gallery = Gallery(work)
    shown = {s["id"]: s for s in gallery.index()["slides"]}
    assert not shown[tiles[0].stem]["readable"]
    assert "is damaged" in shown[tiles[0].stem]["why"]
    assert shown[tiles[1].stem]["readable"]
    assert len(gallery.left_out) == 2
    gallery.read.close()
