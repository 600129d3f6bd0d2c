"""What a full disk, a used-up quota or a folder that may not be written looks like, and the one line about it.

Libraries hide it: torch says RuntimeError, numpy an OSError without a number, others wrap it or name no path. In: the
error that came, and the folder that was being written. Out: the OSError behind it, or None if it is something else.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mhim.configs.errors import UserError
from mhim.pipeline.store.owner import owner

# Nothing else can be written either: these end a command, whatever item met them first.
WHAT = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file is larger than this process may write (ulimit -f)",
}
_DENIED = {errno.EACCES, errno.EPERM}
_TEXTS = {os.strerror(number).lower(): number for number in WHAT}
_PROBE_BYTES = 64 * 1024
_LEAST_FREE = 1 << 20


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, an OSError of a write that names no file names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def trouble(error: BaseException, root: Path | None = None) -> OSError | None:
    """The OSError of a disk or folder that cannot be written, if that is what `error` comes from.

    root: the folder that was being written: it is tried where an error tells neither number nor reason."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        if isinstance(link, OSError) and link.errno in WHAT:
            return link
        if isinstance(link, OSError) and link.errno in _DENIED and root is not None:
            name = link.filename
            if isinstance(name, (str, bytes, os.PathLike)) and _below(os.fsdecode(name), root):
                return link
        link = link.__cause__ or link.__context__
    for link in seen:
        text = str(link).lower()
        for what, number in _TEXTS.items():
            if what in text or re.search(rf"\b(os error|errno\W*) ?{number}\b", text):
                return OSError(number, os.strerror(number), str(root) if root else None)
    known = isinstance(error, UserError)
    return None if root is None or known else _tried(root)


def told(who: str, error: OSError, root: Path | None = None) -> str:
    """One line: who cannot write where, why, and what to do."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else None
    if root is not None and (where is None or (_below(where, root) and "/.tmp" in where)):
        where = str(root)  # not the private name below it
    reason = WHAT.get(error.errno or 0) or (error.strerror or str(error)).lower()
    return (
        f"{who}cannot write to {where or 'its outputs'}: {reason}. What was finished is kept; make room or choose "
        "another --work folder, then run the same command again"
    )


def _below(path: str, root: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def _tried(root: Path) -> OSError | None:
    """Write a little into `root`: the error if that fails for want of room or leave, else None."""
    probe = root / f".tmp-{owner()}-{uuid.uuid4().hex[:8]}"
    try:
        if shutil.disk_usage(root).free < _LEAST_FREE:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root))
        with open(probe, "wb") as f:
            f.write(b"\0" * _PROBE_BYTES)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        return error if error.errno in WHAT or error.errno in _DENIED else None
    finally:
        with suppress(OSError):  # read-only: then there is nothing to remove either
            probe.unlink(missing_ok=True)
    return None
