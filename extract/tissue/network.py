"""Tissue by a trained semantic segmenter of torchvision, such as HEST's DeepLabV3: optional, with weights of your own.

In: RGB at a known mpp, and where the weights are: a file, or a hub id. Out: mask before cleaning, by the most probable
class of each px. Knows nothing of the slide: the network sees the tissue image, resized to the scale it was trained at.
Only tensors are read from the weights' file, never code. What identifies the result is the SHA-256, not the path.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from pydantic import Field

from mhim.configs.schema import Settings

NEEDS_WEIGHTS = True
# Licences as the model pages state them (2024); for other weights `licence` tells it.
_LICENCES = {"MahmoodLab/hest-tissue-seg": "CC-BY-NC-SA-4.0"}
_MARGIN_PX = 64  # of each window, seen by the network but answered by the neighbouring window
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, on which torchvision's backbones are trained


class Params(Settings):
    weights: str | None = Field(None, description="file with the weights: .safetensors, .pt, .pth, .ckpt")
    hub_id: str = Field("", description="hub repository to fetch them from, such as MahmoodLab/hest-tissue-seg")
    hub_file: str = Field("deeplabv3_seg_v4.ckpt", description="file in that repository")
    offline: bool = Field(False, description="never open a network connection")
    architecture: Literal[
        "deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large",
        "fcn_resnet50", "fcn_resnet101", "lraspp_mobilenet_v3_large",
    ] = Field("deeplabv3_resnet50", description="torchvision network the weights belong to")  # fmt: skip
    classes: int = Field(2, ge=2, description="number of its classes")
    tissue_classes: tuple[int, ...] = Field((1,), min_length=1, description="the classes that are tissue")
    mpp: float = Field(1.0, gt=0, description="µm per px the network was trained at; set tile.segment_mpp to it")
    window_px: int = Field(512, ge=192, description="edge of the windows it is applied to, px")
    licence: str = Field("", description="licence of the weights, shown with the results")
    device: str = Field("cpu", description="cpu, or cuda")


def segment(rgb: np.ndarray, mpp: float, params: Params) -> np.ndarray:
    """uint8 (H, W, 3) -> bool (H, W). Raises WeightsError."""
    import torch

    path = _file(params)
    model = _model(str(path), _sha256(path), params.architecture, params.classes, params.device)
    h, w = rgb.shape[:2]
    scale = mpp / params.mpp
    if abs(scale - 1) > 0.1:
        size = (max(1, round(w * scale)), max(1, round(h * scale)))
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    height, width = rgb.shape[:2]
    out = np.zeros((height, width), np.uint8)
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (_MEAN, _STD))
    core = params.window_px - 2 * _MARGIN_PX
    for y in range(0, height, core):
        for x in range(0, width, core):
            window = _window(rgb, x - _MARGIN_PX, y - _MARGIN_PX, params.window_px)
            batch = ((torch.from_numpy(window).permute(2, 0, 1).float() - mean) / std)[None].to(params.device)
            with torch.inference_mode():
                best = model(batch)["out"][0].argmax(dim=0).cpu().numpy()
            tissue = np.isin(best[_MARGIN_PX:-_MARGIN_PX, _MARGIN_PX:-_MARGIN_PX], params.tissue_classes)
            part = out[y : y + core, x : x + core]
            part[:] = tissue[: part.shape[0], : part.shape[1]]
    if (height, width) != (h, w):
        out = np.asarray(cv2.resize(out, (w, h), interpolation=cv2.INTER_NEAREST), np.uint8)
    return out > 0


def identity(params: Params) -> dict[str, Any]:
    """What of the settings decides the mask, as plain JSON: the weights' SHA-256 in place of where they are.

    Raises WeightsError when the weights are nowhere.
    """
    chosen = params.model_dump(mode="json", exclude={"weights", "hub_id", "hub_file", "offline", "licence", "device"})
    return {**chosen, "sha256": _sha256(_file(params))}


def notes(params: Params, mpp: float) -> list[str]:
    """Lines for the person on a mask made at `mpp` µm per px: whose weights, their licence, a scale too coarse."""
    licence = params.licence or (_LICENCES.get(params.hub_id) if params.weights is None else "")
    page = f", see https://huggingface.co/{params.hub_id}" if params.hub_id and params.weights is None else ""
    stated = licence or f"not stated (segmenter_params.licence{page})"
    digest = _sha256(_file(params))[:12]
    said = [f"tissue by {params.architecture}, weights {digest}, licence of the weights: {stated}"]
    if mpp > 1.5 * params.mpp:
        said.append(f"the network was trained at {params.mpp:g} µm/px and saw {mpp:.3g}: lower tile.segment_mpp")
    return said


def _file(params: Params) -> Path:
    from mhim.extract.weights import WeightsError, cached, download

    if params.weights is not None:
        path = Path(params.weights).expanduser()
        if not path.is_file():
            raise WeightsError(f"segmenter_params.weights = {params.weights}: there is no such file")
        return path
    if not params.hub_id:
        raise WeightsError(
            "the segmenter `network` needs weights: set tile.segmenter_params.weights to a file, or hub_id to a hub "
            "repository such as MahmoodLab/hest-tissue-seg (CC-BY-NC-SA-4.0); or choose --segmenter stain"
        )
    found = cached(params.hub_id, (params.hub_file,))
    if found is None and params.offline:
        raise WeightsError(
            f"{params.hub_file} of {params.hub_id} is not on this machine (offline): fetch it where there is a "
            "network, and set tile.segmenter_params.weights to the file"
        )
    return found or download("network", params.hub_id, (params.hub_file,))


def _sha256(path: Path) -> str:
    from mhim.extract.weights import sha256

    return sha256(path)


@lru_cache(maxsize=1)
def _model(path: str, sha256: str, architecture: str, classes: int, device: str) -> Any:
    """The network with its weights, kept for the process's next slide; `sha256` makes a changed file another one."""
    import torch
    from torchvision.models import segmentation

    from mhim.extract.weights import load_into, load_state

    torch.set_num_threads(1)  # slides run in parallel processes
    model = getattr(segmentation, architecture)(
        weights=None, weights_backbone=None, num_classes=classes, aux_loss=False
    )
    state = load_state(Path(path))
    own = set(model.state_dict())
    for prefix in ("module.", "model."):  # as training programs wrap it
        if not own & set(state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    load_into(model, state, Path(path), architecture, unused=("aux_classifier", "criterion", "loss"))
    return model.eval().to(device)


def _window(rgb: np.ndarray, x: int, y: int, side: int) -> np.ndarray:
    """uint8 (side, side, 3) whose corner is (x, y); beyond the image, white."""
    h, w = rgb.shape[:2]
    left, top, right, bottom = max(0, x), max(0, y), min(w, x + side), min(h, y + side)
    out = np.full((side, side, 3), 255, np.uint8)
    out[top - y : bottom - y, left - x : right - x] = rgb[top:bottom, left:right]
    return out
