"""The pictures of a fused run: what each modality weighs and is worth, what the tables lean on, and whose survival a
fused and a single model tell apart.

In: what `results/fused.py` found. Out: `fusion/` beside the numbers of a scored run, one SVG and one PNG per picture
(of survival also the curves' numbers), and what the report says of it. It draws what is stored and fits nothing. Risk
groups are those of each model's own frozen decisions (`risk_groups.py`), so that no two models' risks are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhim.mil import metrics
from mhim.mil.fusion.joined import JOINT
from mhim.mil.tasks import Task
from mhim.pipeline.pictures import figures
from mhim.pipeline.pictures.kinds.kind import Drawing
from mhim.pipeline.results import ensemble, fused, predictions, risk_groups
from mhim.pipeline.results.fused import Share
from mhim.pipeline.results.measures.measure import Row
from mhim.pipeline.store import pages, tables

FOLDER = "fusion"
MOST_BARS = 12
MOST_DOTS = 1000  # of a picture that is made of lines; more are drawn as pixels
LONGEST_NAME = 26  # characters beside a bar


def titles(found: Mapping[str, Any]) -> dict[str, str]:
    """Picture -> what stands above it, in order; of what `fusion.json` tells. Not every one need be there."""
    made = {"weights": "Weight of each modality, patient by patient", "against": "Fused minus each single one"}
    for name in found["tables"]:
        made |= {f"groups_{name}": f"{name}: groups", f"features_{name}": f"{name}: features"}
    return made | {_curves_of(name): f"Kaplan–Meier, fused and {name} alone" for name in found["alone"]}


def shown(run: Path, found: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """(title, SVG) of the pictures that a scored run has."""
    files = [(title, run / FOLDER / f"{name}.svg") for name, title in titles(found).items()]
    return [(title, path.read_bytes()) for title, path in files if path.is_file()]


def values(run: Path, task: Task) -> dict[str, Any] | None:
    """What a report says of a fused run's modalities; None of a run of slides alone."""
    found = fused.read(run)
    if found is None:
        return None
    shares = fused.shares(predictions.folds_of(run))
    names = list(found["alone"])
    percent = f"{100 * found['confidence']:.0f} %"
    headline = str(found["headline"]).replace("_", " ")
    patterns = [one for one in found["patterns"] if one["answers"]]
    return {
        "told": f"The {headline} of the fused model and of each modality alone, of the same held-out patients; the "
        "differences are paired. A weight is the mean over a training's held-out patients, ± its spread over the "
        "trainings.",
        "columns": ("", f"{headline}, {percent} interval", "fused minus it", "weight"),
        "rows": fused.lines(found),
        "patterns": [_pattern(one) for one in patterns] if len(patterns) > 1 else [],
        "figures": [(title, pages.data_uri("image/svg+xml", svg)) for title, svg in shown(run, found)],
        "read": _read(found),
        "unit": fused.unit(task),
        "patient_columns": ["patient", *(f"{n} {what}" for n in names for what in ("weight", "adds"))],
        "patients": [_cells(patient, names, share) for patient, share in shares.items()],
    }


def _pattern(one: Mapping[str, Any]) -> tuple[str, str, str]:
    weights = ", ".join(f"{name} {w['mean']:.2f}" for name, w in one["weights"].items())
    return " + ".join(one["of"]), str(one["answers"]), weights


def _cells(patient: str, names: Sequence[str], share: Share) -> list[str]:
    """A patient's row: weight and part of each modality, "" where it is not at hand."""
    here = share.weights
    each = [(f"{here[n]:.3f}", f"{share.parts[n]:+.3f}") if n in here else ("", "") for n in names]
    return [patient, *(text for pair in each for text in pair)]


def _read(found: Mapping[str, Any]) -> str:
    """How the pictures are read."""
    told = "What a table leans on: the weight of a feature per standard deviation in the table's own model, mean over "
    told += "the folds, with the spread over them. It says what the model uses, not what causes the outcome."
    if found["headline"] == "c_index":
        told += " Risk groups: each patient against the threshold of the very model that held the patient out, of the "
        told += "fused one and of the single one; only patients who have the modality."
    return told


def draw(
    out: Path,
    found: Mapping[str, Any],
    shares: Mapping[str, Share],
    rows: Sequence[Row],
    alone: Mapping[str, Sequence[Row]],
    task: Task,
) -> None:
    """Write every picture into `out`. found: the content of `fusion.json`; rows, alone: the predictions."""
    drawn: dict[str, Drawing] = {
        "weights": _weights(list(found["alone"]), shares),
        "against": _against(found),
    }
    for name, leans in found["tables"].items():
        for what in ("groups", "features"):
            if leans[what]:
                drawn[f"{what}_{name}"] = _bars(leans[what])
    steps: dict[str, list[Row]] = {}
    if "risk" in rows[0]:
        for name, theirs in alone.items():
            curves = _curves(name, shares, rows, theirs, task)
            if curves is not None:
                drawn[_curves_of(name)], steps[_curves_of(name)] = curves
    figures.save_all(out, drawn)
    for name, numbers in steps.items():
        (out / f"{name}.csv").write_text(tables.of_mappings(numbers))


def _weights(names: Sequence[str], shares: Mapping[str, Share]) -> Drawing:
    """A box and a dot per patient who has the modality; hollow dots: patients who lack another."""

    def has_all(share: Share) -> bool:
        return all(n in share.weights for n in names if n != JOINT)

    def paint(axes: Any) -> None:
        rng = np.random.default_rng(0)
        whole = sum(map(has_all, shares.values()))
        for k, name in enumerate(names):
            own = [s for s in shares.values() if name in s.weights]
            if not own:
                continue
            at = k + rng.uniform(-0.22, 0.22, len(own))
            weight = np.array([s.weights[name] for s in own])
            full = np.array([has_all(s) for s in own])
            axes.boxplot(
                weight[full] if full.any() else weight,
                positions=[k],
                widths=0.6,
                showfliers=False,
                medianprops={"color": figures.COLOURS[0]},
                boxprops={"color": "#888"},
                whiskerprops={"color": "#888"},
                capprops={"color": "#888"},
            )
            for marked, face in ((full, figures.COLOURS[k % 6]), (~full, "none")):
                axes.scatter(
                    at[marked],
                    weight[marked],
                    s=14,
                    facecolor=face,
                    edgecolor=figures.COLOURS[k % 6],
                    linewidth=0.8,
                    alpha=0.75,
                    zorder=3,
                    rasterized=len(own) > MOST_DOTS,
                )
        axes.set(xticks=range(len(names)), xticklabels=names, xlim=(-0.6, len(names) - 0.4), ylim=(-0.03, 1.03))
        lacking = len(shares) - whole
        told = f"{whole} patients with all" + (f", {lacking} who lack some (hollow)" if lacking else "")
        axes.set(ylabel="weight", xlabel=told)
        axes.grid(axis="x", visible=False)

    return paint


def _against(found: Mapping[str, Any]) -> Drawing:
    """The paired differences with their intervals; right of 0 the fused answer is better (of an error, left)."""
    rows = [(f"{n} alone", one["fused_minus"]) for n, one in found["alone"].items()]
    rows += [(f"without {n}", one["fused_minus"]) for n, one in found["removed"].items()]

    def paint(axes: Any) -> None:
        axes.axvline(0, color="#999", linestyle=":", linewidth=1)
        for k, (_, one) in enumerate(rows):
            if one["value"] is None:
                continue
            colour = figures.COLOURS[0 if k < len(found["alone"]) else 1]
            if one["low"] is not None and one["high"] is not None:
                axes.plot([one["low"], one["high"]], [k, k], color=colour)
            axes.plot(one["value"], k, "o", color=colour, markersize=5)
        percent = f"{100 * found['confidence']:.0f} %"
        headline = str(found["headline"]).replace("_", " ")
        axes.set(yticks=range(len(rows)), yticklabels=[_short(name) for name, _ in rows])
        axes.set(xlabel=f"{headline}, fused minus it, paired {percent} interval")
        axes.invert_yaxis()

    return paint


def _bars(leans: Sequence[Mapping[str, Any]]) -> Drawing:
    """Mean weight per standard deviation of the strongest, with its sd over folds; pale where their signs differ."""
    rows = list(leans)[:MOST_BARS]

    def paint(axes: Any) -> None:
        for k, one in enumerate(rows):
            sure = one["same_sign"] == one["in"]
            axes.barh(k, one["mean"], color=figures.COLOURS[0] if one["mean"] > 0 else figures.COLOURS[1],
                      alpha=0.85 if sure else 0.3, height=0.7)  # fmt: skip
            if one["sd"] is not None:
                axes.plot([one["mean"] - one["sd"], one["mean"] + one["sd"]], [k, k], color="#444", linewidth=1.2)
        axes.axvline(0, color="#444", linewidth=0.8)
        axes.set(yticks=range(len(rows)), yticklabels=[_short(str(one["name"])) for one in rows])
        more = f", the strongest {len(rows)}" if len(leans) > len(rows) else ""
        pale = ", pale: signs differ" if any(one["same_sign"] < one["in"] for one in rows) else ""
        axes.set(xlabel=f"weight per sd ± sd over folds{more}{pale}")
        axes.xaxis.label.set_horizontalalignment("right")
        axes.xaxis.label.set_x(1.0)
        axes.invert_yaxis()

    return paint


def _curves(
    name: str, shares: Mapping[str, Share], rows: Sequence[Row], theirs: Sequence[Row], task: Task
) -> tuple[Drawing, list[Row]] | None:
    """The curves of the patients who have the modality, by the fused decision and by that of it alone; None where a
    training has no threshold, or nobody is in it."""

    def grouped(of: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        own = [r for r in of if name in shares[r["patient"]].weights]
        return (
            risk_groups.groups(sorted(ensemble.ensemble(own, task), key=lambda r: str(r["patient"]))) if own else None
        )

    both = {"fused": grouped(rows), name: grouped(theirs)}
    found = {who: groups for who, groups in both.items() if groups is not None}
    if len(found) < len(both):
        return None
    steps = [{"model": who, **step} for who, groups in found.items() for step in risk_groups.steps(*groups)]
    return figures.kaplan_meier_pair({who: (*g, metrics.log_rank(*g)) for who, g in found.items()}), steps


def _curves_of(name: str) -> str:
    return f"{risk_groups.NAME}_{name}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
