"""How features were made, told by their own records: never by the settings of the command that happens to read them.

In: feature stores, or a trained run. Out: `made`, the settings of tiling and extraction under the names that
fingerprints use (`tile.mpp`, `extract.encoder`, `encoder.weights_id` ...), and the `Config` that makes new slides in
exactly the same way. Imported features tell little, and then nothing is made up.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from mhim.configs import load
from mhim.configs.schema import Config, ExtractConfig, Settings, TileConfig, marked
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.store import layout, reading, seals
from mhim.pipeline.store.attributes import settings_of

TILING = "tiling"  # attribute of a feature store: the settings of the tiles that it was made from
OF_THE_SLIDES = ("mpp_of_slides", "assume_mpp_from_power", "overlay")  # about the slides at hand, not about the model
_SECTIONS: dict[str, type[Settings]] = {"tile": TileConfig, "extract": ExtractConfig}

Made = dict[str, Any]


def tiling_of(tiles: Mapping[str, Any], path: Path) -> Made:
    """The settings in the attributes of the tile store at `path`, for the features that are made from it. Raises
    StoreError."""
    return {k: v for k, v in settings_of(tiles, path).items() if k.startswith("tile.")}


def of_features(slide: str, path: Path, features: Path) -> Made:
    """The record of one feature store in the folder `features`. Raises StoreError."""
    attrs = reading.read_attrs(path)
    settings = settings_of(attrs, path)
    made = {k: v for k, v in settings.items() if k.startswith(("extract.", "encoder."))}
    tiling = attrs.get(TILING)
    if tiling is not None and not isinstance(tiling, dict):
        raise layout.StoreError(f"{path}: its attribute `{TILING}` is no mapping; extract or copy it again")
    if tiling is None and "input.tiles" in settings:
        # made by version 0.1: its tiles tell, if they are still those that were read
        tiles = layout.Work(features.parent.parent).tile_store(slide)
        found = seals.look(tiles)  # damaged or not there: unknown
        sure = found is not None and not found.wrong and found.fingerprint == settings["input.tiles"]
        tiling = tiling_of(found.attrs, tiles) if found is not None and sure else {}
    return made | (tiling or {})


def shared(records: Mapping[str, Made]) -> tuple[Made, list[str]]:
    """What all slides have in common, and a line on each setting in which slides differ. records: slide -> its own."""
    names = list(dict.fromkeys(name for made in records.values() for name in made))
    common: Made = {}
    lines = []
    for name in names:
        values = Counter(json.dumps(m[name], sort_keys=True) if name in m else "unknown" for m in records.values())
        if len(values) == 1:
            common[name] = next(iter(records.values()))[name]
        else:
            told = ", ".join(f"{value} ({n} slides)" for value, n in values.most_common(4))
            lines.append(f"the slides were made with several settings: {name} is {told}")
    return common, lines


def sections(made: Made) -> dict[str, dict[str, Any]]:
    """`made` as the sections of a settings file, without what is no setting (hashes of weights, pooling ...)."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in made.items():
        section, _, key = name.partition(".")
        if section in _SECTIONS and key in _SECTIONS[section].model_fields:
            found.setdefault(section, {})[key] = value
    return found


def settings_for_new_slides(mine: Config, made: Made, run: str) -> tuple[Config, list[str]]:
    """The settings that make new slides as those of `run` were made, and a line on each setting given now that is
    therefore not used. mine: this command's; what affects speed, or describes the slides at hand, is taken from it.

    Raises ConfigError where the record holds what is no setting's value."""
    raw = mine.model_dump()
    unused = []
    for section, wanted in sections(made).items():
        own = marked(_SECTIONS[section], "speed") | (set(OF_THE_SLIDES) if section == "tile" else set())
        given = getattr(mine, section)
        for key, value in wanted.items():
            if key in own:
                continue
            if key == "segmenter_params":  # weights are recorded by their hash; where they lie is told now
                value = {k: v for k, v in value.items() if k != "sha256"} | given.segmenter_params
            elif key in given.model_fields_set and given.model_dump(mode="json")[key] != value:
                now = given.model_dump(mode="json")[key]
                unused.append(
                    f"{section}.{key}={now!r} is not used: the slides of {run} were made with {value!r}, and "
                    "new ones are made as they were"
                )
            raw[section][key] = value
    if (precision := made.get("encoder.precision")) in get_args(ExtractConfig.model_fields["precision"].annotation):
        raw["extract"]["precision"] = precision  # what `auto` was there, whatever it would become here
    return load.validate(raw), unused


def demand_same(made: Made, now: Mapping[str, Any], run: str) -> None:
    """Raise CohortError naming the settings in which slides made with `now` would differ from those of `run`."""
    wrong = [f"{name} was {made[name]!r}, would be {now[name]!r}" for name in _unlike(made, now)]
    if wrong:
        raise CohortError(
            f"new slides cannot be made as those of {run} were: {'; '.join(wrong)}. Give the "
            "weights and plug-ins that the run was made with"
        )


def differences(made: Made, others: Made, run: str) -> list[str]:
    """A line on each setting in which given features were made otherwise than those of `run`, where both are known."""
    return [
        f"these features were made with {name} {others[name]!r}, those of {run} with {made[name]!r}"
        for name in _unlike(made, others)
    ]


def _unlike(made: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """The settings that both records tell and that differ, in order. Not those about the slides at hand; of the
    precision what it became, not what was asked for; and of two segmenters no parameters, which are each one's own."""
    ignored = {f"tile.{k}" for k in OF_THE_SLIDES} | {"extract.precision"}
    if made.get("tile.segmenter") != others.get("tile.segmenter"):
        ignored |= {"tile.segmenter_params", "tile.segmenter_defaults"}
    return sorted(
        name
        for name in made.keys() & others.keys() - ignored
        if json.dumps(made[name], sort_keys=True) != json.dumps(others[name], sort_keys=True)
    )


def of_run(recorded: Made | None, facts: Mapping[str, Any], config: Mapping[str, Any]) -> Made:
    """The record of a trained run: its models' own (`made` in `model.json`); of runs of version 0.1, which kept none,
    the settings beside them (`config.yaml`), corrected by what the models tell of their features (`facts`)."""
    if recorded is not None:
        return dict(recorded)
    made = {f"{s}.{k}": v for s in _SECTIONS for k, v in (config.get(s) or {}).items()}
    if facts.get("mpp") and facts["mpp"] not in (made.get("tile.mpp") or [])[:1]:
        made["tile.mpp"] = [facts["mpp"]]
    if facts.get("tile_px"):
        made["tile.tile_px"] = facts["tile_px"]
    return made | {"extract.encoder": facts.get("encoder", made.get("extract.encoder"))}
