"""The outcomes with one target each, by the name of their kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhim.mil.tasks.base import Task
from mhim.mil.tasks.classification import Classification
from mhim.mil.tasks.ordinal import Ordinal
from mhim.mil.tasks.regression import Regression
from mhim.mil.tasks.survival import Cox, Nll

KINDS = {kind.kind: kind for kind in (Classification, Nll, Cox, Ordinal, Regression)}


def from_json(value: Mapping[str, Any]) -> Task:
    """The task that `Task.to_json` of one of them described."""
    return KINDS[value["kind"]].from_json(value)
