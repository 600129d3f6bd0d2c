"""Seconds of extraction as tiles/s, for progress bar, log and summary. In: an outcome's numbers, or sums of them."""

from __future__ import annotations

from collections.abc import Mapping


def told(numbers: Mapping[str, float]) -> str:
    """`25.1 tiles/s (reading 4210/s, encoding 25.4/s, limited by the encoder)`; "" for numbers of other stages.

    Reading limits where the encoder waited for more than a tenth of the time.
    """
    if not numbers.get("tiles") or "encode_s" not in numbers:
        return ""
    whole, read, encode = (_rate(numbers["tiles"], numbers[k]) for k in ("work_s", "read_s", "encode_s"))
    side = "reading" if numbers["waited_s"] > 0.1 * numbers["work_s"] else "the encoder"
    return f"{whole} tiles/s (reading {read}/s, encoding {encode}/s, limited by {side})"


def _rate(tiles: float, seconds: float) -> str:
    return f"{tiles / seconds:.3g}" if tiles / max(seconds, 1e-9) < 100 else f"{tiles / max(seconds, 1e-3):.0f}"
