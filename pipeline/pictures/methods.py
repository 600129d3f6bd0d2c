"""The methods paragraph of a run, with its numbers, as an author can paste it; and what the frozen decision came to.

In: a run's metrics and the cards of its trainings. Out: plain text. It says nothing that is not recorded:
what an older run did not write down is left out of the sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mhim.pipeline.results import numbers
from mhim.pipeline.results.metrics_file import Metrics
from mhim.pipeline.training.card import Card


def frozen(found: Metrics) -> list[tuple[str, str]]:
    """(what, value) of the decisions at the thresholds that were frozen before the held-out patients were seen; none
    where there are no such decisions."""
    told = found.decisions
    if told is None:
        return []
    named = (("sensitivity", told.sensitivity), ("specificity", told.specificity))
    made = [(f"{name}, frozen threshold", f"{rate:.3f}") for name, rate in named if rate is not None]
    return [*made, ("undecided", f"{100 * told.undecided:.0f} %")] if told.undecided else made


def paragraph(found: Metrics, cards: Sequence[Card], targets: Mapping[str, Metrics] | None = None) -> str:
    """cards: of the run's trainings. What differs between them (in a grid, say) is left out. targets: the numbers of
    each of several."""
    made, train = shared([c.made or {} for c in cards]), shared([c.train for c in cards])
    said = [_tiles(found, made), _features(found), _training(found, cards, train), _patients(found)]
    if found.decision_rule is not None:
        said.append(f"Decisions were made by {found.decision_rule}.")
    said.append(_result(found))
    for name, one in (targets or {}).items():
        said.append(f"Of {name}, {one.patients} {one.unit}s were known{_classes(one)}. {_result(one)}")
        if one.decision_rule is not None:
            said.append(f"Decisions on it were made by {one.decision_rule}.")
    said.append(_programs(versions(cards)))
    return " ".join(s for s in said if s)


def shared(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of them have with the same value."""
    return {k: v for k, v in each[0].items() if all(k in one and one[k] == v for one in each)}


def versions(cards: Sequence[Card]) -> dict[str, str]:
    """Program -> version that made the trainings; `2.0 and 2.1` where some were made by one, some by the other."""
    names = dict.fromkeys(name for c in cards for name in c.versions)
    return {n: " and ".join(sorted({c.versions[n] for c in cards if n in c.versions})) for n in names}


def _tiles(found: Metrics, made: Mapping[str, Any]) -> str:
    facts = found.features
    if not facts.mpp or not facts.tile_px:
        return ""
    text = (
        f"Whole-slide images were cut into square tiles of {facts.tile_px} px at {facts.mpp:g} µm per px "
        f"({facts.mpp * facts.tile_px:g} µm)"
    )
    if "tile.min_tissue" in made and "tile.segmenter" in made:
        text += (
            f", kept where at least {100 * float(made['tile.min_tissue']):g} % was tissue (segmenter "
            f"{made['tile.segmenter']})"
        )
    return text + "."


def _features(found: Metrics) -> str:
    facts = found.features
    return f"Each tile was encoded by {facts.encoder} (weights {facts.weights_id}; {facts.dim} values)."


def _training(found: Metrics, cards: Sequence[Card], train: Mapping[str, Any]) -> str:
    repeats = len({one.repeat for one in found.per_fold})
    folds = max((one.fold for one in found.per_fold), default=0) + 1
    how = f"{folds}-fold cross-validation over patients" if folds > 1 else "one split of the patients"
    how += ", each site wholly in one fold" if train.get("split_by") == "site" else ""
    how += f", repeated {repeats} times" if repeats > 1 else ""
    how += f", {found.seeds} seeds each" if found.seeds > 1 else ""
    each = "patient" if found.slides is None else "slide, all slides of a patient on one side of every split,"
    text = f"{found.model} was trained on the tiles of each {each} by {how}"
    if {"epochs", "optimizer", "lr", "weight_decay"} <= train.keys():
        text += (
            f" ({train['optimizer']}, at most {train['epochs']} epochs, learning rate {float(train['lr']):g}, weight "
            f"decay {float(train['weight_decay']):g})"
        )
    bags = "patients" if found.slides is None else "slides"
    inner = [c.split.val / max(1, c.split.val + c.split.train) for c in cards]
    if found.protocol == "honest" and any(inner):
        text += f"; {100 * sum(inner) / len(inner):.0f} % of the {bags} not held out served for validation"
    honest = " Nothing was chosen on held-out patients." if found.protocol == "honest" else ""
    splits = found.split_hash if isinstance(found.split_hash, str) else ", ".join(found.split_hash)
    return f"{text} (split {splits}).{honest}{_instead(cards)}"


def _instead(cards: Sequence[Card]) -> str:
    """Where the answers are not of the model alone that was asked for."""
    fallen = [c for c in cards if c.fallback]
    text = f" In {len(fallen)} of {len(cards)} trainings {fallen[0].model} took over." if fallen else ""
    weighed = next((c.choice for c in cards if c.choice), None)
    if weighed is not None:
        text += (
            f" {cards[0].asked} was kept where it was better than its plain model by more than {weighed.margin:g} "
            "paired standard errors on patients that neither was trained on, none of them held out."
        )
    forms = Counter(c.form.kept for c in cards if c.form and not c.fallback)
    if forms:
        each = ", ".join(f"{name} in {n}" for name, n in sorted(forms.items()))
        text += (
            " Of its forms of masking the first was kept whose student fitted its training patients: "
            f"{each} of {len(cards)} trainings."
        )
    fusion = cards[0].fusion
    if fusion is None:
        return text
    return f"{text} The answers of {', '.join(fusion.modalities)} were combined ({fusion.kind} fusion)."


def _patients(found: Metrics) -> str:
    return f"There were {found.of_whom}{_classes(found)}."


def _classes(found: Metrics) -> str:
    counts = found.class_patients or {}
    return f" ({', '.join(f'{c}: {n}' for c, n in sorted(counts.items()))})" if counts else ""


def _result(found: Metrics) -> str:
    best = found.test.get(found.headline)
    if best is None:
        return ""
    level = f"{100 * found.confidence:g} %"
    text = f"Held-out {found.headline.replace('_', ' ')} was {numbers.text_of(best)}"
    if best.low is not None:
        text += f" ({level} interval of {found.bootstrap} bootstrap samples over patients, drawn {found.drawn})"
    decided = [f"{what.partition(',')[0]} {value}" for what, value in frozen(found)]
    return f"{text}; at the frozen thresholds {', '.join(decided)}." if decided else f"{text}."


def _programs(versions: Mapping[str, str]) -> str:
    told = [f"{name} {version}" for name, version in versions.items()]
    return f"Programs: {', '.join(told)}." if told else ""
