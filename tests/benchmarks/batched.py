"""Are several small models faster as one (torch.func)? Time per model and step, and how far the weights come apart.

python -m tests.benchmarks.batched
"""

from __future__ import annotations

import copy
import json
import time

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class Attention(nn.Module):
    """ABMIL without dropout, of one padded bag."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(dim, width), nn.Linear(width, 64, bias=False)
        self.score, self.classify = nn.Linear(64, 1, bias=False), nn.Linear(width, 2)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """x: (N, D). there: (N,) 0, or -inf on padding."""
        z = nn.functional.gelu(self.embed(x))
        share = torch.softmax(self.score(torch.relu(self.attend(z)))[:, 0] + there, dim=0)
        logits: Tensor = self.classify(share @ z)
        return logits


def measure(models: int, tiles: int, dim: int, width: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    start = [Attention(dim, width) for _ in range(models)]
    bags = [[torch.randn(int(tiles * (0.6 + 0.8 * u)), dim) for u in torch.rand(models).tolist()] for _ in range(steps)]
    target = torch.randint(0, 2, (steps, models))
    alone = [copy.deepcopy(m) for m in start]
    movers = [torch.optim.Adam(m.parameters(), 1e-3) for m in alone]
    began = time.process_time()
    for of_step, wanted in zip(bags, target, strict=True):
        for model, mover, x, y in zip(alone, movers, of_step, wanted, strict=True):
            mover.zero_grad()
            nn.functional.cross_entropy(model(x, torch.zeros(len(x)))[None], y[None]).backward()
            mover.step()
    apart = time.process_time() - began
    weights, _ = stack_module_state(start)
    bare, mover = copy.deepcopy(start[0]).to("meta"), torch.optim.Adam(list(weights.values()), 1e-3)

    def loss(of_one: dict[str, Tensor], x: Tensor, there: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(bare, of_one, (x, there))[None], y[None])

    began = time.process_time()
    for of_step, wanted in zip(bags, target, strict=True):
        longest = max(map(len, of_step))
        x, there = torch.zeros(models, longest, dim), torch.full((models, longest), -torch.inf)
        for k, bag in enumerate(of_step):
            x[k, : len(bag)], there[k, : len(bag)] = bag, 0.0
        mover.zero_grad()
        vmap(loss)(weights, x, there, wanted).sum().backward()
        mover.step()
    together = time.process_time() - began
    off = max(
        float((weights[n][k] - p).detach().abs().max()) for k, m in enumerate(alone) for n, p in m.named_parameters()
    )
    each = 1e3 / steps / models
    return {"alone_ms": round(apart * each, 2), "batched_ms": round(together * each, 2), "largest_difference": off}


def main() -> None:
    torch.set_num_threads(1)
    for models in (5, 15):
        for tiles, dim, width, steps in (
            (5, 166, 64, 40), (85, 64, 64, 40), (85, 64, 512, 40), (1000, 384, 64, 8), (1000, 384, 512, 8),
            (5000, 1024, 512, 3),
        ):  # fmt: skip
            told = {"models": models, "tiles": tiles, "dim": dim, "width": width}
            print(json.dumps(told | measure(models, tiles, dim, width, steps)), flush=True)


if __name__ == "__main__":
    main()
