"""MIL models, one paper each. A file offers `Params` and `build(in_dim, n_out, params) -> MILModel`.

`Bag` is the one batch every model receives whole, so that none can lose the mask by not asking for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bag:
    """A padded batch of bags.

    features: float (B, N, D). mask: bool (B, N), True on real instances. coords: float32 (B, N, 2), level-0 px of the
    tile's top-left corner, x then y (zeros on padding). tile_l0: float32 (B,), tile edge in level-0 px, so that
    coords / tile_l0 is a grid position. mpp: µm per tile px.
    """

    features: Tensor
    mask: Tensor
    coords: Tensor
    tile_l0: Tensor
    mpp: float


@dataclass(frozen=True)
class Output:
    """logits: (B, n_out). scores: (B, N) attention or instance score, one head or the mean over heads, 0 on padding.
    embedding: (B, E) bag embedding. evidence: (B, N, n_out) class evidence per instance before attention, or None."""

    logits: Tensor
    scores: Tensor
    embedding: Tensor
    evidence: Tensor | None = None


class MILModel(Protocol):
    """A torch.nn.Module with this contract; `mil/train.py` knows no more than it."""

    def forward(self, bag: Bag) -> Output:
        """Inference and training forward of the bag classifier (nothing masked or recycled)."""
        ...

    def losses(self, bag: Bag, target: Tensor, task: object) -> dict[str, Tensor]:
        """Named losses whose sum is minimised; the default of most models is {"task": task.loss(logits, target)}."""
        ...

    def after_step(self) -> None:
        """Called after each optimiser step; MHIM moves its teacher here. Empty by default."""
        ...

    def parameters(self) -> object: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...
