"""Kill it in any way, at any moment, alone or in company: the same command again ends in the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mhim.pipeline.store import reading
from tests.pipeline.toys import Toy, run, start, tree


def end(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=120)[1]


def wait_for(condition: object, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.02)


def undisturbed(tmp_path: Path, n: int) -> dict[str, bytes]:
    run(Toy(tmp_path / "fresh", n=n))
    return tree(tmp_path / "fresh")


@pytest.mark.parametrize("workers", [1, 2])
def test_sigkill_at_random_moments(tmp_path: Path, workers: int) -> None:
    rng = random.Random(f"{os.environ.get('KILL_SEED', '1')}/{workers}")
    stage = Toy(tmp_path / "t", n=10, seconds=0.1, steps=2)
    killed = 0
    for _ in range(40):
        process = start(stage, workers)
        wait_for(lambda: (stage.root / ".claims").exists() or process.poll() is not None)  # noqa: B023
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            # the leader alone, or all at once: its workers must not outlive it for long either way
            (os.kill if rng.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
            killed += 1
        end(process)
        if process.returncode == 0:
            break
    assert run(stage, workers=workers).exit_code == 0
    assert killed >= 2, "the kills came too late to test anything"
    assert tree(stage.root) == undisturbed(tmp_path, 10)


def test_four_commands_share_a_folder_and_are_killed_at_random(tmp_path: Path) -> None:
    rng = random.Random(os.environ.get("KILL_SEED", "1"))
    calls = tmp_path / "calls"
    stage = Toy(tmp_path / "t", n=50, seconds=0.15, calls=calls)
    team = [start(stage) for _ in range(4)]
    kills = 0
    wait_for(lambda: calls.exists() and len(list(calls.iterdir())) >= 4)
    while kills < 8:
        time.sleep(rng.uniform(0.05, 0.3))
        i = rng.randrange(4)
        if team[i].poll() is not None:
            break
        os.killpg(team[i].pid, signal.SIGKILL)
        kills += 1
        end(team[i])
        team[i] = start(stage)
    for process in team:
        text = end(process)
        assert process.returncode == 0, text
    assert kills >= 3, "the kills came too late to test anything"
    assert tree(stage.root) == undisturbed(tmp_path, 50)
    made = Counter(p.name.split("-")[0] for p in calls.iterdir())
    assert len(made) == 50
    assert sum(made.values()) <= 50 + kills, "work was done twice without a kill"


def test_four_undisturbed_commands_do_nothing_twice(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=50, seconds=0.02, calls=tmp_path / "calls")
    team = [start(stage) for _ in range(4)]
    for process in team:
        text = end(process)
        assert process.returncode == 0, text
    assert len(list((tmp_path / "calls").iterdir())) == 50
    assert tree(stage.root) == undisturbed(tmp_path, 50)


def test_a_command_waits_for_what_another_is_making(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=1, seconds=1.5)
    other = start(stage)
    wait_for(lambda: list(stage.root.glob(".claims/*.json")))
    report = run(stage)
    end(other)
    assert other.returncode == 0
    assert [str(o.state) for o in report.outcomes] == ["skipped"]
    assert tree(stage.root) == undisturbed(tmp_path, 1)


def test_a_command_takes_over_what_another_leaves(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=1, seconds=30.0)
    other = start(stage)
    wait_for(lambda: list(stage.root.glob(".claims/*.json")))
    os.killpg(other.pid, signal.SIGKILL)
    end(other)
    began = time.monotonic()
    assert run(Toy(tmp_path / "t", n=1)).exit_code == 0
    assert time.monotonic() - began < 20, "the claim of a dead process was waited for"
    assert tree(stage.root) == undisturbed(tmp_path, 1)


def test_a_command_that_slept_past_its_lease_harms_nobody(tmp_path: Path) -> None:
    """A suspended laptop, a paused container: its item is taken over, and its own late copy is dropped."""
    stage = Toy(tmp_path / "t", n=3, seconds=1.0, calls=tmp_path / "calls")
    sleeper = start(stage, lease_s=0.6)
    wait_for(lambda: list((tmp_path / "calls").glob("*")))
    os.killpg(sleeper.pid, signal.SIGSTOP)
    try:
        assert run(stage, lease_s=0.6).exit_code == 0
    finally:
        os.killpg(sleeper.pid, signal.SIGCONT)
    text = end(sleeper)
    assert sleeper.returncode == 0, text
    assert tree(stage.root) == undisturbed(tmp_path, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("workers", [1, 2])
def test_polite_signals_give_everything_back_at_once(tmp_path: Path, number: signal.Signals, workers: int) -> None:
    stage = Toy(tmp_path / "t", n=6, seconds=0.5)
    process = start(stage, workers)
    wait_for(lambda: (stage.root / "item_000").exists() and list(stage.root.glob(".tmp/*")))
    os.kill(process.pid, number)
    text = end(process)
    assert process.returncode == (143 if number != signal.SIGINT else -signal.SIGINT), text
    left = [p for p in tree(stage.root) if p.startswith((".tmp", ".claims"))]
    assert left == [], "private things of an interrupted command"
    assert 1 <= len(list(stage.root.glob("item_*"))) < 6
    assert run(stage, workers=workers).exit_code == 0
    assert tree(stage.root) == undisturbed(tmp_path, 6)


def test_workers_end_with_the_command_that_was_killed(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=2, seconds=60.0, calls=tmp_path / "calls")
    process = start(stage, workers=2)
    wait_for(lambda: stage.calls is not None and stage.calls.exists() and len(list(stage.calls.iterdir())) == 2)
    workers = [int(p.name.split("-")[1]) for p in (tmp_path / "calls").iterdir()]
    os.kill(process.pid, signal.SIGKILL)
    end(process)

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here")
    wait_for(lambda: not any(alive(pid) for pid in workers), 15)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_that_comes_while_a_destructor_runs_is_not_lost(number: signal.Signals, code: int) -> None:
    """Python drops what is raised there: the command would go on, and a walltime would end it hard."""
    program = (
        "import os, signal, time\n"
        "from mhim.pipeline.resume.runner import leaving\n"
        "class Closed:\n"
        "    def __del__(self):\n"
        f"        os.kill(os.getpid(), {int(number)}); time.sleep(0.1)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with leaving():\n"
        "    Closed()\n"
        "    time.sleep(20)\n"
    )
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert time.monotonic() - began < 15
    assert "Exception ignored" not in ended.stderr


@pytest.mark.parametrize("more", [0, 1])
def test_checkpoints_of_what_is_done_are_swept(tmp_path: Path, more: int) -> None:
    """Killed after the commit and before its checkpoints were removed. more: items that are still to be made."""
    stage = Toy(tmp_path / "t", n=2)
    assert run(stage).exit_code == 0
    sealed = reading.read_attrs(stage.root / "item_000")["fingerprint"]
    spent = stage.root / ".partial" / "item_000" / sealed
    going_on = stage.root / ".partial" / "item_001" / "0123456789abcdef"  # of other settings: somebody may go on there
    for folder in (spent, going_on):
        folder.mkdir(parents=True)
        (folder / "0").write_bytes(b"done")
    again = Toy(tmp_path / "t", n=2 + more)
    assert run(again).exit_code == 0
    assert not spent.parent.exists()
    assert (going_on / "0").exists()
