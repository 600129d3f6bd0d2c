"""The demo cohort: same seed same bytes, slides that open as real ones do, truth in place, no shortcut to the label."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.demo import cohort
from mhim.pipeline.demo.sprites import build_library
from mhim.pipeline.demo.tissue import MAP_MPP, SlidePlan, paint


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    cohort.make_cohort(folder, seed=3, n=2, small=True, workers=1)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes_whatever_the_threads(few: Path, tmp_path: Path) -> None:
    cohort.make_cohort(tmp_path, seed=3, n=2, small=True, workers=2)
    assert digests(tmp_path) == digests(few)


def test_an_interrupted_cohort_goes_on_and_ends_in_the_same_bytes(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "c")
    (tmp_path / "c" / "slides" / "no_tissue.svs").unlink()
    kept = (tmp_path / "c" / "slides" / "case_02.svs").stat().st_mtime_ns
    cohort.make_cohort(tmp_path / "c", seed=3, n=2, small=True)
    assert (tmp_path / "c" / "slides" / "case_02.svs").stat().st_mtime_ns == kept
    assert digests(tmp_path / "c") == digests(few)


def test_slides_of_another_seed_are_replaced(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "c")
    marker = tmp_path / "c" / "truth" / "cohort.json"
    marker.write_text(marker.read_text().replace('"seed": 3', '"seed": 4'))
    for slide in (tmp_path / "c" / "slides").iterdir():
        slide.write_bytes(b"of another seed")
    cohort.make_cohort(tmp_path / "c", seed=3, n=2, small=True)
    assert digests(tmp_path / "c") == digests(few)


def test_slides_open_as_aperio_with_an_mpp(few: Path) -> None:
    from mhim.extract.slide.slide import open_slide

    with open_slide(few / "slides" / "case_01.svs") as slide:
        assert slide.vendor == "aperio"
        assert slide.slide_mpp == pytest.approx((0.25, 0.25))
        assert len(slide.level_dimensions) == 3
        assert slide.level_downsamples[1] == pytest.approx(4, rel=0.01)
        image, _ = slide.image_at(8.0)
        assert image.reshape(-1, 3).max(0).min() > 225  # glass
        assert (image[..., 1] < 200).mean() > 0.2  # tissue


def test_the_broken_slides_are_broken_as_they_say(few: Path) -> None:
    from mhim.extract import MissingMpp, UnreadableSlide
    from mhim.extract.slide.slide import open_slide

    with pytest.raises(UnreadableSlide, match="truncated"):
        open_slide(few / "slides" / cohort.TRUNCATED)
    with pytest.raises(MissingMpp):
        open_slide(few / "slides" / cohort.NO_MPP)
    with open_slide(few / "slides" / cohort.NO_TISSUE) as slide:
        assert slide.slide_mpp[0] == 0.5
    assert not cohort.read_truth(few, cohort.NO_TISSUE).tissue.any()


def test_looks_are_the_same_for_both_labels() -> None:
    """Nothing but the tumour may tell the label: every look occurs as often with as without it."""
    labelled = [s for s in cohort.plan_cohort() if s.name.startswith("case")]
    assert len(labelled) >= 24

    def looks(label: int) -> Counter[tuple[object, ...]]:
        return Counter(
            (s.plan.width_px, s.plan.height_px, s.plan.mpp, s.plan.pieces, s.look.site, s.pen)
            for s in labelled
            if s.label == label
        )

    assert looks(0) == looks(1)
    assert {s.plan.mpp for s in labelled} == {0.25, 0.5}
    assert min(s.plan.width_px for s in labelled) > 10_000
    assert all((s.plan.tumour_um2 > 0) == (s.label == 1) for s in labelled)


@pytest.mark.parametrize("n", [32, 120])
def test_patients_have_one_label_and_some_have_two_slides(few: Path, n: int) -> None:
    slides = cohort.plan_cohort(n=n)
    labels: dict[str, set[int]] = {}
    for s in slides:
        labels.setdefault(s.patient, set()).add(s.label)
    assert all(len(v) == 1 for v in labels.values())
    assert max(Counter(s.patient for s in slides).values()) == 2
    rows = list(csv.DictReader((few / "labels.csv").open()))
    assert [r["slide"] for r in rows][-3:] == [cohort.NO_TISSUE, cohort.NO_MPP, cohort.TRUNCATED]
    assert {r["label"] for r in rows} == set(cohort.LABELS)


def test_planted_tumour_has_its_area_and_its_cells() -> None:
    plan = SlidePlan(seed=5, width_px=2944, height_px=2048, mpp=0.5, tumour_um2=1.6e5)
    painting = paint(plan, build_library(5, 0.5, small=True))
    assert painting.tumour.sum() * MAP_MPP**2 == pytest.approx(1.6e5, rel=0.02)
    assert (painting.tissue | ~painting.tumour).all()
    dark = painting.haema > 120  # nuclei
    k = round(MAP_MPP / plan.mpp)
    h, w = dark.shape[0] // k, dark.shape[1] // k
    per_map = dark[: h * k, : w * k].reshape(h, k, w, k).mean((1, 3))
    tumour, tissue = painting.tumour[:h, :w], painting.tissue[:h, :w]
    assert per_map[tumour].mean() > 2 * per_map[tissue & ~tumour].mean()


def test_tumour_fraction_counts_the_area_of_each_tile() -> None:
    tumour = np.zeros((50, 80), bool)
    tumour[10:30, 20:40] = True
    truth = cohort.Truth(tissue=tumour, tumour=tumour, mpp=4.0, slide_mpp=0.5)
    coords = np.array([[160, 80], [160 - 80, 80], [0, 0], [160 + 80, 80 + 80], [600, 380]], np.int32)
    fraction = cohort.tumour_fraction(truth, coords, 160)
    np.testing.assert_allclose(fraction, [1.0, 0.5, 0.0, 0.25, 0.0])
    assert cohort.tumour_fraction(truth, np.zeros((0, 2), np.int32), 160).shape == (0,)


def test_the_clinical_table_has_every_patient_and_a_few_empty_cells(few: Path) -> None:
    from mhim.pipeline.cohort.patient_tables.table import Kinds, read

    found = read(few / "clinical.csv", "clinical")
    with open(few / "labels.csv") as file:
        assert set(found.patients) == {row["patient"] for row in csv.DictReader(file)}
    assert found.kinds == Kinds(("age", "marker"), ("sex",))
    share = {f"P{i:02d}": 0.0 if i % 2 else i / 50 for i in range(25)}
    rows = [line.split(",") for line in cohort.clinical(share, 7).splitlines()[1:]]
    assert 0 < sum(cell == "" for row in rows for cell in row) < len(rows)
    assert [row[0] for row in rows] == sorted(share)
    known = [(share[row[0]], float(row[3])) for row in rows if row[3]]
    assert np.corrcoef(np.array(known).T)[0, 1] > 0.8  # the marker helps


def test_the_second_target_is_the_painted_tumour_s_share_of_the_tissue(few: Path) -> None:
    for row in csv.DictReader((few / "labels.csv").open()):
        truth = cohort.read_truth(few, row["slide"])
        own = truth.tumour.sum() / max(truth.tissue.sum(), 1)  # each patient of these has one slide
        assert float(row[cohort.SHARE]) == pytest.approx(own, abs=1e-4)
        assert (float(row[cohort.SHARE]) > 0) == (row["label"] == "tumour")
