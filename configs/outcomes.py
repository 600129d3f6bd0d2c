"""`train.task`: what it may say, and the kinds of columns that it names. Knows no other setting."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

KINDS = ("classification", "ordinal", "regression", "survival")


def kinds(task: str) -> dict[str, str]:
    """Column -> kind, where `task` names columns."""
    return dict(part.rsplit("=", 1) for part in task.split(",")) if "=" in task else {}


def _as_text(task: Any) -> Any:
    return ",".join(f"{k}={v}" for k, v in task.items()) if isinstance(task, dict) else task


def _known(task: str) -> str:
    if "=" not in task:
        if task not in ("auto", *KINDS, "multilabel"):
            raise ValueError(f"{task!r} is none of auto, {', '.join(KINDS)}, multilabel, and no column=kind")
        return task
    parts = [(name.strip(), kind.strip()) for name, _, kind in (part.rpartition("=") for part in task.split(","))]
    for name, kind in parts:
        if not name or kind not in KINDS:
            raise ValueError(f"{name}={kind}: write column=kind, where the kind is {', '.join(KINDS)}")
    if len({name for name, _ in parts}) < len(parts):
        raise ValueError("a column is named twice")
    return ",".join(f"{name}={kind}" for name, kind in parts)


# a word, or column=kind,column=kind; of a file also the mapping {column: kind}
TaskName = Annotated[str, BeforeValidator(_as_text), AfterValidator(_known)]
