"""The file of pretrained weights that a training starts from: read, checked against the features, told.

In: the settings of a training. Out: its input for the fingerprint; a filled model and what the card says of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhim.configs import lookup
from mhim.configs.errors import UserError
from mhim.configs.schema import TrainConfig
from mhim.extract import weights
from mhim.mil import pretrained
from mhim.mil.train import seeded


class PretrainedRefused(UserError, ValueError):
    """The weights cannot be what this training starts from; the message says why and what to do."""


def wanted(config: TrainConfig) -> bool:
    """Whether this training starts from the file: a teacher hands on to its student what it started from."""
    return bool(config.pretrained) and config.model != "mhim"


def inputs(config: TrainConfig) -> dict[str, Any]:
    """What a training's fingerprint holds of the file. Raises PretrainedRefused."""
    if not wanted(config):
        return {}
    path = Path(config.pretrained).expanduser()
    if not path.is_file():
        raise PretrainedRefused(f"train.pretrained: there is no file {path}")
    return {"pretrained": weights.sha256(path)}


def check(config: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Raise what `begin` would raise, before any training: a model is filled once, and thrown away."""
    if not wanted(config):
        return
    module = lookup.find("mhim.mil.models", config.model)
    with seeded(0):
        model = module.build(int(facts["dim"]), 1, lookup.params(module, config.model_params))
    begin(model, config, facts)


def begin(
    model: Any, config: TrainConfig, facts: Mapping[str, Any], planned: str | None = None
) -> dict[str, Any] | None:
    """Fill a fresh model and return the card's record, or None without such a file. Raises PretrainedRefused, and
    NotReference for weights of another layout or width.

    planned: the SHA-256 that the training's fingerprint has of the file, which must still be it."""
    if not wanted(config):
        return None
    own = facts.get("encoder")
    if not config.pretrained_encoder:
        raise PretrainedRefused(
            "train.pretrained_encoder is empty: name the encoder that the weights were trained on "
            f"(the features are of {own}); a fitting width proves nothing"
        )
    if config.pretrained_encoder != own:
        raise PretrainedRefused(
            f"the pretrained weights are of {config.pretrained_encoder} (train.pretrained_encoder), "
            f"the features of {own}: "
            "their numbers mean nothing to each other; extract with that encoder, or leave train.pretrained empty"
        )
    path, found = Path(config.pretrained).expanduser(), inputs(config)
    if planned not in (None, found["pretrained"]):
        raise PretrainedRefused(
            f"train.pretrained: {path} is another file than when this training was planned: run the same command again"
        )
    try:
        state = weights.load_state(path)
    except weights.WeightsError as error:
        raise PretrainedRefused(f"train.pretrained: {error}") from error
    return {**found, "encoder": own, "loaded": list(pretrained.start(model, state))}
