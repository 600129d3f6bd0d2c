"""Encoders of the table and `timm:<model>`: build the network, load its weights strictly, pool its tokens.

In: the settings. Out: an `Encoder`. Every network is built without weights and filled from a local file; nothing here
downloads (`mhim.extract.weights` does, when allowed). Families beyond timm are imported only when used.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from mhim.configs import lookup, trust
from mhim.configs.schema import ExtractConfig
from mhim.extract import weights
from mhim.extract.encoders import _remap
from mhim.extract.encoders._contract import Encoder, EncoderError
from mhim.extract.encoders._table import POOLING_TEXT, Pooling, Row, rows
from mhim.extract.encoders._torch import Recipe, Runner


class Params(BaseModel):
    """Settings of an encoder of the table.

    pooling: another pooling than the table's (cls, cls_mean or mean, for vision transformers).
    trust_remote_code: run the model code that comes with the weights (needed by some transformers models).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pooling: Literal["model", "cls", "cls_mean", "mean"] | None = None
    trust_remote_code: bool = False


def build(config: ExtractConfig) -> Encoder:
    """The encoder of `config.encoder`, a row of the table or `timm:<model>`."""
    params: Params = lookup.params(sys.modules[__name__], config.encoder_params)
    if params.trust_remote_code and not trust.current().remote_code:
        raise lookup.NotTrusted(
            f"encoder {config.encoder!r}: {trust.REMOTE_CODE} runs code that comes with the weights, and no file may "
            f"ask for that. If you trust it, type it: --set extract.encoder_params.{trust.REMOTE_CODE}=true"
        )
    row = rows().get(config.encoder)
    if row is None:
        row = _row_of_timm(config.encoder.removeprefix("timm:"))
    files = row.hub_files or weights.HUB_FILES
    path = weights.locate(row.name, row.hub_id, files, config.weights, config.offline, row.wheel, row.needs)
    pooling: Pooling = params.pooling or row.pooling
    if pooling != row.pooling and not {pooling, row.pooling} <= {"model", "cls", "cls_mean", "mean"}:
        raise EncoderError(f"encoder {row.name!r} has a head of its own and cannot be pooled as {pooling!r}")
    by_its_code = params.trust_remote_code and "trust_remote_code" in row.needs
    if row.loader == "timm" and not by_its_code:
        module = network(row)
        fill(module, path, row)
    else:
        from mhim.extract.encoders import _foreign

        module = _foreign.network(row, path, params.trust_remote_code)
    dim = width(row, pooling)
    recipe = Recipe(row.input_px, row.resize_px, row.interpolation, row.mean, row.std)
    runner = Runner(module, _Pool(pooling, row.prefix_tokens), dim, recipe, row.precision, config)
    info = {
        "model": row.model,
        "hub_id": row.hub_id,
        "pooling": POOLING_TEXT[pooling],
        "transform": str(recipe),
        "precision": runner.precision,
        "licence": row.licence,
        "terms": "the licence may reach models trained on these features: read it" if row.commercial != "yes" else "",
    }
    return Encoder(
        row.name,
        runner.encode,
        dim,
        row.tile_px[0] if row.tile_px else None,
        row.mpp[0] if row.mpp else None,
        weights.sha256(path),
        info,
        runner.launch,
        runner.empty,
        runner.batch,
        lambda: runner.halvings,
        threadsafe=not (runner.cuda or config.compile),
    )


def network(row: Row) -> nn.Module:
    """The row's timm network with random weights, in evaluation mode; on torch's current default device (also meta)."""
    import timm

    kwargs = {key: _OBJECTS.get(value, value) if isinstance(value, str) else value for key, value in row.kwargs.items()}
    if kwargs.get("mlp_layer") == "SwiGLUPacked":
        from timm.layers.mlp import SwiGLUPacked

        kwargs["mlp_layer"] = SwiGLUPacked
    try:
        module: nn.Module = timm.create_model(row.arch, pretrained=False, **kwargs)
    except RuntimeError as error:
        raise EncoderError(f"timm {timm.__version__} cannot build {row.arch!r} for {row.name!r}: {error}") from error
    if row.pooling == "layer3":
        module.layer4 = nn.Identity()
    if row.pooling == "keep":
        module = _remap.KeepVision(module)
    if row.pooling == "attention":
        module = _remap.AttentionPooled(module, row.dim)
    return module.eval()


_OBJECTS: dict[str, Any] = {
    "SiLU": nn.SiLU,
    "ConvStem": _remap.ConvStem,
    "LayerNorm1e-12": partial(nn.LayerNorm, eps=1e-12),  # transformers' ViT; timm's own is 1e-6
}


def fill(module: nn.Module, path: Any, row: Row) -> None:
    """Load the weights file into `module`, strictly, after the renamings its source needs. Raises WeightsError."""
    state = _remap.to_timm(weights.load_state(path), module, row.name)
    unused = ["head.", "fc.", "head_dist.", "classifier."]
    if row.pooling == "layer3":
        unused.append("layer4.")
    own = module.state_dict()
    weights.load_into(module, state, path, row.name, tuple(u for u in unused if not any(k.startswith(u) for k in own)))


def width(row: Row, pooling: Pooling) -> int:
    """Feature width of `row` with another pooling than its own."""
    halves = {"cls_mean": 2}
    return row.dim * halves.get(pooling, 1) // halves.get(row.pooling, 1)


class _Pool:
    """Forward pass and pooling of a module; a class so that the run needs no lambda per family."""

    def __init__(self, pooling: Pooling, prefix_tokens: int) -> None:
        self.pooling = pooling
        self.prefix = prefix_tokens

    def __call__(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        if self.pooling not in ("cls", "cls_mean", "mean"):
            out: torch.Tensor = module(x)
            return out
        tokens = module.forward_features(x)  # (B, prefix + patches, C), after the final norm
        patches = tokens[:, self.prefix :].mean(1) if self.pooling != "cls" else None
        if patches is None:
            cls_token: torch.Tensor = tokens[:, 0]
            return cls_token
        return patches if self.pooling == "mean" else torch.cat([tokens[:, 0], patches], dim=1)


def _timm_config(name: str) -> dict[str, Any]:
    import timm

    try:
        found = timm.models.get_pretrained_cfg(name)
    except (RuntimeError, KeyError):
        found = None
    base = name.split(".")[0]
    if not timm.models.is_model(base):
        near = timm.list_models(f"*{base[:6]}*")[:8]
        raise EncoderError(
            f"timm {timm.__version__} has no model {name!r}{'; near: ' + ', '.join(near) if near else ''}"
        )
    config: dict[str, Any] = found.to_dict() if found is not None else {}
    return config


def timm_hub_id(name: str) -> str:
    """Hub repository of the default weights of `timm:<model>`; "" if it has none."""
    config = _timm_config(name.removeprefix("timm:"))
    return str(config.get("hf_hub_id") or "")


def _width(probe: nn.Module, px: int) -> int:
    """Feature width of a model on the meta device, by a forward pass that computes nothing."""
    with torch.inference_mode():
        out = probe.eval()(torch.empty((1, 3, px, px), device="meta"))
    if out.ndim != 2:
        raise EncoderError(f"{type(probe).__name__} gives {tuple(out.shape)} for one tile, not one vector")
    return int(out.shape[1])


def _row_of_timm(name: str) -> Row:
    """A row for any timm model: input, statistics and pooling as timm's own configuration of it says."""
    import timm

    config = _timm_config(name)
    with torch.device("meta"):
        probe = timm.create_model(name, pretrained=False, num_classes=0)
    px = int((config.get("input_size") or (3, 224, 224))[-1])
    crop = float(config.get("crop_pct") or 1.0)
    interpolation = config.get("interpolation")
    return Row(
        name=f"timm:{name}",
        model=f"timm {name}",
        hub_id=str(config.get("hf_hub_id") or ""),
        hub_files=(),
        loader="timm",
        arch=name,
        kwargs={"num_classes": 0},
        dim=_width(probe, px),
        prefix_tokens=int(getattr(probe, "num_prefix_tokens", 0)),
        pooling="model",
        input_px=px,
        resize_px=round(px / crop),
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        mean=config.get("mean") or (0.485, 0.456, 0.406),
        std=config.get("std") or (0.229, 0.224, 0.225),
        tile_px=(),
        mpp=(),
        precision="float32",
        licence=str(config.get("license") or "see the model's page"),
        commercial="unclear",
        gated="unclear",
        needs="",
        paper="",
        doubt="",
        sources="timm's configuration of the model",
    )
