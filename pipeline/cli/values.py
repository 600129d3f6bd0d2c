"""Values of options that stand for several: texts in, numbers or settings out. ConfigError says how to write them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def numbers_of(flag: str, text: str, kind: type) -> list[Any]:
    """`0.5,1,2` as numbers. flag: for the message. kind: int or float (or str)."""
    from mhim.configs.load import ConfigError

    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        example = "0 or 0,1,2" if kind is int else "0.5 or 0.5,1,2"
        raise ConfigError(f"{flag} {text!r}: write numbers, for example {example}") from None


def grid_of(texts: Iterable[str]) -> dict[str, Any] | None:
    """`mask_ratio_h=0.01,0.03` texts (several may stand in one, apart by blanks) as the setting train.grid."""
    from mhim.configs.load import ConfigError
    from mhim.configs.texts import read_yaml

    grid: dict[str, Any] = {}
    for text in " ".join(texts).split():
        key, _, values = text.partition("=")
        if not values:
            raise ConfigError(f"--grid {text!r}: write setting=value,value, for example mask_ratio_h=0.01,0.03,0.05")
        grid[key] = [read_yaml(v, f"--grid {text!r}") for v in values.split(",")]
    return grid or None


def files_of(flag: str, texts: Iterable[str]) -> dict[str, str] | None:
    """`clinical=patients.csv` texts as names and files; absolute, since a job may start in another folder."""
    from mhim.configs.load import ConfigError

    files: dict[str, str] = {}
    for text in texts:
        name, _, file = text.partition("=")
        if not name.strip() or not file.strip():
            raise ConfigError(f"{flag} {text!r}: write NAME=FILE, for example clinical=patients.csv")
        if name.strip() in files:
            raise ConfigError(f"{flag} {text!r}: there is a {name.strip()!r} already; give each table its own name")
        files[name.strip()] = str(Path(file.strip()).expanduser().absolute())
    return files or None


def share_of(text: str | None) -> tuple[int, int] | None:
    """`3/20` as the third of twenty shares."""
    from mhim.configs.load import ConfigError

    if text is None:
        return None
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise ConfigError(f"--shard {text!r}: write i/n with 1 <= i <= n, for example 3/20")
    return int(i), int(n)
