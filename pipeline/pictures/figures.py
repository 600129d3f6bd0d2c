"""The figures of a run's report: predictions and training histories in, one SVG and one PNG per figure out.

Drawn with matplotlib without a display. It reads no work folder; `report.py` hands it plain rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhim.mil import metrics, resampling
from mhim.pipeline.results.measures.measure import Answers
from mhim.pipeline.results.metrics_file import Reliability
from mhim.pipeline.store import disk

Row = dict[str, Any]
COLOURS = ("#26284f", "#d1751f", "#1f8a70", "#a3324a", "#6b5bb5", "#8a8d1f")
DRAWS = 200  # bootstrap curves of a band


def save_all(out: Path, figures: dict[str, Callable[[Any], None]]) -> dict[str, bytes]:
    """Draw each figure on its own axes (or figure), save `<name>.svg` and `<name>.png` in `out`; name -> SVG bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    made = {}
    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "report",
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        for name, draw in figures.items():
            figure, axes = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
            try:
                draw(axes)
                with disk.naming(out):
                    figure.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
                    figure.savefig(out / f"{name}.png", dpi=130, metadata={"Software": None})
            finally:
                plt.close(figure)
            made[name] = (out / f"{name}.svg").read_bytes()
    return made


def curve(kind: str, answers: Answers, classes: Sequence[str]) -> Callable[[Any], None]:
    """ROC ("roc") or precision-recall ("pr") inside trainings, with a 95 % band of patients drawn as for intervals.

    Each training has its own curve. ROC curves are averaged at each specificity, weighted by their pairs, so that the
    area below is the AUC of the tables; precision is averaged at each recall, as AUPRC is over trainings. Two classes
    give one curve, more give one against the rest each."""
    at = np.linspace(0, 1, 101)

    def points(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
        from sklearn.metrics import precision_recall_curve, roc_curve

        if kind == "roc":
            fpr, tpr, _ = roc_curve(truth, score, sample_weight=weights, drop_intermediate=False)
            return np.asarray(np.interp(at, fpr, tpr))
        precision, recall, _ = precision_recall_curve(truth, score, sample_weight=weights)
        return np.asarray(np.interp(at, recall[::-1], precision[::-1]))

    def line(c: int, weights: np.ndarray) -> np.ndarray | None:
        total, summed = 0.0, np.zeros(len(at))
        for one in answers.trainings:
            w, truth = weights[one.who], one.truth == c
            up, down = w[truth].sum(), w[~truth].sum()
            if up and down:
                share = float(up * down) if kind == "roc" else 1.0
                summed += share * points(truth[w > 0], one.score[w > 0, c], w[w > 0])
                total += share
        return summed / total if total else None

    def draw(axes: Any) -> None:
        n = len(answers.patients)
        for k, c in enumerate([len(classes) - 1] if len(classes) == 2 else range(len(classes))):
            whole = line(c, np.ones(n))
            if whole is None:
                continue
            weights = resampling.draws(n, DRAWS, answers.strata, clusters=answers.clusters)
            drawn = [line(c, w) for block in weights for w in block]
            lines = [one for one in drawn if one is not None]
            colour = COLOURS[k % len(COLOURS)]
            if lines:
                low, high = np.quantile(lines, [0.025, 0.975], axis=0)
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(at, whole, color=colour, label=classes[c])
        if kind == "roc":
            axes.plot([0, 1], [0, 1], color="#999", linestyle=":", linewidth=1)
        names = ("1 - specificity", "sensitivity") if kind == "roc" else ("recall", "precision")
        axes.set(xlabel=names[0], ylabel=names[1], xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="lower right" if kind == "roc" else "lower left", title="95 % band over patients")

    return draw


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Callable[[Any], None]:
    """Counts of true class (rows) against predicted class (columns)."""

    def draw(axes: Any) -> None:
        table = np.asarray(counts)
        axes.imshow(table / np.maximum(table.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        for (r, c), n in np.ndenumerate(table):
            dark = n > table[r].sum() / 2
            axes.text(c, r, str(n), ha="center", va="center", color="white" if dark else "black")
        axes.set(
            xticks=range(len(classes)),
            yticks=range(len(classes)),
            xticklabels=classes,
            yticklabels=classes,
            xlabel="predicted",
            ylabel="true",
        )

    return draw


def reliability(found: Mapping[str, Reliability]) -> Callable[[Any], None]:
    """Confidence against accuracy before and after the temperature; marker area is the number of patients."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="#999", linestyle=":", linewidth=1)
        for colour, (name, one) in zip(COLOURS, found.items(), strict=False):
            bins = one.bins
            axes.plot(
                [b.confidence for b in bins],
                [b.accuracy for b in bins],
                color=colour,
                label=f"{name} (ECE {one.ece:.3f})",
            )
            axes.scatter(
                [b.confidence for b in bins],
                [b.accuracy for b in bins],
                s=[8 + 4 * b.n for b in bins],
                color=colour,
            )
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.05))
        axes.legend(loc="upper left")

    return draw


def training(histories: dict[str, list[Row]], column: str) -> Callable[[Any], None]:
    """One column of the training histories over the epochs, a line per training; "loss" draws its validation too."""

    def draw(axes: Any) -> None:
        for k, (name, rows) in enumerate(histories.items()):
            colour = COLOURS[k % len(COLOURS)]
            for key, line in ((column, "-"), (f"val_{column}", "--")):
                if rows and key in rows[0]:
                    epochs = [int(r["epoch"]) + 1 for r in rows]
                    axes.plot(
                        epochs,
                        [float(r[key]) for r in rows],
                        color=colour,
                        linestyle=line,
                        linewidth=1.2,
                        label=name if line == "-" or column not in rows[0] else None,
                    )
        axes.set(xlabel="epoch", ylabel=f"{column} (dashed: validation)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if 0 < len(histories) <= 8:
            axes.legend()

    return draw


def kaplan_meier(
    time: np.ndarray, event: np.ndarray, high: np.ndarray, p_value: float | None, counted: str = ""
) -> Callable[[Any], None]:
    """Survival of the patients above and below their fold's risk threshold, and how many are at risk at each tick.

    counted: what is counted, where it is not patients."""

    def draw(axes: Any) -> None:
        ticks = nice_ticks(float(time.max()))
        groups = [(c, n, own) for c, (n, own) in zip(COLOURS, (("low risk", ~high), ("high risk", high)), strict=False)]
        for colour, name, own in groups:
            if not own.any():
                continue
            at, alive = metrics.kaplan_meier(time[own], event[own])
            told = f"{name} ({int(own.sum())}, {int(event[own].sum())} events)"
            axes.step(at, alive, where="post", color=colour, label=told)
            censored = np.sort(time[own & (event == 0)])
            axes.plot(censored, alive[np.searchsorted(at, censored, "right") - 1], "|", color=colour)
        tested = "" if p_value is None or not np.isfinite(p_value) else f"    (log-rank p = {p_value:.3g})"
        axes.set(
            ylabel="event-free", ylim=(0, 1.03), xlim=(0, ticks[-1]), xticks=ticks, xlabel=f"time{tested}" + 4 * "\n"
        )  # the empty lines keep room for the table
        below = axes.get_xaxis_transform()  # x in time, y in parts of the axes
        axes.text(0, -0.27, f"{counted} at risk".strip(), transform=axes.transAxes, ha="left", va="center", fontsize=8)
        for k, (colour, name, own) in enumerate(groups):
            y = -0.34 - 0.07 * k
            axes.text(-0.06, y, name, transform=axes.transAxes, ha="right", va="center", fontsize=8, color=colour)
            for t in ticks:
                n = str(int((time[own] >= t).sum()))
                axes.text(t, y, n, transform=below, ha="center", va="center", fontsize=8, color=colour)
        axes.legend(loc="lower left" if event.mean() < 0.5 else "upper right")

    return draw


def kaplan_meier_pair(
    models: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]],
) -> Callable[[Any], None]:
    """The risk groups of two models of the same patients, the first with full lines, the second with dashed ones.

    models: name -> time (n,), event (n,), high risk (n,) by its own decisions, and the p value of its log-rank test."""

    def draw(axes: Any) -> None:
        time, event = next(iter(models.values()))[:2]
        ticks = nice_ticks(float(time.max()))
        below = axes.get_xaxis_transform()  # x in time, y in parts of the axes
        for m, ((name, (time, event, high, p)), line) in enumerate(zip(models.items(), ("-", "--"), strict=True)):
            tested = "" if not np.isfinite(p) else f", p = {p:.2g}"
            for k, (colour, group, own) in enumerate(zip(COLOURS, ("low", "high"), (~high, high), strict=False)):
                if own.any():
                    at, alive = metrics.kaplan_meier(time[own], event[own])
                    told = f"{name}{tested}" if k == int(high.all()) else None
                    axes.step(at, alive, where="post", color=colour, linestyle=line, label=told)
                y = -0.34 - 0.07 * (2 * m + k)
                side = f"{name[:12]}, {group}"
                axes.text(-0.06, y, side, transform=axes.transAxes, ha="right", va="center", fontsize=7, color=colour)
                for t in ticks:
                    n = str(int((time[own] >= t).sum()))
                    axes.text(t, y, n, transform=below, ha="center", va="center", fontsize=7, color=colour)
        axes.text(0, -0.27, "at risk", transform=axes.transAxes, ha="left", va="center", fontsize=7)
        axes.set(ylabel="event-free", ylim=(0, 1.03), xlim=(0, ticks[-1]), xticks=ticks, xlabel="time" + 6 * "\n")
        title = f"{len(time)} patients; log-rank p"
        axes.legend(loc="lower left" if event.mean() < 0.5 else "upper right", title=title, fontsize=8)

    return draw


def nice_ticks(most: float) -> list[float]:
    """0 and four to six round steps that reach beyond `most`."""
    power = 10.0 ** np.floor(np.log10(max(most, 1e-9) / 4))
    step = min(k * power for k in (1, 2, 2.5, 5, 10) if most / (k * power) <= 5)
    return [float(step * i) for i in range(int(np.ceil(most / step)) + 1)]


def scatter(true: np.ndarray, predicted: np.ndarray, low: np.ndarray, high: np.ndarray) -> Callable[[Any], None]:
    """Predicted against true values, (n,) each, with the finite intervals; on the line both are equal."""

    def draw(axes: Any) -> None:
        there = np.isfinite(high - low)
        if there.any():
            axes.vlines(true[there], low[there], high[there], color=COLOURS[0], alpha=0.25, linewidth=1)
        axes.scatter(true, predicted, s=14, color=COLOURS[1], zorder=3)
        ends = [float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))]
        axes.plot(ends, ends, color="#999", linestyle=":", linewidth=1)
        axes.set(xlabel="true", ylabel="predicted")

    return draw
