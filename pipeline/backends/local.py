"""Items in processes of this machine. A process that dies costs the item it was on, and is replaced."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from mhim.configs.processes import usable_cores
from mhim.configs.schema import ClusterConfig, Settings
from mhim.pipeline.resume import console
from mhim.pipeline.resume.child import Child, Order
from mhim.pipeline.resume.runner import run_items
from mhim.pipeline.resume.stage import Item, Outcome, Stage, Stopped


class Params(Settings):
    """The local back end has no settings of its own."""


def run(stage: Stage, items: list[Item], replace: bool, remake: bool, cluster: ClusterConfig) -> Iterator[Outcome]:
    """One process, or `cluster.workers` of them (0: one per core) for stages whose items use one core each. It is this
    one only where the items parse nothing that comes from elsewhere: a damaged file may abort whoever reads it."""
    parts = stage.parts()
    if parts:
        yield from _pool([Order(part, replace, remake, cluster.lease_s) for part in parts], items, ahead=True)
        return
    workers = min(cluster.workers or usable_cores(), len(items))
    if stage.heavy:
        workers = min(1, workers)
    if workers <= 1 and not stage.untrusted:
        yield from run_items(stage, items, cluster.lease_s, replace, remake)
    elif workers:
        yield from _pool([Order(stage, replace, remake, cluster.lease_s)] * workers, items, ahead=workers == 1)


def _pool(orders: list[Order], items: list[Item], ahead: bool = False) -> Iterator[Outcome]:
    """One thread per child feeds it from one list and puts its outcomes, or what stops the stage, into one queue.

    ahead: the children are devices; each is told its next item while it makes one, to prefetch it, and leaves its items
    to the others if it is stopped (its GPU is gone): only the last one's end is the stage's."""
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    results: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
    stop = threading.Event()
    at_work = len(orders)
    lock = threading.Lock()

    def take() -> Item:
        """The next item; raises queue.Empty, after which this thread is no longer at work."""
        nonlocal at_work
        with lock:
            try:
                return todo.get_nowait()
            except queue.Empty:
                at_work -= 1
                raise

    def hand_over(items: list[Item | None]) -> bool:
        """Leave items to the threads still at work; False if this was the last."""
        nonlocal at_work
        with lock:
            at_work -= 1
            for item in items if at_work else []:
                if item is not None:
                    todo.put(item)
            return at_work > 0

    def feed(child: Child) -> None:
        item = following = None
        try:
            item = take()
            while not stop.is_set():
                following = _next(todo) if ahead else None
                results.put(child.make(item, following))
                item, following = following or take(), None
        except queue.Empty:
            child.close()
        except Exception as error:  # raised again in the caller's thread
            if ahead and isinstance(error, Stopped) and hand_over([item, following]):
                console.err.print(f"  [red]one process less[/]: {console.escape(str(error))}")
            else:
                results.put(error)

    team = [Child(order) for order in orders]
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


def _next(todo: queue.SimpleQueue[Item]) -> Item | None:
    try:
        return todo.get_nowait()
    except queue.Empty:
        return None
