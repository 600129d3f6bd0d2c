"""A process of its own that makes items, one at a time, for as long as its owner lives.

In: a stage, then items. Out: their outcomes. Used by every back end that wants more than one process, or that must not
be held up by the work itself (a thread that holds Python's lock makes a cluster's worker look dead). Started as a fresh
interpreter that speaks over its standard input and output: forking a process that has threads can deadlock, and the
processes of a cluster's worker may not use multiprocessing. When its input ends, its owner is gone, and it leaves.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from mhim.configs import trust
from mhim.pipeline.resume.runner import leaving, make_one, open_claims
from mhim.pipeline.resume.stage import Item, Outcome, Stage, State, Stopped

_READY = "ready"


@dataclass(frozen=True)
class Order:
    """What a child is started for: the items of a stage, or answers by `call`, a function of a module. folder: where it
    works, so that relative paths mean what they mean to its owner. trusted: which code beside the program it may
    import, as its owner may."""

    stage: Stage | None
    replace: bool = False
    remake: bool = False
    lease_s: float = 0.0
    folder: str | None = None
    trusted: trust.Trust = field(default_factory=trust.current)
    call: Callable[[Any], Any] | None = None


class Died(Exception):
    """The process died over what it was asked; the message says how."""


class Child:
    """The owner's side. `make` blocks without holding Python's lock; a dead process is replaced at the next item."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._process: subprocess.Popen[bytes] | None = None
        self._gone = False

    @property
    def alive(self) -> bool:
        """Whether there is a process: not before the first item, and not after it died over one."""
        return self._process is not None

    def make(self, item: Item, ahead: Item | None = None) -> Outcome:
        """Have `item` made, and `ahead`, which comes next, prefetched. A process that dies costs this item only, and
        only if it also dies over it alone: it may have died over the other one. Raises Stopped."""
        try:
            answer = self._exchange((item, ahead))
        except Died as error:
            if ahead is not None and not self._gone:
                return self.make(item)
            advice = "if it does so again, its file is damaged: copy it anew from its source, or leave it out"
            return Outcome(item.key, State.FAILED, message=f"the process working on it {error}; {advice}")
        if isinstance(answer, str):
            self._end()
            raise Stopped(answer)
        outcome: Outcome = answer
        return outcome

    def ask(self, question: Any) -> Any:
        """What the order's `call` says of `question`. Raises Died if the process does, Stopped if none can be had."""
        return self._exchange((question, None))

    def _exchange(self, message: tuple[Any, Any]) -> Any:
        for _ in range(2):
            process = self._process or self._start()
            assert process.stdin is not None
            try:
                _send(process.stdin, message)
                break
            except (BrokenPipeError, OSError):
                self._end()  # it died while idle: not this item's fault
        else:
            raise Stopped("worker processes die before they are given work; is there enough memory?")
        assert process.stdout is not None
        try:
            return pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise Died(f"died ({self._how()})") from None

    def stop(self) -> None:
        """Stop at once, from any thread: an item under way is given back, nothing of it is kept but its checkpoints."""
        self._gone = True
        if self._process is not None:
            self._process.terminate()

    def close(self) -> None:
        """Let it end, then wait; after 10 s it is killed."""
        self._gone = True
        self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._gone:
            raise Stopped("the worker processes were told to end")
        # Ctrl-C is the owner's, also while this one imports
        code = (
            f"import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {sys.path!r}; "
            "from mhim.pipeline.resume.child import main; main()"
        )
        process = subprocess.Popen(  # -P: the working folder must not stand before the program
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self._order.folder
        )
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, self._order)
            ready = pickle.load(process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            ready = f"a worker process does not start ({self._how()}); what it said stands above"
        if ready != _READY:
            self._end()
            raise Stopped(str(ready))
        return process

    def _how(self) -> str:
        assert self._process is not None
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                _close(pipe)
        code = process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return how + ("; probably out of memory, use fewer --workers" if code == -9 else "")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                _close(pipe)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        return  # unsent bytes for a process that is gone


def _send(pipe: Any, thing: Any) -> None:
    pickle.dump(thing, pipe)
    pipe.flush()


def main() -> None:
    """The child: an order, then items in, outcomes out, until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    inbox: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
    # not sys.stdin: its lock, held by the listening thread, would abort the interpreter when it ends
    source = os.fdopen(os.dup(0), "rb")
    with leaving():
        order: Order = pickle.load(source)
        trust.adopt(order.trusted)
        _send(answers, _READY)
        threading.Thread(target=_listen, args=(source, inbox), daemon=True).start()
        try:
            _serve(order, inbox, answers)
        except BrokenPipeError:
            sys.exit(143)  # the owner is gone


def _listen(source: BinaryIO, inbox: queue.SimpleQueue[tuple[Any, Any] | None]) -> None:
    while True:
        try:
            inbox.put(pickle.load(source))
        except EOFError:
            inbox.put(None)  # idle: `_serve` ends
            if _busy.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
            return


_busy = threading.Event()


def _serve(order: Order, inbox: queue.SimpleQueue[tuple[Any, Any] | None], answers: BinaryIO) -> None:
    if order.call is not None:
        while (asked := inbox.get()) is not None:
            _busy.set()
            answer = order.call(asked[0])
            _busy.clear()
            _send(answers, answer)
        return
    stage = order.stage
    assert stage is not None
    try:
        with open_claims(stage, order.lease_s) as claims:
            try:
                while (work := inbox.get()) is not None:
                    _busy.set()
                    item, ahead = work
                    if ahead is not None:
                        stage.prefetch(ahead)
                    outcome = make_one(stage, item, claims, order.replace, order.remake)
                    _busy.clear()
                    _send(answers, outcome)
            finally:
                stage.close()
    except Stopped as error:
        _send(answers, str(error))
