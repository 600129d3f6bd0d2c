"""Weights that several tests of encoders share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: a ResNet-50 under the name of the truncated one, and timm's tiny test models."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("weights")
    save_file(timm.create_model("resnet50").state_dict(), made / "resnet50-trunc.safetensors")
    for tiny in ("test_vit", "test_resnet"):
        save_file(timm.create_model(tiny).state_dict(), made / f"timm-{tiny}.safetensors")
    return made
