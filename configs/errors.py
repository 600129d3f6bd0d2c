"""The base of every error that a person is told: one line that says which thing, what is wrong and what to do.

Each class of errors names its exit code; the command line prints the message and ends with it. Whatever is no
`UserError` (nor the disk's or the memory's) is a fault of the program, and shown with the place where it arose.
"""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend. The message is complete: it is printed alone.

    exit_code: 1 some work failed or was stopped, 2 wrong usage or input, 3 refused. heading: the line's first word.
    whole: the message counts whatever caused it; else a full disk below it is told instead."""

    exit_code: int = 2
    heading: str = "error"
    whole: bool = False
