"""One rule of what still runs, one voice to the allocator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mhim.configs import processes


def test_a_process_is_alive_until_it_has_ended() -> None:
    assert processes.alive(os.getpid())
    assert processes.alive(1)  # another's, perhaps: it may not be signalled, and runs
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert processes.alive(child.pid)
    child.communicate()
    assert not processes.alive(child.pid)


def test_an_ended_process_that_nobody_asked_for_is_not_alive() -> None:
    """In a container whose first process reaps none, a killed worker stays such a zombie for good."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not asked for
    os.kill(child.pid, 0)  # its number still stands
    assert not processes.alive(child.pid)
    child.wait()


def test_freed_blocks_stay_in_the_heap_once_told() -> None:
    """In a process of its own: a block of 64 MiB, freed and asked for again, is not faulted in a second time."""
    code = (
        "import ctypes, resource, sys\n"
        "from mhim.configs import allocator\n"
        "allocator.tell({allocator.MMAP_MAX: 0, allocator.TRIM_THRESHOLD: 1 << 30})\n"
        "c = ctypes.CDLL(None); c.malloc.restype = ctypes.c_void_p; c.free.argtypes = [ctypes.c_void_p]\n"
        "def once():\n"
        "    p = c.malloc(64 << 20); ctypes.memset(p, 1, 64 << 20); c.free(p)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "first = once(); print(once() - first)\n"
    )
    faults = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert faults < 1000  # of the 16,384 pages


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a node of 128, a job that was given 3 has 3."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 6, 7}, raising=False)
    for told, cores in (("", 3), ("0", 3), ("many", 3), ("2", 2)):
        monkeypatch.setenv("PYTHON_CPU_COUNT", told)
        assert processes.usable_cores() == cores
