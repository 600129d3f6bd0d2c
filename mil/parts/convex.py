"""Answers that fit a training part best under a ridge, found to convergence and not by steps of the training.

In: a function of tensors to be made small. Out: where it is smallest. Knows no bag and no model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def smallest(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 500) -> Tensor:
    """The float64 argument at which a convex, smooth `loss` is smallest, by L-BFGS from `start`: the same each time."""
    with torch.inference_mode(False), torch.enable_grad():
        at = start.detach().double().clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [at], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            value = loss(at)
            value.backward()
            return value

        solver.step(closure)
        return at.detach()
