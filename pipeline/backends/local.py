"""Items in processes of this machine. A process that dies costs the item it was on, and is replaced."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator

from configs.schema import ClusterConfig, Settings
from pipeline.backends._child import Child, Order
from pipeline.runner import run_items
from pipeline.stage import Item, Outcome, Stage


class Params(Settings):
    """The local back end has no settings of its own."""


def run(stage: Stage, items: list[Item], replace: bool, remake: bool, cluster: ClusterConfig) -> Iterator[Outcome]:
    """One process, or `cluster.workers` of them (0: one per core) for stages whose items use one core each."""
    workers = min(cluster.workers or os.cpu_count() or 1, len(items))
    if workers <= 1 or stage.heavy:
        yield from run_items(stage, items, cluster.lease_s, replace, remake)
    else:
        yield from _pool(Order(stage, replace, remake, cluster.lease_s), items, workers)


def _pool(order: Order, items: list[Item], workers: int) -> Iterator[Outcome]:
    """One thread per child feeds it from one list and puts its outcomes, or what stops the stage, into one queue."""
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    results: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
    stop = threading.Event()

    def feed(child: Child) -> None:
        try:
            while not stop.is_set():
                results.put(child.make(todo.get_nowait()))
        except queue.Empty:
            child.close()
        except Exception as error:  # raised again in the caller's thread
            results.put(error)

    team = [Child(order) for _ in range(workers)]
    threads = [threading.Thread(target=feed, args=(child,), daemon=True) for child in team]
    for thread in threads:
        thread.start()
    try:
        for _ in items:
            result = results.get()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        stop.set()
        for child in team:
            child.stop()
        for thread in threads:
            thread.join(10)
        for child in team:
            child.close()
