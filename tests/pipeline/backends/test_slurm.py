"""The SLURM back end: its scripts, and whole jobs on a real SLURM, hit in every way that machines hit them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mhim.configs.lookup import LookupFailed
from mhim.configs.schema import ClusterConfig, Config
from mhim.pipeline.backends import JobFolder, Step, slurm
from mhim.pipeline.backends._submission import ends_of
from mhim.pipeline.backends.slurm import Params
from mhim.pipeline.resume.stage import Stopped
from mhim.pipeline.store.layout import Work
from mhim.pipeline.store.may_differ import results, unfinished
from mhim.pipeline.upkeep.watch import Watch
from tests.pipeline.bags import make_features, sets, write_labels
from tests.pipeline.slurm_cluster import Cluster, Unavailable

Cli = Callable[..., tuple[int, str]]
ROOT = Path(__file__).resolve().parents[3]
SLOW = ["--segmenter", "tests.pipeline.slow_tissue", "--set", "tile.fallback_segmenter=''"]
QUICK = ["--set", "train.epochs=2", "--set", "train.folds=2", "--set", "train.seed=3", "--set", "score.heatmaps=none"]


# ------------------------------------------------------------------------------------------------ scripts


def script(tmp_path: Path, **params: object) -> str:
    p = Params(**params)  # type: ignore[arg-type]
    step = Step("extract", ["--offline"], 7, ["a b.svs", "c.svs"])
    return slurm.job_script(step, JobFolder(tmp_path / "jobs", Work(tmp_path)), p, p.of("extract"), 7)


def test_a_script_asks_for_what_is_configured(tmp_path: Path) -> None:
    text = script(
        tmp_path, partition="long", account="path", time="4:00:00", memory="16G", cpus=8, modules=("cuda/12",),
        at_once=3, extra=("--exclude=n7",), extract={"partition": "gpu", "gpus": 1},
    )  # fmt: skip
    for line in (
        "partition=gpu", "account=path", "time=4:00:00", "mem=16G", "cpus-per-task=8", "gres=gpu:1", "array=1-7%3",
        "exclude=n7", "signal=B:USR1@120", "requeue",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text
    assert "module load cuda/12\n" in text
    assert "qos" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_what_a_site_asks_for_and_how_often_a_task_comes_back(tmp_path: Path) -> None:
    text = script(tmp_path, qos="high", constraint="a100", requeues=7, restarts=5)
    assert "#SBATCH --qos=high\n" in text
    assert "#SBATCH --constraint=a100\n" in text
    assert "  again 7 && exit 0\n" in text
    assert "  again 5 && exit 0  #" in text


def test_few_items_get_few_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 17\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for items_per_task, tasks in ((1, 7), (3, 3), (10, 1)):
        params = {"tasks": 20, "items_per_task": items_per_task}
        config = Config(cluster=ClusterConfig(backend="slurm", backend_params=params))
        work = Work(tmp_path / f"w{items_per_task}")
        folder = slurm.submit(work, config, [Step("tile", ["/slides"], 7)])[0]
        assert f"#SBATCH --array=1-{tasks}\n" in (folder / "tile.sh").read_text().replace("%", "\n")


def test_a_container_gets_the_folders_it_needs(tmp_path: Path) -> None:
    p = Params(container="/images/mhim.sif", gpus=1, bind=("/scratch",))
    text = slurm.job_script(Step("tile", ["/data/slides"], 1), JobFolder(tmp_path, Work(tmp_path)), p, p.of("tile"), 1)
    assert "apptainer exec --nv" in text
    for folder in (tmp_path, "/data/slides", "/scratch"):
        assert f"--bind {folder}" in text
    assert "/images/mhim.sif pipeline tile /data/slides" in text


def test_folders_with_blanks_and_percent_signs_stay_whole(tmp_path: Path) -> None:
    p, work = Params(cpus=1), tmp_path / "my work 50%"
    text = slurm.job_script(
        Step("tile", ["/my slides"], 1), JobFolder(work / "jobs" / "x", Work(work)), p, p.of("tile"), 1
    )
    assert f'#SBATCH --output="{tmp_path}/my work 50%%/jobs/x/logs/tile-%a.log"\n' in text
    assert '#SBATCH --job-name="tile-my work 50%"\n' in text
    assert "tile '/my slides' --work" in text


def test_unknown_resources_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LookupFailed, match=r"slurm, extract: gpu: unknown key; it takes: .*gpus"):
        Params(extract={"gpu": 1}).of("extract")
    config = Config(cluster=ClusterConfig(backend="slurm", backend_params={"partitoin": "x"}))
    with pytest.raises(LookupFailed, match="partitoin"):
        slurm.submit(Work(tmp_path), config, [Step("tile", [], 1)])


def test_no_slurm_here_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Stopped, match="no `sbatch`"):
        slurm.submit(Work(tmp_path), Config(), [Step("tile", [], 1)])
    assert not (tmp_path / "jobs").exists()


def test_a_refused_step_stops_the_steps_after_it(demo_cohort: Path, tmp_path: Path) -> None:
    """By hand, without SLURM: the script of a wrong command leaves a mark that the next script obeys."""
    folder = tmp_path / "jobs" / "x"
    folder.mkdir(parents=True)
    (folder / "tile.yaml").write_text("tile: {}\n")
    p = Params(cpus=1)
    for verb, args in (("tile", [str(demo_cohort / "nowhere")]), ("extract", [])):
        text = slurm.job_script(Step(verb, args, 1), JobFolder(folder, Work(tmp_path)), p, p.of(verb), 1)
        (folder / f"{verb}.sh").write_text(text)
    codes = [
        subprocess.run(["bash", str(folder / f"{v}.sh")], cwd=ROOT, check=False).returncode for v in ("tile", "extract")
    ]
    assert codes == [2, 3]
    assert ends_of(folder) == {"tile": [(1, "2")], "extract": [(1, "3")]}


def test_torn_notes_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "ends").write_text("tile 1 0 requeued:143 n1 2026\ntile 1 1 0 n1 2026\nnonsense\ntile 2 0")
    assert ends_of(tmp_path) == {"tile": [(1, "requeued:143"), (1, "0")]}


# ------------------------------------------------------------------------------------------------ a real SLURM


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    running = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        env = running.__enter__()
    except Unavailable as reason:
        pytest.skip(f"needs a scheduler: no real SLURM here: {reason}")
    try:
        yield env
    finally:
        running.__exit__()


@pytest.fixture(scope="module")
def slow(demo_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The slow segmenter's tiles, made locally and undisturbed."""
    work = tmp_path_factory.mktemp("slow")
    pipeline("tile", demo_cohort / "slides", *SLOW, "--work", work, "--workers", 2, code=1)
    return results(work)


def pipeline(*args: object, env: dict[str, str] | None = None, code: int | None = 0) -> str:
    """The command line in a process of its own, as on a login node."""
    command = [sys.executable, "-m", "mhim.pipeline", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def said(env: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.05)


def over(env: dict[str, str], job: str) -> bool:
    return not said(env, "squeue", "-h", "-j", job).strip()


def params(**values: object) -> list[str]:
    both = {"cpus": 1, "poll_s": 0.5, "memory": "200M", **values}
    return [part for k, v in both.items() for part in ("--set", f"cluster.backend_params.{k}={json.dumps(v)}")]


def submit(env: dict[str, str], cohort: Path, work: Path, slow_s: float, **values: object) -> tuple[str, Path]:
    """The slow tiling as an array. Returns the job's number and folder."""
    text = pipeline("tile", cohort / "slides", *SLOW, "--work", work, "--backend", "slurm", *params(**values),
                    env={**env, "SLOW_S": str(slow_s)})  # fmt: skip
    number = re.search(r"tile: job (\d+)", text)
    assert number, text
    return number[1], max((work / "jobs").iterdir())


@pytest.fixture(scope="module")
def timed(
    cluster: dict[str, str], demo_cohort: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A job that will hit its walltime, started early: SLURM's shortest is a minute, and it looks every 30 s."""
    work = tmp_path_factory.mktemp("timed")
    return (*submit(cluster, demo_cohort, work, 6.0, tasks=1, time="00:01:00", warn_s=50), work)


def stores(work: Path) -> list[Path]:
    return list(work.glob("tiles/*.zarr"))


def test_the_four_verbs_as_jobs_end_in_the_bytes_of_a_local_run(
    cluster: dict[str, str], timed: object, demo_cohort: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done on the login node is done in this process; the tasks are processes of their own."""
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    work, local = tmp_path / "jobs", tmp_path / "local"

    def pipeline(*args: object, code: int = 0) -> str:
        ended, text = cli(*args)
        assert ended == code, text
        return text

    pipeline("run", demo_cohort / "slides", "--labels", demo_cohort / "labels.csv", "--model", "abmil", *QUICK,
             "--work", local, "--workers", 1, code=1)  # fmt: skip
    text = pipeline("run", demo_cohort / "slides", "--labels", demo_cohort / "labels.csv", "--model", "abmil", *QUICK,
                    "--work", work, "--backend", "slurm", "--wait", *params(tasks=2), code=1)  # fmt: skip
    assert results(work) == results(local)
    assert not unfinished(work)
    jobs = re.findall(r"^(\w+): job \d+ \((\d) task", text, re.M)
    assert jobs == [("tile", "2"), ("extract", "2"), ("train", "2"), ("score", "1")]
    folder = next((work / "jobs").iterdir())
    order = [line.split()[0] for line in (folder / "ends").read_text().splitlines()]
    assert order == sorted(order, key=["tile", "extract", "train", "score"].index), "each step waits for the one before"
    tile = ["tile", demo_cohort / "slides", "--work", work, "--backend", "slurm"]
    assert "nothing to do" in pipeline(*tile, "--shard", "2/4")
    refused = pipeline(*tile, "--tile-px", 128, code=3)
    assert "tile.tile_px: 256 there, 128 now" in refused
    chain = [
        "run",
        demo_cohort / "slides",
        "--labels",
        demo_cohort / "labels.csv",
        "--work",
        work,
        "--backend",
        "slurm",
    ]
    wrong = pipeline(*chain, *params(train={"memory": "9000G"}), code=1)
    assert re.search("train: sbatch refuses: .*nothing was submitted", wrong, re.S)
    wait_for(lambda: "extract" not in said(cluster, "squeue", "-h", "-o", "%j"))
    assert len(list((work / "jobs").iterdir())) == 1, "none of these submitted anything"


def test_trainings_of_tasks_are_watched_by_the_epoch(cluster: dict[str, str], timed: object, tmp_path: Path) -> None:
    work = Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 8))
    text = pipeline("train", "--work", work.root, "--labels", labels, "--encoder", "texture", "--model", "abmil",
                    *sets("train.epochs=100000", "train.patience=0", "train.folds=2"), "--backend", "slurm",
                    *params(tasks=2), env=cluster)  # fmt: skip
    lines: list[str] = []
    watch = Watch(work, lines.append)

    def both() -> bool:
        stages, left = watch.look()
        if live := [one for stage in stages for one in stage.live.values() if one.done > 1]:
            watch.tell(stages, left)
        return len(live) == 2 and bool(left)

    wait_for(both)
    shown = (
        r"epoch \d+/100000, loss [\d.]+, val_loss [\d.]+, val_auc [\d.]+, best [\d.]+ \(epoch \d+\), .*at most .* left"
    )
    said_of = rf"train abmil 0/2, 0 failed, 2 running; fold_0: {shown}; fold_1: {shown}; about .* left"
    assert re.fullmatch(said_of, lines[-1]), lines[-1]
    histories = list(work.run("abmil").glob(".partial/*/*/history.csv"))
    assert len(histories) == 2
    assert all(h.read_text().count("\n") > 2 for h in histories), "a row per epoch"
    said(cluster, "scancel", re.findall(r"job (\d+)", text)[0])


def test_scancel_in_the_middle_and_the_same_command_again(
    cluster: dict[str, str], timed: object, demo_cohort: Path, slow: dict[str, bytes], tmp_path: Path
) -> None:
    job, folder = submit(cluster, demo_cohort, tmp_path, 2.0, tasks=2)
    wait_for(lambda: stores(tmp_path))
    said(cluster, "scancel", job)
    wait_for(lambda: over(cluster, job))
    made = len(stores(tmp_path))
    assert made < 9, "the cancellation came too late to test anything"
    assert not any(code.startswith("requeued") for _, code in ends_of(folder).get("tile", [])), "it wants to go"
    assert re.search(r"lost \(cancelled|not well", pipeline("status", "--work", tmp_path, env=cluster, code=None))
    job, _ = submit(cluster, demo_cohort, tmp_path, 0, tasks=2)
    wait_for(lambda: over(cluster, job))
    assert results(tmp_path) == slow
    assert not unfinished(tmp_path)


def test_a_killed_task_and_a_requeued_task_go_on(
    cluster: dict[str, str], demo_cohort: Path, slow: dict[str, bytes], tmp_path: Path
) -> None:
    job, folder = submit(cluster, demo_cohort, tmp_path, 0.7, tasks=2)

    def owners() -> set[int]:
        found = set()
        for claim in tmp_path.glob("tiles/.claims/*.json"):
            text = claim.read_text() if claim.exists() else ""
            found |= {json.loads(text)["pid"]} if text else set()
        return found

    def command(pid: int) -> tuple[int, int]:
        """(shard, process) of the command that a claim's owner, one of its children, works for."""
        line = Path(f"/proc/{pid}/cmdline").read_text().split("\0--shard\0")
        if len(line) > 1:
            return int(line[1][0]), pid
        return command(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]))

    def commands() -> dict[int, int]:
        found = {}
        for pid in owners():  # of items, and of the settings that both share
            with suppress(OSError):  # it has ended meanwhile
                found.update([command(pid)])
        return found

    wait_for(lambda: commands().keys() == {1, 2} and stores(tmp_path))
    of = commands()
    said(cluster, "scontrol", "requeue", f"{job}_2")
    os.kill(of[1], signal.SIGKILL)
    wait_for(lambda: over(cluster, job))
    assert (1, "requeued:137") in ends_of(folder)["tile"]
    assert sorted(t for t, code in ends_of(folder)["tile"] if code in "01") == [1, 2]
    assert results(tmp_path) == slow
    assert not unfinished(tmp_path)


def test_walltime_gives_back_what_is_under_way_and_goes_on(
    cluster: dict[str, str], timed: tuple[str, Path, Path], slow: dict[str, bytes]
) -> None:
    job, folder, work = timed
    assert f"job {job} tile: " in pipeline("status", "--work", work, env=cluster, code=None)
    wait_for(lambda: over(cluster, job), 200)
    codes = [code for _, code in ends_of(folder)["tile"]]
    assert codes[0] == "requeued:143"
    assert codes[-1] == "1", "the broken slides"
    assert "requeued" in pipeline("status", "--work", work, env=cluster, code=None)
    assert results(work) == slow
    assert not unfinished(work)
