"""Encoders that need another package than timm: transformers, open_clip, or their authors' own. Imported when used.

In: a row of the table and its weights file or snapshot folder. Out: a module whose forward gives (B, dim), or tokens
through `forward_features`. None of these packages is a dependency: a missing one is named with what to install. The
shapes are checked at run time; the tests build each from random weights where its package is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhim.extract.encoders._contract import EncoderError
from mhim.extract.encoders._table import Row
from mhim.extract.weights import WeightsError


def network(row: Row, path: Path, trust_remote_code: bool) -> nn.Module:
    """The row's model with its weights. Raises EncoderError or WeightsError."""
    builders = {"transformers": _transformers, "open_clip": _open_clip, "package": _package}
    try:
        builder = builders.get(row.loader, _transformers)  # a row of timm's whose authors' own code is asked for
        module: nn.Module = builder(row, path, trust_remote_code)
    except ImportError as error:
        raise EncoderError(f"encoder {row.name!r} needs {row.needs} (missing: {error.name or error})") from error
    return module.eval()


class _Output(nn.Module):
    """Makes a model of transformers look like timm's: forward gives vectors, forward_features gives tokens."""

    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.model(pixel_values=x).last_hidden_state
        return tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        if self.pooling == "clip":  # get_image_features returns a tensor in transformers 4 and an object in 5
            projected: torch.Tensor = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
            return projected
        vision = model.vision_model if self.pooling == "siglip" else model
        out = vision(pixel_values=x) if self.pooling == "siglip" else vision(x)
        return out if isinstance(out, torch.Tensor) else out.pooler_output


def _transformers(row: Row, path: Path, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModel

    needs_code = "trust_remote_code" in row.needs
    if needs_code and not trust_remote_code:
        raise EncoderError(
            f"encoder {row.name!r} runs model code that comes with its weights: read it, then allow it with "
            "--set extract.encoder_params='{trust_remote_code: true}'"
        )
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{row.name!r} wants a snapshot folder with config.json, not the lone file {path}: "
            f"`pipeline weights fetch {row.name} --to DIR` makes one"
        )
    model, told = AutoModel.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=needs_code, output_loading_info=True
    )
    absent = [k for k in (*told["missing_keys"], *(m[0] for m in told["mismatched_keys"])) if not _unread(k, row)]
    if absent:  # transformers only warns, and leaves random numbers there
        raise WeightsError(f"{folder} does not hold the weights of {row.name!r}: {', '.join(sorted(absent)[:3])} ...")
    return _Output(model, row.pooling)


def _unread(key: str, row: Row) -> bool:
    """Parameters that the features do not depend on: the text side."""
    return row.pooling in ("clip", "siglip") and key.startswith(("text_", "logit_"))


def _open_clip(row: Row, path: Path, trust_remote_code: bool) -> nn.Module:
    import open_clip

    from mhim.extract.weights import load_state

    if row.arch:
        model = open_clip.create_model(row.arch, pretrained=None)
        model.load_state_dict(load_state(path))
    else:
        folder = path if path.is_dir() else path.parent
        model = open_clip.create_model(f"local-dir:{folder}")
    return _ImageSide(model)


class _ImageSide(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model.encode_image(x, normalize=False)
        return out


def _package(row: Row, path: Path, trust_remote_code: bool) -> nn.Module:
    """MUSK: the network is its authors', the weights are read here (their loader unpickles, and only prints what is
    missing). What the network has must all be there; heads of its pre-training that it lacks are left out."""
    import timm
    from musk import modeling  # noqa: F401  registers the architecture with timm

    from mhim.extract.weights import load_into, load_state

    musk = timm.create_model("musk_large_patch16_384")
    state = {k.removeprefix("module."): v for k, v in load_state(path).items()}
    load_into(musk, {k: v for k, v in state.items() if k in musk.state_dict()}, path, row.name)
    return _Musk(musk)


class _Musk(nn.Module):
    """Class token of the vision branch, one scale (1024); the table says `cls`, the model pools by itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        vector = self.model(image=x, with_head=False, out_norm=False, ms_aug=False, return_global=True)[0]
        one_token: torch.Tensor = vector[:, None]
        return one_token
