"""Several commands on one folder at the same time: outputs of one setting only, no row lost, nothing taken for done."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mhim.configs.schema import Config
from mhim.pipeline.cohort import slides
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.resume import runner
from mhim.pipeline.resume.claims import Claims, alone
from mhim.pipeline.resume.stage import Item, Made, Refused
from mhim.pipeline.store import layout
from tests.pipeline.toys import Toy, run, tree


@dataclass
class Pictured(Toy):
    """Each item has a picture of its value beside it. meanwhile: what another command does while one is made."""

    meanwhile: Any = None

    def beside(self, item: Item) -> dict[str, Path]:
        return {"picture": self.root.parent / "pictures" / item.key}

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        found = super().make(item, out, partial)
        (out.parent / "picture").write_text(str(self.value))
        if self.meanwhile is not None:
            self.meanwhile(item)
        return found


def test_two_commands_with_other_settings_never_share_a_folder(tmp_path: Path) -> None:
    """At the same moment nothing is there that could be compared: the first to begin says with which settings."""
    start = threading.Barrier(2)

    def command(value: int) -> Any:
        start.wait()
        try:
            return run(Toy(tmp_path / "t", n=6, value=value, seconds=0.1))
        except Refused as refused:
            return str(refused)

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(command, (1, 2)))
    (told,) = (end for end in ends if isinstance(end, str))
    (report,) = (end for end in ends if not isinstance(end, str))
    won = 1 + ends.index(report)
    assert f"toy.value: {won} there, {3 - won} now" in told
    assert report.exit_code == 0
    run(Toy(tmp_path / "fresh", n=6, value=won))
    assert tree(tmp_path / "t") == tree(tmp_path / "fresh")


def test_the_settings_of_a_command_that_died_bind_nobody(tmp_path: Path) -> None:
    claims = tmp_path / "t" / ".claims"
    with Claims(claims, 60) as held:
        held.take(".settings", {"toy.value": 7})
        (file,) = claims.glob("*.json")
        with pytest.raises(Refused, match=r"toy\.value: 7 there, 1 now"):
            run(Toy(tmp_path / "t", n=1))
        claim = json.loads(file.read_text()) | {"start": 1}  # the process of that number is another one by now
        file.write_text(json.dumps(claim))
        assert run(Toy(tmp_path / "t", n=1)).exit_code == 0


def test_who_joined_goes_on_with_the_settings_when_the_first_has_ended(tmp_path: Path) -> None:
    """The first of two equal commands ends before any output is there: a third with other settings still meets them."""
    stage, other = Toy(tmp_path / "t"), Toy(tmp_path / "t", value=2)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(runner._agreed(stage, 1.0))
        second.enter_context(runner._agreed(stage, 1.0))
        first.close()
        claims = Claims(stage.root / ".claims", 1.0)
        until = time.monotonic() + 20
        while claims.note(runner._SETTINGS) is None and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(Refused, match=r"toy.value: 1 there, 2 now"), runner._agreed(other, 1.0):
            pass
    with runner._agreed(other, 1.0):  # both are over
        assert claims.note(runner._SETTINGS) == {"stage": "toy", "toy.value": 2}


def test_another_stage_of_the_folder_is_waited_for_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two equal `run`, one scores while the other is about to end its training: that is no other settings."""
    first, then = Toy(tmp_path / "t"), Toy(tmp_path / "t", value=2)
    then.name = "then"
    with ExitStack() as ends:
        ends.enter_context(runner._agreed(first, 60.0))
        threading.Timer(0.3, ends.close).start()
        with runner._agreed(then, 60.0):
            pass
    monkeypatch.setattr(runner, "_OTHERS_END_S", 0.2)
    named = pytest.raises(Refused, match=r"at work in .*t: toy\. Nothing")
    with runner._agreed(first, 60.0), named as refused, runner._agreed(then, 60.0):
        pass
    assert "toy.value" not in str(refused.value)


def test_equal_settings_share_the_work(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: run(Toy(tmp_path / "t", n=6, seconds=0.1, calls=tmp_path / "c")), range(2)))
    assert [r.exit_code for r in reports] == [0, 0]
    assert len(list((tmp_path / "c").iterdir())) == 6


def test_a_lost_commit_names_the_field_that_differs(tmp_path: Path) -> None:
    """Its claim was lost meanwhile: the late output is dropped, and so is its picture."""

    def other(item: Item) -> None:
        run(Pictured(tmp_path / "other" / "t", n=1, value=2))
        item.output.parent.mkdir(parents=True, exist_ok=True)
        os.rename(tmp_path / "other" / "t" / item.key, item.output)
        os.rename(tmp_path / "other" / "pictures", tmp_path / "pictures")

    stage = Pictured(tmp_path / "t", n=1, value=1, meanwhile=other)
    report = run(stage)
    assert report.exit_code == 1
    assert "toy.value: 2 there, 1 now" in report.outcomes[0].message
    assert (tmp_path / "pictures" / "item_000").read_text() == "2"
    run(Pictured(tmp_path / "fresh" / "t", n=1, value=2))
    assert tree(stage.root) == tree(tmp_path / "fresh" / "t")


def test_an_equal_output_that_came_first_is_kept(tmp_path: Path) -> None:
    def other(item: Item) -> None:
        run(Toy(tmp_path / "other", n=1))
        item.output.parent.mkdir(parents=True, exist_ok=True)
        os.rename(tmp_path / "other" / item.key, item.output)

    report = run(Pictured(tmp_path / "t", n=1, meanwhile=other))
    assert [o.state.value for o in report.outcomes] == ["skipped"]


def test_half_a_copy_that_comes_in_between_is_not_taken_for_the_output(tmp_path: Path) -> None:
    def other(item: Item) -> None:
        item.output.mkdir(parents=True)
        (item.output / "a").write_text("half")

    assert run(Pictured(tmp_path / "t", n=1, meanwhile=other)).exit_code == 0
    run(Toy(tmp_path / "fresh", n=1))
    assert tree(tmp_path / "t") == tree(tmp_path / "fresh")


# ------------------------------------------------------------------------------------------ cohort.csv


def entries(folder: Path, n: int) -> list[SlideEntry]:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        (folder / f"{folder.name}_{k}.tif").touch()
    return [SlideEntry(p.name, p) for p in sorted(folder.iterdir())]


def test_commands_side_by_side_lose_no_row_of_the_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = layout.Work(tmp_path / "w")
    slides.remember(work, [SlideEntry(f"old{k}.tif", Path(f"/gone/old{k}.tif")) for k in range(20)])
    plain = slides.read_cohort

    def slow(work: layout.Work) -> list[SlideEntry]:
        found = plain(work)
        time.sleep(0.05)  # the overlap that would lose rows
        return found

    monkeypatch.setattr(slides, "read_cohort", slow)
    wards = [entries(tmp_path / f"ward{k}", 10) for k in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda ward: slides.remember(work, ward), wards))
    assert len(plain(work)) == 80
    assert not (work.root / ".claims").exists()


def test_the_same_folder_under_another_spelling_is_the_same(tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "w")
    entries(tmp_path / "slides", 2)
    (tmp_path / "link").symlink_to(tmp_path / "slides")
    for source in (tmp_path / "slides", tmp_path / "link", tmp_path / "slides" / ".." / "slides"):
        slides.remember(work, [SlideEntry(p.name, source / p.name) for p in sorted(source.iterdir())])
    assert [s.path for s in slides.read_cohort(work)] == sorted((tmp_path / "slides").iterdir())
    entries(tmp_path / "copy", 0)
    (tmp_path / "copy" / "slides_0.tif").touch()
    with pytest.raises(CohortError, match=r"slide id slides_0\.tif stands for"):
        slides.remember(work, [SlideEntry("slides_0.tif", tmp_path / "copy" / "slides_0.tif")])


def test_a_damaged_cohort_is_one_message(tmp_path: Path) -> None:
    work = layout.Work(tmp_path)
    for text in ("", "slide,pa", "slide,path,mpp\na,b,half\n", "slide,path,mpp\na,b"):
        work.cohort.write_text(text)
        with pytest.raises(CohortError, match=r"cohort.csv is damaged"):
            slides.read_cohort(work)
    work.cohort.write_bytes(b"slide,path,mpp\n\xff\xfe,b,\n")
    with pytest.raises(CohortError, match=r"cohort.csv is damaged"):
        slides.read_cohort(work)


def test_alone_waits_for_its_turn(tmp_path: Path) -> None:
    inside: list[int] = []

    def one(k: int) -> None:
        with alone(tmp_path / "c", "x"):
            inside.append(k)
            assert len(inside) == 1
            time.sleep(0.02)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(8)))


def test_one_run_is_one_experiment(tmp_path: Path) -> None:
    """Two trainings under one name: also where only the patients or the folds differ."""
    from mhim.mil.splits import Fold
    from mhim.pipeline.cohort.patients import Dataset, Patient
    from mhim.pipeline.stages.train import Train

    patients = tuple(Patient(f"p{k}", (f"s{k}",), (tmp_path / f"s{k}",), k % 2, f"d{k}") for k in range(4))
    work, config = layout.Work(tmp_path), Config()
    fold = Fold(0, 0, ("p0", "p1"), ("p2",), ("p3",))
    first = Train(work, config, "x", Dataset(patients, ("a", "b"), {"dim": 2}), [fold])
    fewer = Train(work, config, "x", Dataset(patients[:3], ("a", "b"), {"dim": 2}), [fold])
    turned = Fold(0, 0, ("p0", "p1"), ("p3",), ("p2",))
    other = Train(work, config, "x", Dataset(patients, ("a", "b"), {"dim": 2}), [turned])
    assert first.together() == Train(work, config, "x", first.data, [fold]).together()
    assert first.together() != fewer.together()
    assert first.together() != other.together()
