"""Items on a dask.distributed cluster, one that runs already or one started here. A worker that dies costs no item.

In: a stage and its items. Out: their outcomes as they come. What travels is the stage once, then small items and their
outcomes; arrays stay in files. A worker makes items in a child process, so that work which holds Python's lock for
minutes never keeps the worker from answering its scheduler. Workers must see the work folder under the same path.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from mhim.configs import lookup
from mhim.configs.processes import usable_cores
from mhim.configs.schema import ClusterConfig, Settings
from mhim.pipeline.resume import console
from mhim.pipeline.resume.child import Child, Order
from mhim.pipeline.resume.stage import Item, Outcome, Stage, State, Stopped


class Params(Settings):
    """What `cluster.backend_params` may hold."""

    scheduler: str | None = Field(None, description="tcp://host:port of a running cluster; none: start one here")
    retries: int = Field(3, ge=0, description="how often an item is tried again after its worker or process died")
    resources: dict[str, dict[str, float]] = Field(
        {}, description="per stage, what an item needs of its worker: {extract: {GPU: 1}}"
    )
    worker_resources: dict[str, float] = Field({}, description="what each worker of a cluster started here offers")
    in_flight: int = Field(1000, ge=1, description="most items given to the scheduler at once")
    timeout_s: float = Field(30.0, gt=0, description="longest wait for the scheduler, and for a first worker, s")
    dashboard: str = Field("127.0.0.1:8787", description="where a cluster started here shows its dashboard")


def run(stage: Stage, items: list[Item], replace: bool, remake: bool, cluster: ClusterConfig) -> Iterator[Outcome]:
    """Make `items` on the workers, in order of priority; raises Stopped when no worker can go on."""
    from distributed import as_completed

    params: Params = lookup.params(sys.modules[__name__], cluster.backend_params)
    client = _client(params, cluster.workers)
    ours = params.scheduler is None
    run_id = uuid.uuid4().hex
    order = Order(stage, replace, remake, cluster.lease_s, os.getcwd())
    # a task of its own and not scattered data: if the worker that holds it dies, the scheduler makes it again
    shared = client.submit(_same, order, key=f"order-{run_id}")
    # items that use a whole machine come one after the other where all workers are on this one
    most = 1 if stage.heavy and ours else params.in_flight
    queue = iter(enumerate(items))
    of: dict[str, Item] = {}

    def submit() -> Any:
        n, item = next(queue, (0, None))
        if item is None:
            return None
        key = f"{stage.name}-{run_id}-{n}"
        of[key] = item
        needs = params.resources.get(stage.name) or None
        return client.submit(_make, shared, item, run_id, key=key, priority=-n, retries=params.retries, resources=needs)

    first = [f for f in (submit() for _ in range(min(most, len(items)))) if f is not None]
    done = as_completed(first, loop=client.loop)
    try:
        for future in done:
            yield _outcome(future, of.pop(future.key))
            future.release()
            another = submit()
            if another is not None:
                done.add(another)
    finally:
        waiting = list(done.futures)
        if waiting:
            client.cancel(waiting, force=True)
        shared.release()
        # tasks under way are given back at once; where this fails, the child is idle soon and ends by itself
        client.run(_end, run_id, on_error="ignore", nanny=False)


def _outcome(future: Any, item: Item) -> Outcome:
    """What became of a task: its outcome, a reason to stop, or the death of all that tried."""
    from distributed import KilledWorker

    if future.status == "finished":
        answer = future.result()
        if isinstance(answer, str):
            raise Stopped(answer)
        outcome: Outcome = answer
        return outcome
    error = future.exception() if future.status == "error" else None
    if isinstance(error, Died):
        return Outcome(item.key, State.FAILED, message=str(error))
    if isinstance(error, KilledWorker):
        return Outcome(
            item.key, State.FAILED, message=f"{error.allowed_failures + 1} workers died over it; probably out of memory"
        )
    raise Stopped(f"the Dask cluster gave up ({future.status}: {error}); the same command goes on from here")


class Died(Exception):
    """The process that made an item died; raised to have Dask try again elsewhere."""


# ------------------------------------------------------------------------------------- the cluster, once per process

_clients: dict[tuple[str, int], Any] = {}


def _client(params: Params, workers: int) -> Any:
    """The client of this process for these settings; the verbs of one command share one cluster. Raises Stopped."""
    import dask
    from distributed import Client, LocalCluster

    name = (params.model_dump_json(), workers)
    if name in _clients and _clients[name].status == "running":
        return _clients[name]
    try:
        if params.scheduler is not None:
            client = Client(params.scheduler, timeout=params.timeout_s, set_as_default=False)
            client.wait_for_workers(1, timeout=params.timeout_s)
        else:
            # the folder it is started in must not stand before the program in its workers
            safe = {"distributed.nanny.pre-spawn-environ.PYTHONSAFEPATH": "1"}
            dask.config.set({"distributed.scheduler.allowed-failures": params.retries, **safe})
            with _own_environment():
                here = LocalCluster(
                    n_workers=workers or usable_cores(),
                    threads_per_worker=1,
                    memory_limit=0,  # the work is done in children, whose memory a worker does not see
                    dashboard_address=params.dashboard,
                    resources=params.worker_resources or None,
                )
            client = Client(here, timeout=params.timeout_s, set_as_default=False)
    except OSError as error:  # also a time-out
        where = params.scheduler or "this machine"
        raise Stopped(
            f"no Dask cluster at {where} ({error}); start one (`dask scheduler`, then `dask worker {where}` on each "
            "machine), or leave --scheduler away to have one started here"
        ) from error
    _clients[name] = client
    console.err.print(f"dask: {client.scheduler_info(n_workers=0)['address']}, dashboard {client.dashboard_link}")
    return client


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """The environment of this process stays its own: Dask gives its workers theirs by changing their starter's, and
    leaves it changed (the next command started from here would find no module of its folder)."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@atexit.register
def close() -> None:
    """Leave every cluster, and end those started here."""
    while _clients:
        client = _clients.popitem()[1]
        cluster = client.cluster
        client.close(timeout=5)
        if cluster is not None:
            cluster.close(timeout=10)


# ---------------------------------------------------------------------------------------------- on a worker


def _same(order: Order) -> Order:
    return order


class _Children:
    """The children of one run on this worker: as many as its threads work at once. Idle ones end after a while, so
    that a client that vanished leaves no process behind."""

    IDLE_S = 60.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Child]] = []
        self._busy: set[Child] = set()
        self._ended = False
        self._watched = False

    def make(self, order: Order, item: Item) -> Outcome | str:
        with self._lock:
            if self._ended:
                return "this run has ended"
            child = self._idle.pop()[1] if self._idle else Child(order)
            self._busy.add(child)
        try:
            outcome = child.make(item)
            if not child.alive:
                raise Died(outcome.message)
            return outcome
        except Stopped as error:
            return str(error)
        except FileNotFoundError:
            return (
                f"the Dask worker on {socket.gethostname()} does not see {order.folder}; all workers need the work "
                "folder, the slides and the program under the same paths"
            )
        finally:
            with self._lock:
                self._busy.discard(child)
                self._idle.append((time.monotonic(), child))
                self._watch()

    def _watch(self) -> None:
        """Look for idle children in a while, unless somebody does."""
        if not self._watched:
            self._watched = True
            timer = threading.Timer(self.IDLE_S, self._reap)
            timer.daemon = True
            timer.start()

    def _reap(self) -> None:
        with self._lock:
            self._watched = False
            old = [child for since, child in self._idle if time.monotonic() - since >= self.IDLE_S]
            self._idle = [(since, child) for since, child in self._idle if child not in old]
            if self._idle:
                self._watch()
        for child in old:
            child.close()

    def end(self) -> None:
        """Stop what is under way and let the idle ones leave."""
        with self._lock:
            self._ended = True
            idle, busy = [child for _, child in self._idle], list(self._busy)
            self._idle = []
        for child in busy:
            child.stop()
        for child in idle:
            child.close()


_runs: dict[str, _Children] = {}
_runs_lock = threading.Lock()


def _make(order: Order, item: Item, run_id: str) -> Outcome | str:
    """One task: an outcome, or the reason to stop. Raises Died to be tried again."""
    with _runs_lock:
        children = _runs.setdefault(run_id, _Children())
    return children.make(order, item)


def _end(run_id: str) -> None:
    with _runs_lock:
        children = _runs.pop(run_id, None)
    if children is not None:
        # waiting for processes must not hold up the worker's event loop, in which this runs
        threading.Thread(target=children.end, daemon=True).start()
