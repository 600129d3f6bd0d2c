"""What decides a result, field by field, from the resolved settings and plug-ins: the one place that builds it.

In: settings. Out: flat mappings of plain values, `section.field` -> value, that go into the fingerprints of the stages.
Everything is in by default: each setting that the schema does not mark as `speed`, the settings of a plug-in with its
defaults written out, the hash of code that does not ship, and what `auto` became. Also the one rule by which outputs of
version 0.1 are judged, whose records lack the fields that came later (`implied`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mhim.configs import lookup, texts
from mhim.configs.schema import ExtractConfig, Settings, TileConfig, TrainConfig, before, fingerprint_fields
from mhim.pipeline.store import layout, seals

# overlay: a picture beside the output, made when it is missing. regions_frame: an input of slides with regions only
ELSEWHERE = {"tile": ("overlay", "regions_frame")}


def flat(section: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Settings named as in the configuration file: `section.field`."""
    return {f"{section}.{k}": v for k, v in fields.items()}


def _of(section: str, settings: Settings) -> dict[str, Any]:
    return flat(section, {k: v for k, v in fingerprint_fields(settings).items() if k not in ELSEWHERE.get(section, ())})


def tile(config: TileConfig) -> dict[str, Any]:
    """Of a tiling. Raises LookupFailed or WeightsError where a segmenter or its weights are nowhere."""
    fields = _of("tile", config)
    for role, name, raw in (
        ("segmenter", config.segmenter, config.segmenter_params), ("fallback", config.fallback_segmenter, {}),
    ):  # fmt: skip
        if not name:
            continue
        module = lookup.find("mhim.extract.tissue", name)
        params = lookup.params(module, raw)
        # weights count by their hash, not by where they lie; a fallback without weights says so when it is used
        known = hasattr(module, "identity") and (role == "segmenter" or not getattr(module, "NEEDS_WEIGHTS", False))
        whole = dict(module.identity(params)) if known else params.model_dump(mode="json")
        if role == "segmenter" and raw and known:
            fields["tile.segmenter_params"] = whole
        fields[f"tile.{role}_defaults"] = whole
        fields |= _code(f"tile.{role}_code", "mhim.extract.tissue", name)
    return fields


def extract(config: ExtractConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """Of an extraction. identity: as `mhim.extract.encoders.identity` gives it, which holds what `auto` became."""
    return _of("extract", config) | flat("encoder", identity)


def own_settings(config: TrainConfig) -> dict[str, Any]:
    """Settings of one training: without those that only say which trainings there are. A cell of a grid or a teacher
    thus equals, byte by byte, the same training made alone."""
    plan = {"grid", "seeds", "repeats", "seed"}
    found = {k: v for k, v in fingerprint_fields(config).items() if k not in plan}
    once = before(getattr(lookup.find("mhim.mil.models", config.model), "Params", lookup.NoParams))
    params = {k: v for k, v in found["model_params"].items() if k not in once or v != once[k]}
    return found | {"model_params": params}


# settings that `training.targets` makes the task of
_OF_TASK = ("task", "classes", "levels", "ordinal", "regression_loss", "survival_loss", "survival_bins", "balance")


def of_task(config: TrainConfig) -> dict[str, Any]:
    """What decides the outcome that a table is fitted on."""
    fields = fingerprint_fields(config)
    return {k: fields[k] for k in _OF_TASK if k in fields}


_NOT_OF_JOINT = ("model", "model_params", "fallback", "attention_entropy", "pretrained_encoder")


def of_joint(config: TrainConfig) -> dict[str, Any]:
    """Settings of a network that reads bag and tables: those of the training, without the slide model's, and its own
    with its defaults written out. Raises LookupFailed for a setting that it does not have."""
    params = lookup.params(lookup.find("mhim.mil.fusion", config.fusion), config.fusion_params)
    fields = {k: v for k, v in own_settings(config).items() if k not in _NOT_OF_JOINT}
    return fields | {"fusion_params": params.model_dump(mode="json")}


def of_fusion(config: TrainConfig) -> dict[str, Any]:
    """How modalities are fused; the inner folds are inputs, the groups those of each table."""
    return {"fusion": config.fusion}


def training(config: TrainConfig) -> dict[str, Any]:
    """Of one training, its model's settings written out; without what only says which trainings there are."""
    fields = flat("train", own_settings(config)) | _code("train.model_code", "mhim.mil.models", config.model)
    student = config.model_params.get("student")
    return fields | (_code("train.student_code", "mhim.mil.models", student) if isinstance(student, str) else {})


def _code(field: str, package: str, name: str) -> dict[str, Any]:
    """The hash of a user's own plug-in; nothing for one that ships."""
    code = lookup.code_of(package, name)
    return {} if code is None else {field: code}


# ------------------------------------------------------------------------------------- outputs of version 0.1


def _as_stored(value: Any, seal: dict[str, Any], output: Path) -> bool:
    # `own` is that of an encoder that `extract.precision` says nothing to; its card called it float32
    return bool(value == "own" or seal.get("precision", value) == value)


def _as_in_the_card(value: Any, seal: dict[str, Any], output: Path) -> bool:
    try:
        card = texts.read_json(seals.read_small(output / layout.CARD), str(output))
        return list(card["task"]["classes"]) == list(value)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _as_linked(value: Any, seal: dict[str, Any], output: Path) -> bool:
    # the default was corn at first, so that a record without it says nothing; the model's own card does
    try:
        task = texts.read_json(seals.read_small(output / layout.CARD), str(output))["task"]
        every = [task, *task.get("targets", {}).values()]
        return {one["link"] for one in every if one["kind"] == "ordinal"} == {value}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _always(value: Any, seal: dict[str, Any], output: Path) -> bool:
    return True


# field -> whether an output that does not record it was made with this value. What is not listed is not known of an
# output that lacks it, such as the code of an own segmenter: it is refused, and named "not recorded".
_IMPLIED: dict[str, Callable[[Any, dict[str, Any], Path], bool]] = {
    "tile.segmenter_defaults": _always,  # the shipped defaults are those of 0.1; an own segmenter's come with its code
    "tile.fallback_defaults": _always,
    "encoder.precision": _as_stored,  # it was stored with the features, beside their fingerprint
    "input.features.pooling": _always,  # the features themselves are in the fingerprint
    "input.features.transform": _always,
    "input.features.encoder_name": _always,
    "input.classes": _as_in_the_card,
    "input.ordinal": _as_linked,
    "train.ordinal": _as_linked,
}


def implied(field: str, value: Any, seal: dict[str, Any], output: Path) -> bool:
    """Whether an output at `output` whose record `seal` lacks `field` was made with `value` of it."""
    rule = _IMPLIED.get(field)
    return rule is not None and rule(value, seal, output)


def as_once_called(field: str, value: Any, old: Any, fields: dict[str, Any]) -> Any:
    """`old` where it is another name of the same as `value`: version 0.1 called a user's own encoder as that calls
    itself; and what `train.task=auto` took for classes once, as three numbers, has to be called classification now."""
    same = field == "input.features.encoder" and old is not None and old == fields.get("input.features.encoder_name")
    classes = field == "train.task" and (value, old) == ("classification", "auto") and "input.classes" in fields
    return old if same or classes else value
