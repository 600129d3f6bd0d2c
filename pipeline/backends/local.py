"""Items in processes of this machine. A process that dies costs the item it was on, and is replaced."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from configs.schema import ClusterConfig, Settings
from pipeline.claims import Claims
from pipeline.stage import Item, Outcome, Stage, State, Stopped, make_one, run_items


class Params(Settings):
    """The local back end has no settings of its own."""


def run(stage: Stage, items: list[Item], replace: bool, remake: bool, cluster: ClusterConfig) -> Iterator[Outcome]:
    """One process, or `cluster.workers` of them (0: one per core) for stages whose items use one core each."""
    workers = min(cluster.workers or os.cpu_count() or 1, len(items))
    if workers <= 1 or stage.heavy:
        yield from run_items(stage, items, cluster.lease_s, replace, remake)
    else:
        yield from _pool(stage, items, workers, replace, remake, cluster.lease_s)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    item: Item | None = None


def _pool(
    stage: Stage, items: list[Item], workers: int, replace: bool, remake: bool, lease_s: float
) -> Iterator[Outcome]:
    context = mp.get_context("spawn")  # forking a process that has threads (progress bar, torch) can deadlock
    queue = iter(items)
    team: list[_Worker] = []

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(stage, theirs, replace, remake, lease_s), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def give(worker: _Worker) -> bool:
        """Hand the next item to a worker; False when there is none left."""
        worker.item = next(queue, None)
        if worker.item is not None:
            worker.pipe.send(worker.item)
        return worker.item is not None

    try:
        for _ in range(workers):
            worker = start()
            team.append(worker)
            give(worker)
        busy = [w for w in team if w.item is not None]
        while busy:
            for ready in wait([w.pipe for w in busy]):
                worker = next(w for w in busy if w.pipe is ready)
                assert worker.item is not None
                try:
                    answer: Any = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    yield _died(worker)
                    busy.remove(worker)
                    replacement = start()
                    team.append(replacement)
                    if give(replacement):
                        busy.append(replacement)
                    continue
                if isinstance(answer, str):
                    raise Stopped(answer)
                yield answer
                if not give(worker):
                    busy.remove(worker)
    finally:
        for worker in team:
            worker.pipe.close()  # an idle worker ends when its pipe closes
            if worker.item is not None:
                worker.process.terminate()
        for worker in team:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()


def _died(worker: _Worker) -> Outcome:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    hint = "; probably out of memory, use fewer --workers" if code == -signal.SIGKILL else ""
    assert worker.item is not None
    return Outcome(worker.item.key, State.FAILED, message=f"the process working on it died ({how}{hint})")


def _serve(stage: Stage, pipe: Connection, replace: bool, remake: bool, lease_s: float) -> None:
    """A worker process: items in, outcomes out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends us by SIGTERM
    signal.signal(signal.SIGTERM, _leave)
    with Claims(stage.root / ".claims", lease_s) as claims:
        try:
            while True:
                try:
                    item = pipe.recv()
                except EOFError:
                    return
                try:
                    pipe.send(make_one(stage, item, claims, replace, remake))
                except Stopped as error:
                    pipe.send(str(error))
                    return
                except BrokenPipeError:
                    return  # the parent is gone
        finally:
            stage.close()


def _leave(signum: int, frame: object) -> None:
    raise SystemExit(143)
