"""What was used lately, within a limit: the one cache of that kind.

In: values by key, and how large each is. Out: the value, or nothing. Safe to use from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def _one(value: object) -> int:
    return 1


class Recent(Generic[K, V]):
    """At most `limit` of what `size` says of each value (else: that many values); what was used longest ago goes first.
    The latest always stays, however large it is."""

    def __init__(self, limit: int, size: Callable[[V], int] = _one) -> None:
        self._limit = limit
        self._size = size
        self._held: OrderedDict[K, V] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def get(self, key: K) -> V | None:
        """The value, which is then the latest; None if it is not held."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key]

    def put(self, key: K, value: V) -> None:
        """Hold `value` as the latest. What falls out is closed with its last reference."""
        with self._lock:
            if key in self._held:
                self._total -= self._size(self._held.pop(key))
            self._held[key] = value
            self._total += self._size(value)
            while self._total > self._limit and len(self._held) > 1:
                self._total -= self._size(self._held.popitem(last=False)[1])

    def clear(self) -> None:
        """Hold nothing any more."""
        with self._lock:
            self._held.clear()
            self._total = 0

    def made(self, key: K, make: Callable[[], V]) -> V:
        """The value, made now if it is not held. Two threads that want the same at once may both make it."""
        found = self.get(key)
        if found is not None:
            return found
        value = make()
        self.put(key, value)
        return value
