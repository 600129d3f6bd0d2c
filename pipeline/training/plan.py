"""Which trainings a run consists of: grid cells x seeds x folds, each MHIM training with its baseline.

In: the train settings and the folds. Out: jobs, the run's `config.yaml` and `splits.csv`, and which cell validation
prefers. Plain arithmetic over settings; knows no features and no models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from mhim.configs.load import ConfigError
from mhim.configs.lookup import explain
from mhim.configs.schema import Config, TrainConfig, fingerprint_fields, marked
from mhim.mil import splits
from mhim.mil.splits import Fold
from mhim.pipeline.cohort import provenance
from mhim.pipeline.store import layout, tables, writing
from mhim.pipeline.training import draws
from mhim.pipeline.training.card import Card
from mhim.pipeline.training.fold import Job, baseline_config, whole_params

TEACHER = "teacher"
LABELS = "labels.yaml"
CHOICE = ("choice", "choice_margin", "choice_patients", "choice_folds")


def cells(config: TrainConfig) -> dict[str, TrainConfig]:
    """Folder -> settings of every grid cell; without a grid, one cell in the run's own folder (""). Raises
    ConfigError for a value that its setting does not take, and for two cells whose folders would have one name."""
    if not config.grid:
        return {"": whole_params(config)}
    found: dict[str, TrainConfig] = {}
    for values in itertools.product(*config.grid.values()):
        chosen = dict(zip(config.grid, values, strict=True))
        own = {k: v for k, v in chosen.items() if k in TrainConfig.model_fields}
        params = {k: v for k, v in chosen.items() if k not in own}
        raw = config.model_dump() | own
        raw["model_params"] = dict(raw["model_params"]) | params
        label = "_".join(f"{k}-{v}" for k, v in chosen.items())
        try:
            cell = TrainConfig.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(f"settings: train.grid, {label}: {explain(error)}") from error
        place, whole = "grid/" + "".join(c if c.isalnum() or c in "-_." else "-" for c in label), whole_params(cell)
        if found.get(place, whole) != whole:
            raise ConfigError(f"settings: train.grid: two cells would share the folder {place}; write other values")
        found[place] = whole
    return found


def jobs(config: TrainConfig, folds: Sequence[Fold]) -> list[Job]:
    """Every training of the run, folds of one seed together. Cells that share a baseline share its jobs."""
    split_hash = splits.digest(folds)
    if config.draws:
        return draws.jobs(config, folds, split_hash)
    base = config.model_copy(update={"grid": {}})
    made: list[Job] = []
    teacher_cells: dict[str, str] = {}
    for cell, settings in cells(config).items():
        plain = baseline_config(settings)
        for seed, fold in itertools.product(range(config.seed, config.seed + config.seeds), folds):
            teacher = None
            if plain is not None:
                whole = whole_params(base.model_copy(update={"model": plain.model, "model_params": plain.model_params}))
                key = layout.fingerprint(whole.model_dump(mode="json"))
                where = teacher_cells.setdefault(
                    key, TEACHER + (f"/{whole.model}_{len(teacher_cells)}" if len(teacher_cells) else "")
                )
                teacher = Job(whole, fold, seed, split_hash, cell=where)
            made.append(Job(settings, fold, seed, split_hash, teacher, cell))
    return made


def describe(
    run: Path, config: Config, folds: Sequence[Fold], made: provenance.Made, owner: Mapping[str, str] | None = None
) -> None:
    """Write the run's `config.yaml` (settings that decide results, ready for --config), `splits.csv`, and
    `labels.yaml` (which columns of the table were read, for --config with that table).

    made: how the features were made, as they tell themselves; of imported ones little or nothing is known. owner: slide
    -> patient, where each slide is a bag."""
    aside = config.train.model_dump(mode="json", include=set(marked(TrainConfig, "apart")) - {"draws", *CHOICE})
    aside = {} if config.train.fusion == "none" else {k: v for k, v in aside.items() if k != "fusion_params" or v}
    aside |= {"draws": config.train.draws} if config.train.draws else {}
    if config.train.choice != "point" or "choice" in config.train.grid:
        aside |= config.train.model_dump(mode="json", include={*CHOICE})
    sections = {**provenance.sections(made), "train": fingerprint_fields(config.train) | aside}
    sections.setdefault("extract", {"encoder": config.extract.encoder})  # where the features lie
    digest = splits.digest(folds)
    rows = [{**row, "split_hash": digest} for row in splits.rows(folds, owner)]
    read = yaml.safe_dump({"labels": fingerprint_fields(config.labels)}, sort_keys=False)
    texts = {
        "config.yaml": yaml.safe_dump(sections, sort_keys=False),
        "splits.csv": tables.of_mappings(rows),
        LABELS: read,
    }
    for name, text in texts.items():
        writing.write_if_other(run / name, text)


def choose(cards: Mapping[str, Sequence[Card]], headline: str) -> dict[tuple[int, int], str]:
    """(repeat, fold) -> the cell with the best mean validation metric over the seeds of that fold.

    Chosen fold by fold, because a patient tested in one fold validates in another: a choice over all folds would have
    seen it. cards: cell -> the cards of its trainings. Undefined metrics count as the worst.
    """
    found: dict[tuple[int, int], list[tuple[float, str]]] = {}
    for cell, trained in cards.items():
        values: dict[tuple[int, int], list[float]] = {}
        for card in trained:
            value = card.validation.get(headline)
            fold = card.place[:2]
            values.setdefault(fold, []).append(-math.inf if value is None else value)
        for fold, each in values.items():
            found.setdefault(fold, []).append((sum(each) / len(each), cell))
    # the first cell wins a tie, so the order of the grid is an order of preference
    return {fold: max(options, key=lambda o: o[0])[1] for fold, options in sorted(found.items())}
