"""Items on Dask: real workers killed at random, processes that die, resources, long work that holds Python's lock."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mhim.configs.schema import ClusterConfig
from mhim.pipeline.backends import dask as backend
from mhim.pipeline.backends import local
from mhim.pipeline.resume import runner
from mhim.pipeline.resume.live import Live
from mhim.pipeline.resume.stage import Item, Made, Outcome, Report, Stage, State, plan
from mhim.pipeline.store import layout
from mhim.pipeline.store.may_differ import results
from mhim.pipeline.upkeep import status
from tests.pipeline.bags import make_features, sets, write_labels

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Toy(Stage):
    """Items that write their key many times. doomed: kill their process the first `deaths` times. hog_s: how long
    an item holds Python's lock."""

    root: Path
    n: int = 8
    sleep_s: float = 0.0
    doomed: tuple[str, ...] = ()
    deaths: int = 1
    hog_s: int = 0
    name: str = "toy"
    heavy: bool = False

    def items(self) -> list[Item]:
        return [Item(f"item_{i:03d}", self.root / f"item_{i:03d}", {"i": i}) for i in range(self.n)]

    def settings(self) -> dict[str, Any]:
        return {}

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        if item.key in self.doomed:
            marks = self.root.parent / "marks"
            marks.mkdir(exist_ok=True)
            if len(list(marks.glob(f"{item.key}-*"))) < self.deaths:
                (marks / f"{item.key}-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if self.hog_s:
            ctypes.PyDLL(None).sleep(self.hog_s)  # no other thread of this process runs meanwhile
        time.sleep(self.sleep_s)
        out.mkdir()
        (out / "data").write_text(item.key * 1000)
        return Made()


def run(stage: Stage, make: Any, **settings: Any) -> Report:
    cluster = ClusterConfig(**{"lease_s": 5.0, **settings})

    def on(stage: Stage, items: list[Item], replace: bool, remake: bool) -> Iterator[Outcome]:
        yield from make.run(stage, items, replace, remake, cluster)

    return runner.run(plan(stage, stage.items()), on, lease_s=cluster.lease_s)


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@dataclass
class Cluster:
    """A scheduler and nannied workers as a person would start them: processes of their own."""

    address: str
    workers: list[subprocess.Popen[bytes]]

    def params(self, **more: Any) -> dict[str, Any]:
        return {"scheduler": self.address, "timeout_s": 60.0, **more}


def serve(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "50",
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "6s",
    }
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_" + command[0], *command[1:]],
            cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("dask")
    # without dashboards: the tests do not look at them
    known = ["--no-dashboard", "--scheduler-file", str(folder / "s.json")]
    scheduler = serve(["scheduler", "--host", "127.0.0.1", "--port", "0", *known], folder)
    worker = ["worker", "--nthreads", "1", "--memory-limit", "0", *known]
    deadline = time.monotonic() + 60
    while not (folder / "s.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = [serve([*worker, *extra], folder) for extra in ([], ["--resources", "GPU=1"])]
    cluster = Cluster(json.loads((folder / "s.json").read_text())["address"], workers)
    while len(worker_processes(cluster)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    yield cluster
    backend.close()
    for process in [*workers, scheduler]:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def worker_processes(cluster: Cluster) -> list[int]:
    """The processes under the nannies that talk to the scheduler."""
    import psutil

    found = []
    for nanny in cluster.workers:
        for process in psutil.Process(nanny.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # just killed, or ended between the two questions
                if any("spawn_main" in part for part in process.cmdline()):
                    found.append(process.pid)
    return found


def test_workers_killed_at_random_lose_and_double_nothing(cluster: Cluster, tmp_path: Path) -> None:
    stage = Toy(tmp_path / "dask" / "out", n=40, sleep_s=0.25)
    rng = random.Random(os.environ.get("KILL_SEED", "1"))
    stop = threading.Event()
    killed: list[int] = []

    def shoot() -> None:
        while len(killed) < 4 and not stop.wait(rng.uniform(0.3, 1.5)):
            targets = worker_processes(cluster)
            if targets and list(stage.root.glob("item_*")):
                killed.append(rng.choice(targets))
                os.kill(killed[-1], signal.SIGKILL)

    gun = threading.Thread(target=shoot)
    gun.start()
    try:
        report = run(stage, backend, backend="dask", backend_params=cluster.params(retries=20))
    finally:
        stop.set()
        gun.join()
    assert len(killed) >= 2, "the kills came too late to test anything"
    assert report.exit_code == 0, report
    assert sorted(o.key for o in report.outcomes) == [i.key for i in stage.items()]
    calm = Toy(tmp_path / "local" / "out", n=40)
    assert run(calm, local, workers=1).exit_code == 0
    assert tree(stage.root) == tree(calm.root)


def test_a_process_that_dies_is_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    stage = Toy(tmp_path / "out", n=4, doomed=("item_001",), deaths=2)
    report = run(stage, backend, backend="dask", backend_params=cluster.params())
    assert report.exit_code == 0, report
    assert len(list((tmp_path / "marks").iterdir())) == 2


def test_an_item_that_always_kills_its_process_is_one_failure(cluster: Cluster, tmp_path: Path) -> None:
    stage = Toy(tmp_path / "out", n=4, doomed=("item_002",), deaths=99)
    report = run(stage, backend, backend="dask", backend_params=cluster.params(retries=1))
    assert [(o.key, o.state) for o in report.failures] == [("item_002", State.FAILED)]
    assert "SIGKILL" in report.failures[0].message
    assert report.count(State.DONE) == 3
    assert len(list((tmp_path / "marks").iterdir())) == 2


def test_work_that_holds_pythons_lock_does_not_make_a_worker_look_dead(cluster: Cluster, tmp_path: Path) -> None:
    before = worker_processes(cluster)
    stage = Toy(tmp_path / "out", n=2, hog_s=14)  # a worker that is silent for 6 s counts as dead here
    report = run(stage, backend, backend="dask", backend_params=cluster.params(retries=0))
    assert report.exit_code == 0, report
    assert worker_processes(cluster) == before


def test_resources_choose_the_worker(cluster: Cluster, tmp_path: Path) -> None:
    stage = Toy(tmp_path / "out", n=3, name="gpu_stage")
    params = cluster.params(resources={"gpu_stage": {"GPU": 1}})
    assert run(stage, backend, backend="dask", backend_params=params).exit_code == 0


def test_a_stage_can_be_repeated_and_skips(cluster: Cluster, tmp_path: Path) -> None:
    stage = Toy(tmp_path / "out", n=3)
    for state in (State.DONE, State.SKIPPED):
        report = run(stage, backend, backend="dask", backend_params=cluster.params())
        assert report.count(state) == 3


def test_a_command_that_is_stopped_or_killed_gives_its_items_back(cluster: Cluster, tmp_path: Path) -> None:
    stage = Toy(tmp_path / "dask" / "out", n=12, sleep_s=0.5)
    code = (
        "from pathlib import PosixPath; from tests.pipeline.backends.test_dask import Toy, backend, run, runner\n"
        f"with runner.leaving(): run({stage!r}, backend, backend='dask', backend_params={cluster.params()!r})"
    )
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        before = len(list(stage.root.glob("item_*")))
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(stage.root.glob("item_*"))) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == expected
        if number == signal.SIGTERM:
            while list(stage.root.glob(".claims/*.json")) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not list(stage.root.glob(".claims/*.json")), "items under way are given back at once"
            assert len(list(stage.root.glob("item_*"))) < stage.n, "the signal came too late to test anything"
    report = run(stage, backend, backend="dask", backend_params=cluster.params())
    assert report.exit_code == 0, report
    calm = Toy(tmp_path / "local" / "out", n=12)
    run(calm, local, workers=1)
    assert tree(stage.root) == tree(calm.root)


def test_no_cluster_is_one_clear_reason(tmp_path: Path) -> None:
    params = {"scheduler": "tcp://127.0.0.1:9", "timeout_s": 1.0}
    report = run(Toy(tmp_path / "out"), backend, backend="dask", backend_params=params)
    assert "no Dask cluster at tcp://127.0.0.1:9" in report.stopped
    assert report.exit_code == 1


def test_verbs_give_the_bytes_of_a_local_run(
    cluster: Cluster, demo_cohort: Path, tiled_cohort: Path, tmp_path: Path
) -> None:
    from mhim.pipeline.cli.main import _main

    where = ["--work", str(tmp_path), "--backend", "dask", "--scheduler", cluster.address]
    assert _main(["tile", str(demo_cohort / "slides"), *where]) == 1  # the broken slides
    assert _main(["extract", *where]) == 0
    here, there = results(tiled_cohort), results(tmp_path)
    assert any(name.startswith("features/") for name in here)
    assert there == here


def test_trainings_on_workers_are_watched_by_the_epoch(cluster: Cluster, tmp_path: Path) -> None:
    from mhim.pipeline.cli.main import _main

    work, seen, over = layout.Work(tmp_path / "work"), list[dict[str, Live]](), threading.Event()
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 8))

    def look() -> None:
        while not over.wait(0.05):
            seen.extend(stage.live for stage in status.read(work) if stage.live)

    eye = threading.Thread(target=look)
    eye.start()
    quick = sets("train.epochs=150", "train.patience=0", "train.folds=2", "train.draws=2")
    given = ["--work", work.root, "--labels", labels, "--encoder", "texture", "--model", "abmil", *quick]
    try:
        assert _main(["train", *map(str, given), "--backend", "dask", "--scheduler", cluster.address]) == 0
    finally:
        over.set()
        eye.join()
    told = {key: one for found in seen for key, one in found.items() if one.done > 0}
    assert {f"draws/{k}/fold_{i}" for k in (0, 1) for i in (0, 1)} <= told.keys(), "which draw of which fold"
    assert all(one.of == 150 and one.best and one.each_s for one in told.values())
    assert max(map(len, seen)) > 1, "side by side"


def test_a_cluster_of_its_own_runs_heavy_items_one_by_one(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "out", n=3, heavy=True)
    before = dict(os.environ)
    report = run(stage, backend, backend="dask", workers=2, backend_params={"dashboard": "127.0.0.1:0"})
    now = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    assert now == {name: before[name] for name in before if name != "PYTEST_CURRENT_TEST"}
    assert report.exit_code == 0, report
    assert report.count(State.DONE) == 3
