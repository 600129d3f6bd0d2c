"""Every model on one set: trained and scored on the same splits, and set side by side as one table.

In: features, labels and the settings `train` and `benchmark`. Out: one ordinary run per model (so a killed benchmark
goes on where it stopped, and each run can be looked at, compared and scored by itself), and beside them the table as
`<name>.md` and `<name>.csv`: mean ± sd over folds and seeds, the value inside trainings with interval, for a model that
was taught by a plain one the paired difference to it, and what was chosen how often. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mhim.configs import load, lookup
from mhim.configs.load import ConfigError
from mhim.configs.schema import Config, TrainConfig, before
from mhim.pipeline.cohort import patients
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.results import compare, estimand, measures, numbers, predictions, standings, views
from mhim.pipeline.results.metrics_file import Metrics
from mhim.pipeline.resume import console
from mhim.pipeline.resume.stage import Plan
from mhim.pipeline.stages import runs, verbs
from mhim.pipeline.stages import session as session_
from mhim.pipeline.stages.session import Session
from mhim.pipeline.stages.train import Train
from mhim.pipeline.store import layout, tables, writing
from mhim.pipeline.training import choices, fold, kept

Line = dict[str, Any]
WIDEST = 1000  # characters of a table before it is folded


def rows(config: Config, picked: Sequence[str] = ()) -> dict[str, TrainConfig]:
    """Name -> settings of every model of the table, or of the `picked` ones, which may also be files of mil/models.

    Raises ConfigError for a name that is neither, and for a setting that no model has."""
    known = config.benchmark.models
    unknown = sorted(set(picked) - known.keys() - set(lookup.names("mhim.mil.models")))
    if unknown:
        raise ConfigError(f"--models {unknown[0]}: there is {', '.join(known)} (or add it to benchmark.models)")
    every = {name: _row(name, dict(known.get(name, {})), config) for name in dict.fromkeys([*known, *picked])}
    made = {name: every[name] for name in picked or known}
    used = {k for _, taken in every.values() for k in taken} & config.benchmark.params.keys()
    used |= {k for settings, _ in made.values() for k in settings.grid}
    idle = sorted((config.train.grid.keys() | config.benchmark.params.keys()) - used)
    if idle:
        raise ConfigError(f"no model of this benchmark has the setting {idle[0]!r} of train.grid or benchmark.params")
    return {name: settings for name, (settings, _) in made.items()}


def _row(name: str, own: dict[str, Any], config: Config) -> tuple[TrainConfig, set[str]]:
    """The settings of one model, and which of the common parameters it has."""
    preset = load.resolve([own.pop("preset")]).train if "preset" in own else None
    model = own.pop("model", preset.model if preset else name)
    module = lookup.find("mhim.mil.models", model)
    has = module.Params.model_fields.keys()
    settings = {k: v for k, v in own.items() if k in TrainConfig.model_fields}
    if preset:
        settings = {"fallback": preset.fallback} | settings
    params: dict[str, Any] = dict(preset.model_params) if preset else {}
    params |= config.train.model_params if model == config.train.model and not preset else {}
    params |= {k: v for k, v in own.items() if k not in settings}
    if "student_params" in has:  # what is common to all is of the bag encoder, which here is the student
        student = lookup.find("mhim.mil.models", params.get("student", module.Params().student))
        common = {k: v for k, v in config.benchmark.params.items() if k in student.Params.model_fields}
        params["student_params"] = dict(params.get("student_params", {})) | common
    else:
        common = {k: v for k, v in config.benchmark.params.items() if k in has}
        params |= common
    grid = {k: v for k, v in config.train.grid.items() if k in TrainConfig.model_fields or k in has}
    raw = config.train.model_dump() | settings | {"model": model, "model_params": params, "grid": grid}
    whole, once = fold.whole_params(TrainConfig.model_validate(raw)), before(module.Params)
    # what nobody set is left to the run, which may have been begun before there was such a setting
    left = {k: v for k, v in whole.model_params.items() if k not in once or k in params}
    return whole.model_copy(update={"model_params": left}), set(common)


def run(session: Session, labels: Path | None, name: str | None, picked: Sequence[str]) -> int:
    """Train every model, take its numbers, write and print the table. The worst exit code is returned.

    With a scheduler as back end the trainings are submitted; the same command makes the table when they have ended."""
    config = session.config
    wanted = rows(config, picked)
    runs.named(name, "benchmark")
    if config.train.fusion != "none" or config.train.tables:
        raise CohortError("benchmark compares models of slides alone: leave --fusion and --table away")
    found, data, config = verbs.to_train_on(session, labels)
    plans: dict[str, tuple[Session, Plan]] = {}
    for row, settings in wanted.items():
        mine = replace(session, config=config.model_copy(update={"train": settings}))
        called = f"{name}-{row}" if name else row
        stage = Train(session.work, mine.config, called, data, patients.make_folds(data, settings))
        session_.tell(stage.told())
        plans[row] = mine, mine.plan(stage)
        if not session.dry_run:
            plans[row][1].permit(session.replace)  # refused before any work
    runs_of = {row: plan.stage.root for row, (_, plan) in plans.items()}
    codes = [0]
    for row, (mine, plan) in plans.items():
        console.err.print(f"[bold]{row}[/]")
        codes.append(session_.carry_out(mine, plan, ["--labels", str(found.resolve()), "--name", runs_of[row].name]))
        submitted = session.submits and plan.keys
        if session.dry_run or submitted:
            continue
        try:
            codes.append(
                session_.run_stage(
                    replace(mine, config=_here(mine.config)), runs.numbers(session.work, mine.config, runs_of[row])
                )
            )
        except layout.StoreError as error:
            console.err.print(f"no numbers of {row}: {console.escape(str(error))}")
            codes.append(1)
    if not session.dry_run:
        lines = [_line(row, folder) for row, folder in runs_of.items()]
        _against_plain(lines, wanted, runs_of, config)
        _standing(lines, runs_of, config)
        _tell(lines, session.work.runs / (name or "benchmark"), config, wanted)
    return max(codes)


def _here(config: Config) -> Config:
    """Numbers are made in seconds, and here even where trainings are submitted."""
    here = config.cluster.model_copy(update={"backend": "local", "backend_params": {}})
    return config.model_copy(update={"cluster": here})


def _line(row: str, folder: Path) -> Line:
    """What the table says of one run."""
    try:
        found = Metrics.read(folder)
    except FileNotFoundError:
        return {"model": row, "trainings": 0}
    line: Line = {
        "model": row,
        "trainings": len(found.per_fold) or found.trainings or 0,
        "headline": found.headline,
        "patients": found.patients,
        "of_whom": found.of_whom,
        "paired": found.paired,
        "drawn": found.drawn,
        "folds": found.folds,
        "seeds": found.seeds,
        "split": found.split_hash,
        "encoder": found.features.encoder,
        "protocol": found.protocol,
        "fell_back": sum(f.fallback is not None for f in found.per_fold),
        "counted": choices.lines(found.choices),
        "one_class": [] if found.targets is not None else numbers.one_class(estimand.read(folder / fold.PREDICTIONS)),
        "rule": found.decision_rule or "",
    }
    cells = predictions.cell_table(folder)
    counted = found.choices
    told = (counted.watched, counted.alarm, counted.validation) if counted else (0, 0, 0)
    chosen: dict[str, Any] = dict(zip(("watched", kept.ALARM, kept.VALIDATION), told, strict=True))
    chosen |= {"cells": cells} if cells else {}
    if found.targets is not None:
        line["tabled"] = {name: name for name in found.test}
        for name, test in found.test.items():
            line |= {f"{name}_all": test.value, f"{name}_low": test.low, f"{name}_high": test.high}
            if (each := found.over_folds.get(name)) is not None:
                line |= {f"{name}_mean": each.mean, f"{name}_sd": each.sd}
        return line | chosen
    measure = measures.of(found.task.value)
    line["tabled"] = {name: measure.label(name, found.horizons) for name in measure.tabled if name in found.over_folds}
    for key in measure.ranking:
        if key in found.pooled:
            line[f"{key}_pooled"] = found.pooled[key].value
    for metric in measure.tabled:
        if metric in found.over_folds:
            over, test = found.over_folds[metric], found.test[metric]
            line |= {
                f"{metric}_mean": over.mean,
                f"{metric}_sd": over.sd,
                f"{metric}_all": test.value,
                f"{metric}_low": test.low,
                f"{metric}_high": test.high,
            }
    return line | chosen


def _against_plain(
    lines: Sequence[Line], wanted: Mapping[str, TrainConfig], folders: Mapping[str, Path], config: Config
) -> None:
    """Fill in how a run differs from that of the plain model it was taught by, where that is in the table."""
    done = {line["model"]: line for line in lines if line["trainings"]}
    for row, line in done.items():
        plain = fold.baseline_config(wanted[row])
        if plain is None:
            continue
        whole = fold.whole_params(plain)
        same = [r for r in done if (wanted[r].model, wanted[r].model_params) == (whole.model, whole.model_params)]
        if not same:
            continue
        each = views.of(folders[row])[0].target != ""  # several targets
        try:
            if each:
                found = compare.compare_together(folders[same[0]], folders[row], config.score)
            else:
                found = compare.compare(folders[same[0]], folders[row], config.score, line["headline"])
        except layout.StoreError:  # a fold of one of them is missing
            continue
        line |= {"plain": same[0]}
        for name, one in found.items():
            d, before = one["difference"], "" if name == line["headline"] else f"{name}_"
            line |= {
                f"{before}difference": d.value,
                f"{before}difference_low": d.low,
                f"{before}difference_high": d.high,
                f"{before}verdict": one["verdict"],
            }
        line["against"] = [
            f"{name} against {same[0]}: {told}" for name in found if each and (told := _verdict(line, f"{name}_"))
        ]


def _standing(lines: Sequence[Line], folders: Mapping[str, Path], config: Config) -> None:
    """Fill in each row's rank, and how it differs from the rows that all are held against, by the headline; nothing
    where a fold of a row is missing: then no two are of the same patients."""
    done = {line["model"]: line for line in lines if line["trainings"]}
    if len(done) < 2:
        return
    try:
        found = standings.standings({row: folders[row] for row in done}, config.score, config.benchmark.against)
    except layout.StoreError as error:
        console.err.print(f"no ranks: {console.escape(str(error))}")
        return
    for row, one in found.items():
        done[row] |= {"rank": one.rank.value, "rank_low": one.rank.low, "rank_high": one.rank.high}
        for other, said in one.against.items():
            d = said["difference"]
            whole = {"": d.value, "_low": d.low, "_high": d.high, "_verdict": said["verdict"]}
            done[row] |= {f"against_{other}{k}": v for k, v in whole.items()}


def _tell(lines: Sequence[Line], out: Path, config: Config, wanted: Mapping[str, TrainConfig]) -> None:
    """Print the table and write it as `<out>.md` and `<out>.csv`."""
    made = [line for line in lines if line["trainings"]]
    if not made:
        return
    first = made[0]
    shown = first["tabled"]
    header = [
        "model",
        *(told.replace("_", " ") for told in shown.values()),
        f"{first['headline'].replace('_', ' ')}, inside trainings",
        "against its plain model",
    ]
    held = [other for other in config.benchmark.against if any(f"against_{other}" in line for line in made)]
    header += [f"against {other}" for other in held] + (["rank"] if "rank" in first else [])
    table = [
        [
            line["model"],
            *(_pm(line, m) for m in shown),
            _whole(line, first["headline"]),
            _verdict(line),
            *(_against(line, other) for other in held),
            *([_rank(line)] if "rank" in first else []),
        ]
        for line in made
    ]
    missing = [line["model"] for line in lines if not line["trainings"]]
    notes = [
        f"{first['of_whom']}, {first['folds']} folds x {first['seeds']} seeds, features "
        f"{first['encoder']}, split {first['split']}, protocol {first['protocol']}; mean ± sd over trainings; "
        f"inside trainings: pairs of {first['paired']} the same training held out, added up over folds, mean over "
        f"seeds, {100 * config.score.confidence:.0f} % interval over patients drawn {first['drawn']}.",
        *([f"decisions: {first['rule']}"] if first["rule"] else []),
        *(["optimistic: the epoch was chosen on the test fold"] if first["protocol"] == "paper" else []),
        *(
            f"{line['model']}: {line['trainings']} trainings, where {first['model']} has {first['trainings']}"
            for line in made
            if line["trainings"] != first["trainings"]
        ),
        *(
            f"{line['model']}: {line['fell_back']} of {line['trainings']} trainings fell back to the plain model"
            for line in made
            if line["watched"]
        ),
        *(
            f"{line['model']}: {told}"
            for line in made
            for told in (*line["counted"], *line["one_class"], *line.get("against", ()))
        ),
        *(
            f"{line['model']}: grid of {', '.join(wanted[line['model']].grid)}, cell chosen on validation per fold; "
            + "; ".join(line["cells"])
            for line in made
            if "cells" in line
        ),
        *([f"not there yet: {', '.join(missing)}"] if missing else []),
    ]
    text = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    text += ["| " + " | ".join(row) + " |" for row in table] + [""] + [f"- {note}" for note in notes]
    out.parent.mkdir(parents=True, exist_ok=True)
    writing.write_atomic(out.with_name(f"{out.name}.md"), "\n".join(text) + "\n")
    flat = [
        {
            k: v
            for k, v in line.items()
            if k not in ("cells", "tabled", "counted", "one_class", "rule", "against", "of_whom", "paired", "drawn")
        }
        for line in made
    ]
    writing.write_atomic(out.with_name(f"{out.name}.csv"), tables.of_mappings(flat))
    _print(f"{out.name}: mean ± sd", header, table, len(shown))
    for note in notes:
        console.out.print(console.escape(note))
    console.out.print(f"written to {out}.md and {out}.csv")


def _print(title: str, header: list[str], rows: list[list[str]], metrics: int) -> None:
    """The table as wide as it is; on a terminal that is narrower, without the `metrics` columns after the name."""

    def made(left_out: int) -> Table:
        rich = Table(title=title)
        for column in (header[0], *header[1 + left_out :]):
            rich.add_column(column, overflow="fold")  # a number is never cut short
        for row in rows:
            rich.add_row(*(console.escape(cell) for cell in (row[0], *row[1 + left_out :])))
        return rich

    needed = console.out.measure(made(0), options=console.out.options.update(width=WIDEST)).maximum
    if not console.out.is_terminal:  # a file has no width
        Console(file=console.out.file, highlight=False, width=needed).print(made(0))
    elif needed <= console.out.width:
        console.out.print(made(0))
    else:
        console.out.print(made(metrics))


def _pm(line: Line, metric: str) -> str:
    if f"{metric}_mean" not in line and f"{metric}_all" in line:  # of several targets only the whole
        return _whole(line, metric)
    mean, sd = line.get(f"{metric}_mean"), line.get(f"{metric}_sd")
    return "undefined" if mean is None else f"{mean:.3f}" + ("" if sd is None else f" ± {sd:.3f}")


def _whole(line: Line, metric: str) -> str:
    value, low, high = (line.get(f"{metric}_{k}") for k in ("all", "low", "high"))
    return "undefined" if value is None else f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def _verdict(line: Line, before: str = "") -> str:
    """before: the beginning of the columns, of another number than the headline."""
    if f"{before}verdict" not in line:
        return ""
    d, low, high = (line[f"{before}difference{k}"] for k in ("", "_low", "_high"))
    return f"{d:+.3f} [{low:+.3f}, {high:+.3f}] {line[f'{before}verdict']}"


def _against(line: Line, other: str) -> str:
    if f"against_{other}" not in line:
        return ""
    d, low, high = (line[f"against_{other}{k}"] for k in ("", "_low", "_high"))
    return f"{d:+.3f} [{low:+.3f}, {high:+.3f}]"


def _rank(line: Line) -> str:
    return f"{line['rank']:.1f} [{line['rank_low']:.1f}, {line['rank_high']:.1f}]"
