"""What a finished output says of its own files: size and SHA-256 of each, so that damage is told and never read.

In: an output's folder, or its packed form. Out: the sums that its seal carries, and which files do not fit them. Sizes
cost a look at each file and are compared whenever an output is planned or opened; sums cost reading every byte and are
compared by `pipeline verify`. Outputs of versions that kept no sums can be opened, and say nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

SEAL = "manifest.json"  # carries the fingerprint of outputs that are not Zarr stores
FILES, OWN = "files", "seal_sum"
LARGEST = 64 << 20  # bytes of a description; a seal has about 100 for each file
_DIGITS = 16  # of a SHA-256: against accidents, not against a forger, who could write new sums beside new bytes


@dataclass(frozen=True)
class Found:
    """What lies under an output's name. attrs: what its seal says. wrong: what is damaged in it, "" if it is whole: it
    has a seal, and every file that the seal lists is there with its size (of what listed none, the seal decides)."""

    attrs: dict[str, Any]
    wrong: str = ""

    @property
    def fingerprint(self) -> str:
        return str(self.attrs.get("fingerprint", ""))

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of the fingerprint; none where the seal is damaged."""
        old = self.attrs.get("settings")
        return old if isinstance(old, dict) else {}

    def differences(self, fields: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Setting -> (there, now) of each field of a fingerprint that differs. Damaged where none does but the seal's
        own fingerprint does."""
        old = self.settings
        gone, new = "not recorded", "not used"
        keys = sorted(fields.keys() | old.keys())
        return {k: (old.get(k, gone), fields.get(k, new)) for k in keys if old.get(k, gone) != fields.get(k, new)}


def look(path: Path, seal: str | None = None) -> Found | None:
    """What lies at `path`, folder or packed, or None if nothing does. Raises nothing: damage stands in `wrong`.

    seal: the file that carries the fingerprint of an output that is spread over an existing folder."""
    # texts and not paths, and one look for a packed form: planning 100,000 new items takes a third of the time
    members = (seal,) if seal else ("zarr.json", SEAL)
    for member in members:
        try:
            raw = read_small(f"{path}/{member}")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return Found({}, f"{member} cannot be read ({error.strerror})")
        except ValueError as error:
            return Found({}, str(error))
        found = _parsed(raw, member)
        files = None if found.wrong else listed(found.attrs)
        return Found(found.attrs, misfit(path, files)) if files else found
    if os.path.isfile(f"{path}.zip"):
        return _look_packed(Path(f"{path}.zip"), members)
    if seal is None and os.path.lexists(path):
        return Found({}, f"it has no {' or '.join(members)}: a copy that was cut short, or not an output")
    return None


def _look_packed(packed: Path, members: tuple[str, ...]) -> Found:
    try:
        with zipfile.ZipFile(packed) as z:
            there = set(z.namelist())
            for member in members:
                if member in there:
                    found = _parsed(read_packed(z, member), member)
                    files = None if found.wrong else listed(found.attrs)
                    return Found(found.attrs, misfit_packed(z, files)) if files else found
    except (zipfile.BadZipFile, EOFError) as error:
        return Found({}, f"{packed.name} is no whole zip file ({error})")
    except OSError as error:
        return Found({}, f"{packed.name} cannot be read ({error.strerror})")
    except (ValueError, NotImplementedError, RuntimeError, zlib.error) as error:  # what zipfile says of odd members
        return Found({}, f"{packed.name} cannot be read ({error})")
    return Found({}, f"{packed.name} holds no {' or '.join(members)}")


def read_small(path: str | Path) -> bytes:
    """A description (a seal, a card, the metadata of an array). Raises OSError, and ValueError for one that is larger
    than any of them."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        raw = f.read(size + 1) if size <= LARGEST else b""  # room for LARGEST each time costs 0.4 ms
    if max(size, len(raw)) > LARGEST:
        raise ValueError(f"{os.path.basename(path)} has more than the {LARGEST >> 20} MiB of any description")
    return raw


def read_packed(packed: zipfile.ZipFile, member: str) -> bytes:
    """As `read_small`, of a packed output: a few kB can be packed that unfold to gigabytes. Raises KeyError too."""
    if packed.getinfo(member).file_size > LARGEST:  # zipfile unfolds no more than this
        raise ValueError(f"{member} has more than the {LARGEST >> 20} MiB of any description")
    return packed.read(member)


def _parsed(raw: bytes, member: str) -> Found:
    try:
        parsed = json.loads(raw.decode())
        attrs = parsed["attributes"] if "zarr_format" in parsed else parsed
        if not isinstance(attrs, dict):
            raise ValueError("no attributes in it")
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return Found({}, f"{member} is damaged ({error or type(error).__name__})")
    return Found(attrs)


def twin(root: Path, fingerprint: str, but: Path) -> Path | None:
    """Another whole output below `root` with this fingerprint than `but`, among those whose seal is `manifest.json`."""
    # os.walk passes over what vanishes meanwhile; hidden folders hold what others are only just making
    for place, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in ("heatmaps", "scores"))
        found = Path(place)
        if SEAL not in files or found == but:
            continue
        there = look(found)
        if there is not None and not there.wrong and there.fingerprint == fingerprint:
            return found
    return None


def _digest(file: io.BufferedIOBase) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def sums(out: Path, seal: str) -> dict[str, str]:
    """Name -> "bytes digest" of every file below `out` but its seal, sorted by name."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if name != seal:
            with open(path, "rb") as f:
                found[name] = f"{os.fstat(f.fileno()).st_size} {_digest(f)}"
    return found


def own_sum(marks: dict[str, Any]) -> str:
    """Digest of what a seal says, without this digest."""
    text = json.dumps({k: v for k, v in marks.items() if k != OWN}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def listed(attrs: dict[str, Any]) -> dict[str, str] | None:
    """The sums that a seal carries; None for one of an earlier version."""
    files = attrs.get(FILES)
    known = isinstance(files, dict) and all(isinstance(v, str) for v in files.values())
    return cast(dict[str, str], files) if known else None


def misfit(folder: Path, files: dict[str, str]) -> str:
    """The first file that is missing or not of its size, and how; "" if all fit. No byte is read."""
    root = str(folder)
    for name, told in files.items():
        size = told.partition(" ")[0]
        try:
            there = os.stat(f"{root}/{name}").st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if str(there) != size:
            return f"{name} has {there} bytes, {size} were written"
    return ""


def misfit_packed(packed: zipfile.ZipFile, files: dict[str, str]) -> str:
    """As `misfit`, of a packed output."""
    sizes = {info.filename: info.file_size for info in packed.infolist()}
    for name, told in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if str(sizes[name]) != told.partition(" ")[0]:
            return f"{name} has {sizes[name]} bytes, {told.partition(' ')[0]} were written"
    return ""


def damaged(path: Path, packed: bool, attrs: dict[str, Any]) -> list[str]:
    """Every file of an output whose bytes are not those that were written, and how; reads all of them.

    attrs: what the seal says. path: the folder, or the packed file. Raises OSError and zipfile.BadZipFile."""
    wrong = [] if attrs.get(OWN) in (None, own_sum(attrs)) else ["what its seal says was changed"]
    files = listed(attrs) or {}
    if not packed:
        for name, told in files.items():
            if (how := misfit(path, {name: told})) != "":
                wrong.append(how)
                continue
            with open(path / name, "rb") as f:
                if _digest(f) != told.partition(" ")[2]:
                    wrong.append(f"{name} holds other bytes than were written")
        return wrong
    with zipfile.ZipFile(path) as z:
        for name, told in files.items():
            if (how := misfit_packed(z, {name: told})) != "":
                wrong.append(how)
                continue
            try:
                with z.open(name) as member:
                    same = _digest(cast(io.BufferedIOBase, _Buffered(member))) == told.partition(" ")[2]
            except (zipfile.BadZipFile, EOFError):
                same = False
            if not same:
                wrong.append(f"{name} holds other bytes than were written")
    return wrong


class _Buffered:
    """A member of a zip, with the `readinto` alone that hashlib asks for."""

    def __init__(self, member: Any) -> None:
        self._member = member

    def readinto(self, into: bytearray) -> int:
        return int(self._member.readinto(into))

    def readable(self) -> bool:
        return True
