"""What a setting may be drawn from: an interval or a list. Pure values, so that a model's file can declare them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Span:
    """Numbers from `low` to `high`, evenly, or (log) evenly in their logarithm; three digits are kept."""

    low: float
    high: float
    log: bool = False

    def at(self, u: float) -> float:
        """The value at u in [0, 1)."""
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        return float(f"{value:.3g}")


@dataclass(frozen=True)
class Choice:
    """One of these values, each as likely."""

    values: tuple[Any, ...]

    def at(self, u: float) -> Any:
        """The value at u in [0, 1)."""
        return self.values[int(u * len(self.values))]


Range = Span | Choice
