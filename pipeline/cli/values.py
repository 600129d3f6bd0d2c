"""Values of options that stand for several: texts in, numbers or settings out. ConfigError says how to write them."""

from __future__ import annotations

from typing import Any


def mpps(text: str | None) -> list[float] | None:
    """`0.5,1,2` as numbers."""
    from mhim.configs.load import ConfigError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--mpp {text!r}: write numbers, for example 0.5 or 0.5,1,2") from None


def gpu_numbers(text: str | None) -> list[int] | None:
    """`0,1,2` as numbers."""
    from mhim.configs.load import ConfigError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--gpus {text!r}: write the numbers of the GPUs, for example 0,1") from None


def grid_of(texts: list[str]) -> dict[str, Any] | None:
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
