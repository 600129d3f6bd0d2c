"""Two runs on the same splits: is one better? Paired bootstrap over patients, inside their folds, or each
with all its slides.

In: two scored runs. Out: per metric the difference with its interval and a verdict. Both runs' metrics are those of
`estimand.py`, of the same resampled patients. Refuses runs of other tasks, classes, splits, patients or truths, for
which no pair exists. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mhim.configs import texts
from mhim.configs.schema import ScoreConfig
from mhim.mil import resampling
from mhim.mil.tasks import Task
from mhim.pipeline.results import estimand, measures, numbers, operating_point, several, views
from mhim.pipeline.results.measures.measure import Answers, Row, bag_of, place
from mhim.pipeline.results.metrics_file import Metrics
from mhim.pipeline.results.present import Present
from mhim.pipeline.results.views import View
from mhim.pipeline.resume.console import escape
from mhim.pipeline.store.layout import CARD, StoreError
from mhim.pipeline.training import bundle, choices, kept, plan
from mhim.pipeline.training import fold as training


def compare(
    one: View | Path, two: View | Path, config: ScoreConfig, only: str | None = None
) -> dict[str, dict[str, Any]]:
    """Metric -> difference (two minus one), interval, p value, verdict on `two`. Of metrics of which less is better the
    sign is turned.

    only: one metric instead of all. Raises StoreError when a run is not scored, or task, classes, splits, patients or
    truths differ.
    """
    one, two = (run if isinstance(run, View) else View(run) for run in (one, two))
    told, rows = zip(*(scored(run) for run in (one, two)), strict=True)
    refuse_others((one.name, two.name), told, rows)
    task = told[0].task.value
    sides = [estimand.answers(sorted(r, key=order), task) for r in rows]
    horizons = told[0].horizons or _horizons(one)
    metrics = [estimand.metric(side, horizons) for side in sides]
    return _paired(metrics, sides[0], config, only)


def _paired(
    metrics: Sequence[Callable[[np.ndarray], dict[str, np.ndarray]]],
    side: Answers,
    config: ScoreConfig,
    only: str | None,
) -> dict[str, dict[str, Any]]:
    """Differences over the same draws. The patients of both sides stand in the same order."""
    measure = measures.of(side.task)

    def difference(weights: np.ndarray) -> dict[str, np.ndarray]:
        first, second = (metric(weights) for metric in metrics)
        wanted = [only] if only else [k for k in first if k in measure.compared]
        return {k: first[k] - second[k] if k in measure.less_is_better else second[k] - first[k] for k in wanted}

    point, drawn = resampling.bootstrap(
        difference, len(side.patients), config.bootstrap, side.strata, clusters=side.clusters
    )
    return {k: resampling.verdict(v, drawn[k], config.confidence) for k, v in point.items()}


def refuse_others(names: Sequence[str], told: Sequence[Metrics], rows: Sequence[Sequence[Row]]) -> None:
    """Raise StoreError, saying what differs, unless two runs answered the same question about the same patients."""
    one, two = names
    each = [measures.of(t.task.value) for t in told]
    kinds = [measure.question for measure in each]
    if kinds[0] != kinds[1]:
        raise StoreError(f"{one} is of {kinds[0]}, {two} of {kinds[1]}: they answer different questions")
    classes = [t.task.classes for t in told]
    if classes[0] != classes[1]:
        told_classes = [", ".join(c) for c in classes]
        raise StoreError(
            f"{one} has the classes {told_classes[0]}, {two} {told_classes[1]} (the last is "
            "the positive one): only runs of the same classes in the same order can be compared"
        )
    units = [t.unit for t in told]
    if units[0] != units[1]:
        raise StoreError(f"{one} answers for each {units[0]}, {two} for each {units[1]} (train.bag): no pairs exist")
    if told[0].split_hash != told[1].split_hash:
        raise StoreError(
            f"{one} has split {told[0].split_hash}, {two} {told[1].split_hash}: only "
            "runs on the same splits can be compared (same labels, train.seed and train.folds)"
        )
    held = [{(bag_of(r), r["repeat"], r["fold"]) for r in side} for side in rows]
    if held[0] != held[1]:
        patient, _, fold = sorted(held[0] ^ held[1])[0]
        raise StoreError(
            f"{units[0]} {patient} (fold {fold}) is in one of {one} and {two} only: train the missing fold first"
        )
    columns = each[0].truth
    truths = [{bag_of(r): tuple(r[c] for c in columns) for r in side} for side in rows]
    other = sorted(p for p in truths[0] if truths[0][p] != truths[1][p])
    if other:
        p = other[0]
        shown = [", ".join(f"{c} {v}" for c, v in zip(columns, t[p], strict=True)) for t in truths]
        raise StoreError(
            f"{len(other)} of {len(truths[0])} {units[0]}s have another truth in {two} than in {one}, such "
            f"as {p}: {shown[0]} in {one}, {shown[1]} in {two}{each[0].hint(truths, other)}. Only runs "
            "of the same labels can be compared: train again with one label table"
        )


def views_of(one: Path, two: Path, target: str | None) -> list[tuple[View, View]]:
    """Which views of two runs are set side by side: of the target named, or of every one that both have. A run with a
    single target stands beside the one of the other that is named, or whose column and kind are its own. Raises
    StoreError."""
    alone = [[view.target for view in views.of(run)] == [""] for run in (one, two)]
    if all(alone):
        if target is not None:
            raise StoreError(f"{one.name} and {two.name} have a single target each; leave --target {target} away")
        return [(View(one), View(two))]
    if not any(alone):
        if target is not None:
            return [(views.pick(one, target), views.pick(two, target))]
        both = in_common(one, two)
        if not both:
            said = "; ".join(f"{run.name} has {', '.join(_names(run))}" for run in (one, two))
            raise StoreError(f"{one.name} and {two.name} have no target in common: {said}")
        return [(View(one, name), View(two, name)) for name in both]
    single, other = (one, two) if alone[0] else (two, one)
    found = views.pick(other, target) if target is not None else _fitting(single, other)
    return [(View(single), found) if alone[0] else (found, View(single))]


def _names(run: Path) -> list[str]:
    return [view.target for view in views.of(run)]


def in_common(one: Path, two: Path) -> list[str]:
    """The targets that both of two runs with several have, in the order of the first."""
    theirs = _names(two)
    return [name for name in _names(one) if name and name in theirs]


def _fitting(single: Path, other: Path) -> View:
    """The target of a run with several that a run with one is of: of the column that this was trained on, and of the
    same kind and classes. Raises StoreError naming what there is."""

    def kind(view: View) -> tuple[str, tuple[str, ...]]:
        task = scored(view)[0].task.value
        return measures.of(task).question, task.classes

    def called(view: View) -> str:
        return " ".join((view.target, f"({kind(view)[0]})")).strip()

    own, every = kind(View(single)), views.of(other)
    # time and event have columns of their own, and there is one such target at most
    column = "" if scored(View(single))[0].task.value.survival else _column(single)
    found = [view for view in every if kind(view) == own and column in (view.target, "")]
    if len(found) == 1:
        return found[0]
    of = f"column {column}, {own[0]}" if column else own[0]
    raise StoreError(
        f"{single.name} is of {of}, which is none of the targets of {other.name}: "
        f"{', '.join(called(view) for view in every)}; name one with --target"
    )


def _column(run: Path) -> str:
    """The column of labels that a run with a single target was trained on; "" where it does not tell."""
    try:
        told = texts.read_yaml((run / plan.LABELS).read_text(), plan.LABELS)
    except (OSError, ValueError):  # made before the file was
        return ""
    labels = told.get("labels") if isinstance(told, dict) else None
    return str(labels.get("label_column") or "label") if isinstance(labels, dict) else ""


def of_targets(runs: Sequence[Path]) -> list[dict[str, tuple[list[Row], Task]]]:
    """Target -> rows and task of each of runs with several targets, of those targets that all have, the rows in one
    order. Raises StoreError, also where the runs cannot be compared."""
    both = [name for name in _names(runs[0]) if name and all(name in _names(run) for run in runs)]
    if not both:
        raise StoreError(f"{' and '.join(run.name for run in runs)} have no target in common")
    sides: list[dict[str, tuple[list[Row], Task]]] = [{} for _ in runs]
    for name in both:
        every = [View(run, name) for run in runs]
        told, rows = zip(*(scored(view) for view in every), strict=True)
        for k in range(1, len(runs)):
            refuse_others((every[0].name, every[k].name), (told[0], told[k]), (rows[0], rows[k]))
        for side, own, summary in zip(sides, rows, told, strict=True):
            side[name] = sorted(own, key=order), summary.task.value
    return sides


def compare_together(one: Path, two: Path, config: ScoreConfig) -> dict[str, dict[str, Any]]:
    """What `compare` gives of a target, of the numbers of all targets together (`several.together`): the mean of the
    headlines of those that both runs have, their own as `<target>.<metric>`, macro and micro. Raises StoreError."""
    sides = of_targets([one, two])
    (first, patients, strata, clusters), (second, *_) = (several.together(side) for side in sides)

    def difference(weights: np.ndarray) -> dict[str, np.ndarray]:
        mine, theirs = first(weights), second(weights)
        return {k: theirs[k] - mine[k] for k in mine}

    point, drawn = resampling.bootstrap(difference, len(patients), config.bootstrap, strata, clusters=clusters)
    return {k: resampling.verdict(v, drawn[k], config.confidence) for k, v in point.items()}


def tell(one: View, two: View, config: ScoreConfig, out: Console) -> None:
    """The comparison as a table, with what each run's trainings chose and what is to be known of them."""
    found = compare(one, two, config)
    told = [scored(run) for run in (one, two)]
    task = told[0][0].task.value
    measure, horizons = measures.of(task), told[0][0].horizons or _horizons(one)
    labels = {k: f"{k} (sign turned)" if k in measure.less_is_better else measure.label(k, horizons) for k in found}
    out.print(_table((one.name, two.name), {labels[k]: v for k, v in found.items()}, config, told[0][0].drawn))
    for run, (summary, rows) in zip((one, two), told, strict=True):
        trainings, seeds = len({place(r) for r in rows}), len({r["seed"] for r in rows})
        out.print(escape(f"{run.name}: {trainings} trainings, {seeds} seed(s)"))
        for line in [
            *choices.lines(summary.choices or _counted(summary)),
            *numbers.one_class([r for r in rows if r.get("decision") != operating_point.UNDECIDED]),
        ]:
            out.print(escape(f"{run.name}: {line}"))


def tell_together(one: Path, two: Path, config: ScoreConfig, out: Console) -> None:
    """`compare_together` as a table, of those numbers that no target's own table has."""
    found = compare_together(one, two, config)
    whole = {k: v for k, v in found.items() if "." not in k}  # `<target>.<metric>` is in the target's own
    names = f"{one.name}, all targets", f"{two.name}, all targets"
    out.print(_table(names, whole, config, Metrics.read(one).drawn))


def _table(names: tuple[str, str], found: Mapping[str, Mapping[str, Any]], config: ScoreConfig, drawn: str) -> Table:
    """drawn: see `Metrics`."""
    one, two = names
    table = Table(title=f"{two} minus {one}: same patients, paired bootstrap, patients drawn {drawn}")
    for column in ("metric", f"difference, {100 * config.confidence:.0f} % interval", "p", "so"):
        table.add_column(column)
    for label, verdict in found.items():
        d = verdict["difference"]
        said = f"{two} is {verdict['verdict']}" if verdict["verdict"] != "no difference" else "no difference"
        if np.isfinite(d.value):
            table.add_row(label, f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]", f"{verdict['p']:.3f}", escape(said))
        else:
            table.add_row(label, "undefined", "", "")
    return table


def scored(view: View) -> tuple[Metrics, list[Row]]:
    """A view's metrics.json and predictions.csv."""
    Present(view.run).check()
    try:
        found, rows = Metrics.read(view.folder), estimand.read(view.folder / training.PREDICTIONS)
    except FileNotFoundError as error:
        raise StoreError(f"{view.name} is not scored; run `pipeline score --name {view.run.name}` first") from error
    if found.targets is not None:
        raise StoreError(f"{view.name} has several targets: name one with --target: {', '.join(found.targets)}")
    return found, rows


def order(row: Row) -> tuple[Any, ...]:
    """The same order in every run, so that one weight is of one patient."""
    return row["repeat"], row["fold"], bag_of(row), row["seed"]


def _horizons(view: View) -> list[float]:
    """Of a run that was scored by version 0.1, out of its cards."""
    cards = [bundle.card_of(p.parent) for p in sorted(view.run.glob(f"**/{CARD}"))]
    return numbers.mean_horizons(cards)


def _counted(summary: Metrics) -> choices.Choices:
    """The choices of a run that was scored by version 0.1, as far as its metrics.json tells them."""
    by = [choices.why_fallen(f.fallback) for f in summary.per_fold if f.fallback]
    n = len(summary.per_fold)
    return choices.Choices(
        trainings=n,
        watched=n if by else 0,
        taught=n if by else 0,
        alarm=by.count(kept.ALARM),
        validation=by.count(kept.VALIDATION),
    )
