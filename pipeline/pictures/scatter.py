"""Maps of the cohort as pictures: points in, one PNG per map and colour out. Drawn with matplotlib without a display.

Classes have colours that people with a colour-blindness tell apart (Okabe and Ito), numbers an even palette; grey is
what is not known. The points of all classes are drawn in one order that is drawn by a seed, so that none lies on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhim.mil import heatmap
from mhim.pipeline.store import disk

CLASSES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31", "#f0e442", "#5b6070")
UNKNOWN = "#b9bdc8"
LEGEND = 10  # classes that the legend names; the rest are "others", the rarest
PX = 720


@dataclass(frozen=True)
class Points:
    """One picture. xy: (n, 2). values: text of classes, or float (n,) with NaN for unknown. ends: what stands at the
    ends of the colour bar of numbers. large: few points, of patients."""

    xy: np.ndarray
    values: Sequence[str] | np.ndarray
    title: str
    axes: tuple[str, str]
    ends: tuple[str, str] | None = None
    large: bool = False


def classes_of(values: Sequence[str]) -> list[str]:
    """The classes that have a colour of their own, the most frequent LEGEND, in the order of their names (numbers by
    size)."""
    often = Counter(v for v in values if v)
    kept = [name for name, _ in sorted(often.items(), key=lambda item: (-item[1], item[0]))[:LEGEND]]
    return sorted(kept, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


def save(path: Path, points: Points) -> None:
    """Write the picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap, Normalize

    n = len(points.xy)
    order = np.random.default_rng(0).permutation(n)
    size = 26.0 if points.large else max(1.2, min(14.0, 30_000 / max(n, 1)))
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(PX / 130, PX / 165), layout="constrained")
        try:
            put: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.8}
            x, y = points.xy[:, 0], points.xy[:, 1]
            if isinstance(points.values, np.ndarray):
                known = np.isfinite(points.values)
                axes.scatter(x[~known], y[~known], color=UNKNOWN, **put)
                chosen = order[known[order]]
                table = ListedColormap(heatmap.palette(heatmap.EVEN[0]) / 255.0)
                low, high = (np.min(points.values[known]), np.max(points.values[known])) if known.any() else (0, 1)
                ends = Normalize(0, 1) if points.ends else Normalize(low, high if high > low else low + 1)
                drawn = axes.scatter(x[chosen], y[chosen], c=points.values[chosen], cmap=table, norm=ends, **put)
                bar = figure.colorbar(drawn, ax=axes, shrink=0.7)
                if points.ends:
                    bar.set_ticks([0, 1], labels=list(points.ends))
            else:
                named = classes_of(points.values)
                colour_of = {name: CLASSES[k % len(CLASSES)] for k, name in enumerate(named)}
                colours = np.array([colour_of.get(v, UNKNOWN) for v in points.values])
                axes.scatter(x[order], y[order], c=colours[order], **put)
                often = Counter(points.values)
                for name in named:
                    axes.scatter([], [], color=colour_of[name], label=f"{_cut(name)} ({often[name]})", s=30)
                rest = n - sum(often[name] for name in named)
                if rest:
                    what = "others, unknown" if often[""] not in (0, rest) else "unknown" if often[""] else "others"
                    axes.scatter([], [], color=UNKNOWN, label=f"{what} ({rest})", s=30)
                axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)
            axes.set_title(_plain(points.title), fontsize=9)
            axes.set_xlabel(points.axes[0])
            axes.set_ylabel(points.axes[1])
            axes.set_xticks([])
            axes.set_yticks([])
            with disk.naming(path):
                figure.savefig(path, dpi=130, metadata={"Software": None})
        finally:
            plt.close(figure)


def _cut(name: str) -> str:
    """A name for a legend."""
    return _plain(name if len(name) <= 24 else f"{name[:23]}…")


def _plain(text: str) -> str:
    """Text in which `$` begins no formula: names of columns and classes are the user's."""
    return text.replace("$", r"\$")
