"""Cohorts, resumption, machines: the room that knows all others and that nobody imports.

`from mhim.pipeline import Work` is the library; `mhim.pipeline.api` says what of it is stable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhim.pipeline.api.work import Work as Work

__all__ = ["Work"]


def __getattr__(name: str) -> Any:
    """Load the library when it is asked for: the command line, which imports this package too, starts without it."""
    if name == "Work":
        from mhim.pipeline.api.work import Work

        return Work
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
