"""The file of pretrained weights that a training starts from: read, checked against the features, told.

In: the settings of a training. Out: its input for the fingerprint; a filled model and what the card says of it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mhim.configs.errors import UserError
from mhim.configs.schema import TrainConfig
from mhim.mil import pretrained
from mhim.pipeline.store import layout

# What torch's and safetensors' readers say of a file that is something else.
UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OSError,
)


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
    return {"pretrained": layout.sha256(path)}


def begin(model: Any, config: TrainConfig, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fill a fresh model and return the card's record, or None without such a file. Raises PretrainedRefused, and
    NotReference for weights of another layout or width."""
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
    path = Path(config.pretrained).expanduser()
    names = pretrained.start(model, _tensors(path))
    return {**inputs(config), "encoder": own, "loaded": list(names)}


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, no code of it run. Raises PretrainedRefused."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise PretrainedRefused(f"train.pretrained: {path} cannot be read as weights: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise PretrainedRefused(f"train.pretrained: {path} holds something else than tensors by name")
    return found
