"""The methods paragraph of a run, with its numbers, as an author can paste it; and what the frozen decision came to.

In: a run's metrics, its settings and the versions that made it. Out: plain text. It says nothing that is not recorded:
what an older run did not write down is left out of the sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhim.pipeline.results import numbers
from mhim.pipeline.results.metrics_file import Metrics


def frozen(found: Metrics) -> list[tuple[str, str]]:
    """(what, value) of the decisions at the thresholds that were frozen before the held-out patients were seen; none
    where there are no such decisions."""
    told = found.decisions
    if told is None:
        return []
    named = (("sensitivity", told.sensitivity), ("specificity", told.specificity))
    made = [(f"{name}, frozen threshold", f"{rate:.3f}") for name, rate in named if rate is not None]
    return [*made, ("undecided", f"{100 * told.undecided:.0f} %")] if told.undecided else made


def paragraph(found: Metrics, config: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """config: the run's config.yaml, {} where it has none. versions: program -> version, of its first training."""
    tile, train, score = (dict(config.get(k) or {}) for k in ("tile", "train", "score"))
    said = [_tiles(found, tile), _features(found), _training(found, train), _patients(found)]
    if found.decision_rule is not None:
        said.append(f"Decisions were made by {found.decision_rule}.")
    said += [_result(found, score), _programs(versions)]
    return " ".join(s for s in said if s)


def _tiles(found: Metrics, tile: Mapping[str, Any]) -> str:
    facts = found.features
    if not facts.mpp or not facts.tile_px:
        return ""
    text = (
        f"Whole-slide images were cut into square tiles of {facts.tile_px} px at {facts.mpp:g} µm per px "
        f"({facts.mpp * facts.tile_px:g} µm)"
    )
    if "min_tissue" in tile and "segmenter" in tile:
        text += (
            f", kept where at least {100 * float(tile['min_tissue']):g} % was tissue (segmenter {tile['segmenter']})"
        )
    return text + "."


def _features(found: Metrics) -> str:
    facts = found.features
    return f"Each tile was encoded by {facts.encoder} (weights {facts.weights_id}; {facts.dim} values)."


def _training(found: Metrics, train: Mapping[str, Any]) -> str:
    seeds = f", {found.seeds} seeds each" if found.seeds > 1 else ""
    repeats = f", repeated {train['repeats']} times" if int(train.get("repeats") or 1) > 1 else ""
    text = (
        f"{found.model} was trained on the tiles of each patient by {found.folds}-fold cross-validation over patients"
    )
    text += repeats + seeds
    if {"epochs", "optimizer", "lr", "weight_decay"} <= train.keys():
        text += (
            f" ({train['optimizer']}, {train['epochs']} epochs, learning rate {float(train['lr']):g}, weight decay "
            f"{float(train['weight_decay']):g})"
        )
    if "val_fraction" in train:
        text += f"; {100 * float(train['val_fraction']):g} % of the patients not held out served for validation"
    honest = " Nothing was chosen on held-out patients." if found.protocol == "honest" else ""
    splits = found.split_hash if isinstance(found.split_hash, str) else ", ".join(found.split_hash)
    return f"{text} (split {splits}).{honest}"


def _patients(found: Metrics) -> str:
    counts = found.class_patients or {}
    classes = f" ({', '.join(f'{c}: {n}' for c, n in sorted(counts.items()))})" if counts else ""
    return f"There were {found.patients} held-out {found.unit}s{classes}."


def _result(found: Metrics, score: Mapping[str, Any]) -> str:
    best = found.test.get(found.headline)
    if best is None:
        return ""
    level = f"{100 * found.confidence:g} %"
    text = (
        f"Held-out {found.headline.replace('_', ' ')} was {numbers.text_of(best)} ({level} interval of "
        f"{found.bootstrap} bootstrap samples over patients, drawn inside their folds)"
    )
    decided = [f"{what.partition(',')[0]} {value}" for what, value in frozen(found)]
    return f"{text}; at the frozen thresholds {', '.join(decided)}." if decided else f"{text}."


def _programs(versions: Mapping[str, str]) -> str:
    told = [f"{name} {version}" for name, version in versions.items()]
    return f"Programs: {', '.join(told)}." if told else ""


def settings(run: Path) -> dict[str, Any]:
    """The run's config.yaml; {} where it has none."""
    import yaml

    path = run / "config.yaml"
    read = yaml.safe_load(path.read_text()) if path.exists() else None
    return read if isinstance(read, dict) else {}
