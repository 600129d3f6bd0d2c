"""Checkpoints of other code bases, renamed for timm's networks; and the parts that timm does not have.

In: a state dict as its authors saved it. Out: the same tensors under timm's names. Values are never changed, only
stacked (query, key, value), added where timm adds them beforehand (class token and its position), or left out (tables
that timm computes itself, text sides).
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class ConvStem(nn.Module):
    """Stem of CTransPath and CHIEF (Wang et al. 2022): two 3x3 stride-2 convolutions and a 1x1 instead of 4x4 patches.

    float (B, 3, H, W) -> (B, H / 4, W / 4, embed_dim), the layout that timm's Swin expects.
    """

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        side = img_size[0] if isinstance(img_size, tuple) else img_size
        self.grid_size = (side // patch_size, side // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        width_in, width = in_chans, embed_dim // 8
        for _ in range(2):
            layers += [
                nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            width_in, width = width, width * 2
        layers.append(nn.Conv2d(width_in, embed_dim, 1))
        self.proj = nn.Sequential(*layers)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches: torch.Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return patches


class KeepVision(nn.Module):
    """Vision side of KEEP: a ViT-L, its projection head and the L2 norm. float (B, 3, 224, 224) -> (B, 768)."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        features: Any = visual.num_features  # 1024
        self.visual_head = nn.Sequential(nn.Linear(features, 768), nn.GELU(), nn.Linear(768, 768))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.visual_head(self.visual(x)), dim=-1)


class AttentionPooled(nn.Module):
    """Vision side of CONCH (v1: Lu et al. 2024, 10.1038/s41591-024-02856-4; v1.5 is TITAN's) as CoCa pools it.

    A ViT's tokens after the final norm, one learnt query that attends to all of them (8 heads), LayerNorm; neither
    projected nor normalised, as the authors advise for MIL. float (B, 3, 448, 448) -> (B, width). Names of parameters
    as in mahmoodlab/CONCH (vision_tower.py, transformer.py), without the prefix `visual.`.
    """

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        context: Any = trunk.num_features
        self.trunk: Any = trunk
        self.attn_pool_contrast = _Pooler(width, context)
        self.ln_contrast = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.ln_contrast(self.attn_pool_contrast(self.trunk.forward_features(x)))
        return pooled

    def fit_grid(self, state: dict[str, torch.Tensor]) -> None:
        """Take the grid of position embeddings that the file has; the trunk interpolates to the image at run time."""
        positions = state.get("trunk.pos_embed")
        if positions is None or positions.ndim != 3:
            return  # `load_into` names it
        side = round((positions.shape[1] - 1) ** 0.5)
        if side * side + 1 == positions.shape[1] and side != self.trunk.patch_embed.grid_size[0]:
            self.trunk.set_input_size(img_size=side * self.trunk.patch_embed.patch_size[0])


class _Pooler(nn.Module):
    """One query over a sequence: float (B, N, context) -> (B, width)."""

    def __init__(self, width: int, context: int, heads: int = 8) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.attn = nn.MultiheadAttention(width, heads, kdim=context, vdim=context, batch_first=True)
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(context)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        keys = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), 1, -1)  # (B, 1, width)
        out: torch.Tensor = self.attn(query, keys, keys, need_weights=False)[0]
        return out[:, 0]


def to_timm(state: dict[str, torch.Tensor], model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """`state` under the names of `model`, whatever its source: transformers, upstream DINOv2, old timm, timm."""
    state = {k.removeprefix("module."): v for k, v in state.items()}
    if name == "keep":
        kept = {k: v for k, v in state.items() if k.startswith(("visual.", "visual_head."))}
        return {re.sub(r"\.(ls[12])\.weight$", r".\1.gamma", k): v for k, v in kept.items()}
    if isinstance(model, AttentionPooled):  # text side, captioning and the projections to text are left out
        sides = ("trunk.", "attn_pool_contrast.", "ln_contrast.")
        state = {k.removeprefix("visual."): v for k, v in state.items()}
        state = {k: v for k, v in state.items() if k.startswith(sides)}
        model.fit_grid(state)
        return state
    if name in ("ctranspath", "chief"):
        return _old_swin(state)
    if "_conv_stem.weight" in state:
        return _efficientnet(state, model)
    if any(".attention.attention.query." in k for k in state):
        return _class_position(_from_transformers(state), model)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    converted: dict[str, torch.Tensor] = convert(state, model) if convert else dict(state)
    # timm resamples another grid in silence: right for DINOv2 (trained at 518 px, run at 224), else a wrong file
    for key in () if name.startswith("dinov2-") else ("pos_embed", "patch_embed.proj.weight"):
        if key in state and key in converted and state[key].numel() != converted[key].numel():
            converted[key] = state[key]
    return converted


def _old_swin(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm 0.5's Swin: down-sampling moved to the stage after, computed tables left out."""
    out = {}
    for key, value in state.items():
        if key.endswith(("attn_mask", "relative_position_index")):
            continue
        moved = re.match(r"layers\.(\d+)\.downsample\.(.+)", key)
        out[f"layers.{int(moved[1]) + 1}.downsample.{moved[2]}" if moved else key] = value
    return out


def _efficientnet(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """EfficientNets of the packages efficientnet_pytorch and efficientnet_lite: blocks are numbered through, and norms
    by their place among three; timm numbers blocks by stage, and norms by their place among those there are."""
    stages: Any = model.blocks
    places = [f"blocks.{s}.{b}." for s, stage in enumerate(stages) for b in range(len(stage))]
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    wide = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    wide |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    narrow = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    out = {}
    for key, value in state.items():
        block = re.match(r"_blocks\.(\d+)\.(.+)", key)
        if block and int(block[1]) < len(places):
            names = wide if f"_blocks.{block[1]}._expand_conv.weight" in state else narrow
            layer, _, rest = block[2].partition(".")
            out[f"{places[int(block[1])]}{names.get(layer, layer)}.{rest}"] = value
        else:
            layer, _, rest = key.partition(".")
            out[f"{top.get(layer, layer)}.{rest}"] = value
    return out


def _class_position(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The class token's position embedding added to the token itself, for networks that have positions of patches only
    (timm's with registers): the same sum, made once."""
    own, given = model.state_dict().get("pos_embed"), state.get("pos_embed")
    if own is not None and given is not None and "cls_token" in state and given.shape[1] == own.shape[1] + 1:
        state["cls_token"] = state["cls_token"] + given[:, :1]
        state["pos_embed"] = given[:, 1:]
    return state


_HF_NAMES = [
    (r"^(vit|dinov2|model)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
]


def _from_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ViTModel and Dinov2Model of transformers: renamed, query, key and value stacked, pooler and mask token out."""
    out: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        if "mask_token" in key or key.startswith(("pooler.", "classifier.", "vit.pooler.")):
            continue
        for pattern, new in _HF_NAMES:
            key = re.sub(pattern, new, key)
        separate = re.match(r"(.*)\.attention\.attention\.(query|key|value)\.(weight|bias)$", key)
        if separate:
            parts.setdefault(f"{separate[1]}.attn.qkv.{separate[3]}", {})[separate[2]] = value
        else:
            out[key] = value
    for key, three in parts.items():
        out[key] = torch.cat([three["query"], three["key"], three["value"]])
    return out
