"""Seconds of extraction as tiles/s, for progress bar, log and summary. In: an outcome's numbers, or sums of them."""

from __future__ import annotations

from collections.abc import Mapping


def told(numbers: Mapping[str, float]) -> str:
    """`25.1 tiles/s (reading 4210/s, encoding 25.4/s, limited by the encoder)`; "" for numbers of other stages.

    Reading limits where the encoder waited for more than a tenth of the time, and reading is the longer work of the two
    (waiting is also what a start costs, and all there is where the reading threads encode, too).
    """
    if not numbers.get("tiles") or "encode_s" not in numbers:
        return ""
    whole, read, encode = (_rate(numbers["tiles"], numbers[k]) for k in ("work_s", "read_s", "encode_s"))
    waited = numbers["waited_s"] > 0.1 * numbers["work_s"] and numbers["read_s"] > numbers["encode_s"]
    side = "reading" if waited else "the encoder"
    return f"{whole} tiles/s (reading {read}/s, encoding {encode}/s, limited by {side})"


def _rate(tiles: float, seconds: float) -> str:
    rate = tiles / max(seconds, 1e-3)
    return f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"
