"""Leases: one holder at a time, dead and stale ones taken over, none lost to clocks that disagree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from mhim.pipeline.resume import claims as module
from mhim.pipeline.resume.claims import Claims, owner_alive, running_keys
from mhim.pipeline.store.layout import machine, owner


def write_claim(folder: Path, key: str, **fields: object) -> Path:
    """A claim as another process would have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Claims(folder, 60.0)._path(key)
    content = {"host": "elsewhere", "pid": 1, "start": None, "lease_s": 60.0, "key": key, "mark": "x", **fields}
    path.write_text(json.dumps(content))
    return path


def test_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path, 60.0) as a, Claims(tmp_path, 60.0) as b:
        assert a.take("x") is None
        assert b.take("x") == f"{machine()}:{os.getpid()}"
        assert b.take("y") is None
        assert running_keys(tmp_path) == {"x", "y"}
        a.release("x")
        assert b.take("x") is None
    assert list(tmp_path.iterdir()) == [], "claims and clocks are gone at the end"


def test_of_many_threads_exactly_one_wins(tmp_path: Path) -> None:
    won: Counter[int] = Counter()
    gate = threading.Barrier(8)
    with Claims(tmp_path, 60.0) as claims:

        def contest(n: int) -> None:
            mine = Claims(tmp_path, 60.0)
            gate.wait()
            for k in range(50):
                if mine.take(f"key {k}") is None:
                    won[k] += 1

        threads = [threading.Thread(target=contest, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(won[k] == 1 for k in range(50)), won
        assert claims.holder("key 0") is not None


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path) -> None:
    code = f"import os; from pathlib import Path; from mhim.pipeline.resume.claims import Claims\n" \
           f"c = Claims(Path({str(tmp_path)!r}), 600.0).__enter__(); c.take('x'); os._exit(9)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with Claims(tmp_path, 600.0) as claims:
        assert running_keys(tmp_path) == set()
        assert claims.take("x") is None


def test_a_process_number_that_was_given_out_again_holds_nothing(tmp_path: Path) -> None:
    write_claim(tmp_path, "x", host=machine(), pid=os.getpid(), start=1)  # started at boot: certainly not this one
    with Claims(tmp_path, 600.0) as claims:
        assert claims.take("x") is None


def test_another_machines_claim_lasts_as_long_as_its_heartbeat(tmp_path: Path) -> None:
    path = write_claim(tmp_path, "x", lease_s=100.0)
    with Claims(tmp_path, 1.0) as claims:  # the owner's lease counts, not the looker's
        os.utime(path, (time.time() - 50, time.time() - 50))
        assert claims.take("x") == "elsewhere:1"
        os.utime(path, (time.time() - 101, time.time() - 101))
        assert claims.take("x") is None


@pytest.mark.parametrize("skew_s", [-86400.0, 86400.0])
def test_skewed_clocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float) -> None:
    """Only times of the file system are compared, so this machine's own clock may say anything."""
    real = time.time
    monkeypatch.setattr(module.time, "time", lambda: real() + skew_s)
    fresh, stale = write_claim(tmp_path, "fresh"), write_claim(tmp_path, "stale")
    os.utime(stale, (real() - 120, real() - 120))
    with Claims(tmp_path, 60.0) as claims:
        assert claims.take("fresh") == "elsewhere:1"
        assert claims.take("stale") is None
    assert fresh.exists()


def test_the_heart_beats(tmp_path: Path) -> None:
    with Claims(tmp_path, 0.5) as a, Claims(tmp_path, 0.5) as b:
        assert a.take("x") is None
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert b.take("x") is not None
            time.sleep(0.05)


def test_a_torn_claim_blocks_for_seconds_and_not_for_the_lease(tmp_path: Path) -> None:
    path = write_claim(tmp_path, "x")
    path.write_text('{"host": "elsewh')
    with Claims(tmp_path, 600.0) as claims:
        assert claims.take("x") == "an unknown process"  # it may be being written right now
        os.utime(path, (time.time() - 11, time.time() - 11))
        assert claims.take("x") is None


def test_who_overslept_keeps_its_hands_off_the_new_owners_claim(tmp_path: Path) -> None:
    with Claims(tmp_path, 60.0) as sleeper:
        assert sleeper.take("x") is None
        write_claim(tmp_path, "x")  # taken over meanwhile
        sleeper.release("x")
        with Claims(tmp_path, 60.0) as third:
            assert third.take("x") == "elsewhere:1"
            third.sweep()
            assert third.take("x") == "elsewhere:1"


def test_a_folder_tidied_away_by_another_command_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / ".claims"
    with Claims(folder, 60.0) as claims:
        folder.rmdir()
        assert claims.take("x") is None


def test_a_claim_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with Claims(tmp_path, 60.0) as claims:
        monkeypatch.setattr(module.os, "fdopen", full)
        with pytest.raises(OSError, match="No space"):
            claims.take("x")
        monkeypatch.undo()
        assert not list(tmp_path.glob("*.json"))
        assert claims.take("x") is None


def test_the_sweep_removes_the_dead_and_spares_the_living(tmp_path: Path) -> None:
    dead = write_claim(tmp_path, "dead", host=machine(), pid=2**22 + 1)
    (tmp_path / f".clock-{machine()}-{2**22 + 1}-abc").touch()
    (tmp_path / ".clock-elsewhere-1-abc").touch()
    alive = write_claim(tmp_path, "alive")
    with Claims(tmp_path, 60.0) as mine:
        mine.take("mine")
        mine.sweep()
        assert not dead.exists()
        assert alive.exists()
        assert mine.holder("mine") is not None
        assert len(list(tmp_path.glob(".clock-*"))) == 2  # another machine's, and its own


def test_owners_are_told_alive_dead_or_unknown() -> None:
    assert owner_alive(owner()) is True
    assert owner_alive(f"{machine()}-{2**22 + 1}") is False
    assert owner_alive("elsewhere-1") is None
