"""`pipeline verify`: every byte of a work folder's outputs compared with the sums in their seals.

In: a work folder. Out: which outputs are damaged, by id and file; with `repair` those are moved to `damaged/`, where
the same verbs no longer find them and make them anew. Changes nothing else. Reads all, in threads (hashing lets go of
Python's lock); a note of what was found sound lets a command that was stopped go on, where a note can be written.
Pictures beside tiles carry no sum: those whose file is not whole are told.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TextIO

from mhim.configs.processes import usable_cores
from mhim.pipeline.maps import stored
from mhim.pipeline.resume import console
from mhim.pipeline.resume.claims import Claims
from mhim.pipeline.store import layout, reading, seals

NOTES = ".verified"  # in the work folder while a verification is under way: what was found sound so far
DAMAGED = "damaged"  # in the work folder: what --repair moved there
_SEALS = ("score.json",)  # of outputs that are spread over a folder that holds others


@dataclass(frozen=True)
class Output:
    """One thing that carries sums. name: its path from the work folder, the suffix of a store left away. seal: of an
    output spread over its folder."""

    name: str
    path: Path
    seal: str | None = None


@dataclass
class Verified:
    """What was found. sound: how many outputs, those that a stopped command had seen included. unknown: outputs of
    earlier versions, which keep no sums. damaged: output -> what is wrong with which file. moved: where that is now."""

    sound: int = 0
    unknown: list[str] = field(default_factory=list)
    damaged: dict[str, list[str]] = field(default_factory=dict)
    moved: dict[str, Path] = field(default_factory=dict)


def outputs(work: layout.Work) -> Iterator[Output]:
    """Every tile, feature and score store, every trained fold, every folder of pictures, the overlays, and
    the maps with their galleries; sorted. What others are only just making (hidden folders) is passed over."""
    for root in (work.tiles, work.root / "features", work.overlays, work.runs, work.maps):
        for here, names, files in os.walk(root):
            names[:] = sorted(n for n in names if not n.startswith("."))
            folder = Path(here)
            for n in [n for n in names if n.endswith(".zarr")]:
                yield _output(work, folder / n)
            names[:] = [n for n in names if not n.endswith(".zarr")]
            for n in sorted(f for f in files if f.endswith(".zarr.zip")):
                if not (folder / n.removesuffix(".zip")).is_dir():
                    yield _output(work, folder / n.removesuffix(".zip"))
            holds_folds = any(n.startswith("fold_") for n in names)  # `inner/fold_0` of a fused run, no output itself
            if layout.SEAL in files or (folder.name.startswith("fold_") and not holds_folds):
                yield _output(work, folder)
                names[:] = [n for n in names if folder.parent == work.maps and n == stored.GALLERY]
            yield from (_output(work, folder, seal) for seal in _SEALS if seal in files)
            if root == work.overlays:
                yield from (_output(work, folder / f) for f in sorted(files) if f.endswith(".jpg"))


def verify(work: layout.Work, repair: bool = False, again: bool = False, workers: int = 0) -> Verified:
    """Read every output and compare it with its seal. Goes on where a command before was stopped, unless `again`.

    workers: threads; 0 is two per core."""
    if not work.root.is_dir():
        raise layout.StoreError(f"{work.root} does not exist; say which work folder with --work")
    result = Verified()
    notes = work.root / NOTES
    if again:
        notes.unlink(missing_ok=True)
    before = set(notes.read_text().splitlines()) if notes.is_file() else set()
    everything = outputs(work)
    with ThreadPoolExecutor(workers or 2 * usable_cores()) as pool, _noting(notes) as log:
        while some := list(islice(everything, 1000)):
            for output, (mark, wrong) in zip(some, pool.map(lambda one: _check(one, before), some), strict=True):
                if wrong is None:
                    result.unknown.append(output.name)
                elif wrong:
                    result.damaged[output.name] = wrong
                    if repair:
                        result.moved[output.name] = _move(work, output)
                else:
                    result.sound += 1
                    if mark not in before and log is not None:
                        log.write(f"{mark}\n")
    with suppress(OSError):  # a folder that can only be read has no notes
        notes.unlink(missing_ok=True)
    return result


@contextmanager
def _noting(notes: Path) -> Iterator[TextIO | None]:
    if not os.access(notes.parent, os.W_OK):  # of an archive that can only be read, say
        yield None
        return
    with open(notes, "a", buffering=1) as log:
        yield log


def show(work: layout.Work, repair: bool, again: bool) -> int:
    """Verify and tell. Returns 1 if something is damaged."""
    found = verify(work, repair, again)
    for name, wrong in found.damaged.items():
        console.out.print(f"damaged {console.escape(name)}: {console.escape('; '.join(wrong[:5]))}")
        if len(wrong) > 5:
            console.out.print(f"  and {len(wrong) - 5} more files of it")
    if found.unknown:
        some = ", ".join(found.unknown[:5]) + (" ..." if len(found.unknown) > 5 else "")
        console.out.print(
            f"not checkable, made by a version that kept no sums: {len(found.unknown)} ({console.escape(some)})"
        )
    console.out.print(f"{found.sound} outputs are sound, {len(found.damaged)} damaged")
    if found.moved:
        console.out.print(
            f"moved to {console.escape(str(work.root / DAMAGED))}, which can be deleted: the commands "
            "that made them make them anew (imported features: import them again)"
        )
    elif found.damaged:
        console.out.print("with --repair they are moved aside, so that the commands that made them make them anew")
    return 1 if found.damaged else 0


def _output(work: layout.Work, path: Path, seal: str | None = None) -> Output:
    return Output(path.relative_to(work.root).as_posix().removesuffix(".zarr"), path, seal)


def _check(output: Output, before: set[str]) -> tuple[str, list[str] | None]:
    """(mark of this state of the output, what is wrong: nothing, a list, or None where it cannot be told)."""
    if output.path.suffix == ".jpg":
        return _check_picture(output)
    found = seals.look(output.path, output.seal)
    if found is None:
        return "", []  # removed meanwhile
    if found.wrong:
        return "", [found.wrong, *_rest(output, found)]
    mark = f"{found.attrs.get(seals.OWN, '')} {output.name}"
    if mark in before:
        return mark, []
    if seals.listed(found.attrs) is None:
        return mark, _readable(output)
    return mark, _rest(output, found)


def _rest(output: Output, found: seals.Found) -> list[str]:
    """What is wrong with the bytes; the first misfit is told by `look` already."""
    folder = reading.stored(output.path) or output.path
    try:
        wrong = seals.damaged(folder, folder != output.path, found.attrs)
    except (OSError, zipfile.BadZipFile) as error:
        return [] if found.wrong else [str(error)]
    return [line for line in wrong if line != found.wrong]


def _readable(output: Output) -> list[str] | None:
    """Of a store without sums: what cannot be read at all; None if nothing is to be seen."""
    if output.path.suffix != ".zarr":
        return None
    wrong = []
    try:
        for name in reading.array_names(output.path):
            try:
                reading.read_array(output.path, name)
            except layout.StoreError as error:
                wrong.append(str(error))
    except (layout.StoreError, zipfile.BadZipFile, OSError) as error:
        wrong.append(str(error))
    return wrong or None


def _check_picture(output: Output) -> tuple[str, list[str]]:
    """A JPEG begins and ends with its marks; one cut short or full of zeros does not."""
    try:
        raw = output.path.read_bytes()
    except FileNotFoundError:
        return "", []
    whole = raw[:2] == b"\xff\xd8" and raw[-2:] == b"\xff\xd9"
    mark = f"{hashlib.sha256(raw).hexdigest()[:16]} {output.name}"
    return mark, [] if whole else ["it is not a whole JPEG file"]


def _move(work: layout.Work, output: Output) -> Path:
    """Move a damaged output aside, under the claim of its item, so that nobody is making it meanwhile."""
    source = output.path if output.seal is None else output.path / output.seal
    source = reading.stored(source) or source
    target = work.root / DAMAGED / source.relative_to(work.root)
    number = 1
    while os.path.lexists(target):
        number += 1
        target = target.with_name(f"{source.name}-{number}")
    target.parent.mkdir(parents=True, exist_ok=True)
    root, key = _claimed(work, output)
    with Claims(root / ".claims", 60.0) as claims:
        if claims.take(key) is not None:
            raise layout.StoreError(f"{output.path} is being made at this moment; give the command again")
        os.rename(source, target)
    try:
        (root / ".claims").rmdir()
    except OSError:
        return target  # others are at work
    return target


def _claimed(work: layout.Work, output: Output) -> tuple[Path, str]:
    """The folder of the stage whose output this is, which holds its claims, and the item's key there."""
    parts = output.path.relative_to(work.root).parts
    if output.seal is not None:
        return output.path, "metrics"
    if parts[0] == "maps":
        depth = 3 if parts[2:3] == (stored.GALLERY,) else 1
        return work.root.joinpath(*parts[:depth]), "/".join(parts[depth:])
    depth = 1 if parts[0] in ("tiles", "overlays") else 2
    if "scores" in parts[:-1]:
        depth = parts.index("scores")
        return work.root.joinpath(*parts[:depth]), "/".join(parts[depth + 1 :]).removesuffix(".zarr")
    if "heatmaps" in parts[:-1]:
        depth = parts.index("heatmaps") + 1
    return work.root.joinpath(*parts[:depth]), "/".join(parts[depth:]).removesuffix(".zarr")
