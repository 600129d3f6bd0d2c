"""The flags that say how a table of slides is read, written once for every command that takes one.

In: a command. Out: the same command with these flags; it gets them as settings of the section `labels`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

_COLUMN = "column of the table that holds"
FLAGS: dict[str, Any] = {
    "slide_column": Annotated[str | None, typer.Option(help=f"{_COLUMN} the slide (default: slide ...)")],
    "patient_column": Annotated[str | None, typer.Option(help=f"{_COLUMN} the patient (default: patient ...)")],
    "label_column": Annotated[str | None, typer.Option(help=f"{_COLUMN} the class (default: label)")],
    "time_column": Annotated[str | None, typer.Option(help=f"{_COLUMN} the survival time (default: time)")],
    "event_column": Annotated[str | None, typer.Option(help=f"{_COLUMN} the event (default: event)")],
    "encoding": Annotated[str | None, typer.Option(help="encoding of the table, such as latin-1 (default: sniffed)")],
    "tcga_patients": Annotated[
        bool | None,
        typer.Option("--tcga-patients/--no-tcga-patients", help="patients by TCGA barcodes where no column tells them"),
    ],
}


def table_flags(command: Callable[..., int]) -> Callable[..., int]:
    """`command` with the flags of a table. It gets them as its keyword `table`: settings by the name that
    `mhim.pipeline.cli.main.session` takes (labels__slide_column ...), None where a flag is not given."""
    hints = get_type_hints(command, include_extras=True)
    hints.pop("table")
    signature = inspect.signature(command)
    own = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values() if p.name != "table"]
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a) for n, a in FLAGS.items()]

    @functools.wraps(command)
    def flagged(**given: Any) -> int:
        table = {f"labels__{name}": given.pop(name) for name in FLAGS}
        return command(**given, table=table)

    flagged.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    flagged.__annotations__ = {**hints, **FLAGS}
    return flagged
