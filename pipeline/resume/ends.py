"""How a command ends: its errors in one line, its exit code, and streams that nobody reads or that know few letters.

0 done, 1 some items failed or nothing more can be written, 2 wrong usage, 3 refused, 130 interrupted.
"""

from __future__ import annotations

import codecs
import locale
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_FAULT = "error: a fault of the program, not of your input; please report it with the lines above"


class Patient:
    """A stream whose reader may go away (`pipeline tile slides | head`): what is written then is dropped, and the work
    goes on to its end, so that the exit code stays true. Everything else is the stream's own."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """What is still to come goes nowhere; a full disk, unlike a reader that is gone, is an error of the command."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with suppress(OSError):
            self._stream.flush()
        if not isinstance(error, BrokenPipeError):
            error.filename = self._name
            raise error


def prepare(args: list[str] | None) -> None:
    """Make standard output and error fit for any text and any reader. Files are UTF-8 whatever the language settings:
    where they are not, this process starts again in Python's UTF-8 mode. args: None for the process's own."""
    foreign = codecs.lookup(locale.getencoding()).name != "utf-8"
    if args is None and foreign and not sys.flags.utf8_mode and "PYTHONUTF8" not in os.environ:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for name, called in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, Patient):
            continue
        # a name that is not UTF-8, or µ where the terminal knows ASCII only, is shown by its number
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Patient(stream, called))


def last_words(code: int) -> int:
    """Flush what was printed; the exit code, which is 1 where it could not be written (`> /dev/full`)."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return code or explain(error)
    return code


def interrupted() -> int:
    """Say it, and the exit code of Ctrl-C."""
    print("\ninterrupted: everything finished so far is kept; the same command goes on from there", file=sys.stderr)
    return 130


def explain(error: Exception) -> int:
    """The user's errors in one line; anything else is a fault of the program and shows where. The exit code."""
    from mhim.configs.errors import UserError
    from mhim.pipeline.store import disk

    full = disk.trouble(error)
    if full is not None and not (isinstance(error, UserError) and error.whole):
        print(f"error: {disk.told('', full)}", file=sys.stderr)
        return 1
    if isinstance(error, UserError):
        print(f"{error.heading}: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError):
        where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
        print(f"error: {error.strerror or error}{where}; what was finished is kept", file=sys.stderr)
        return 1
    if isinstance(error, MemoryError):
        print("error: out of memory; what was finished is kept. Fewer --workers need less", file=sys.stderr)
        return 1
    import traceback

    traceback.print_exc()
    print(_FAULT, file=sys.stderr)
    return 1
