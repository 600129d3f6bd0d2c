"""What `pipeline models` shows: every MIL model, its paper, and what it costs.

In: nothing, or a name. Out: lines for a person. Weights and multiply-adds are counted on the model as it is built, by
the products that torch carries out for one bag; no time of a machine is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic import BaseModel
from torch.utils.flop_counter import FlopCounterMode

from mhim.configs import lookup
from mhim.configs.errors import UserError
from mhim.mil import train as loop
from mhim.mil.models import Bag
from mhim.pipeline.resume import console

PACKAGE = "mhim.mil.models"
TILES = 1000


@dataclass(frozen=True)
class Cost:
    """weights: numbers that are learnt. multiply_adds: of one answer for a bag of `TILES` tiles, in products of
    matrices and convolutions; element by element work is not counted."""

    weights: int
    multiply_adds: int


def cost(name: str, dim: int, params: dict[str, Any] | None = None) -> Cost:
    """What the model `name` costs on features of `dim` numbers and two classes. Raises LookupFailed."""
    module = lookup.find(PACKAGE, name)
    with loop.seeded(0):
        model = module.build(dim, 2, lookup.params(module, params or {})).eval()
        weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.requires_grad_(False)  # the counter follows gradients where there are any
        side = int(TILES**0.5) + 1
        at = torch.arange(TILES)
        coords = torch.stack([at % side, at // side], 1).float()[None] * 256
        bag = Bag(
            torch.randn(1, TILES, dim), torch.ones(1, TILES, dtype=torch.bool), coords, torch.tensor([256.0]), 0.5
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(bag)
    return Cost(weights, counter.get_total_flops() // 2)  # a product and its sum are two operations


def paper(name: str) -> str:
    """The first sentence of a model's file: what it is, and its paper."""
    return " ".join((lookup.find(PACKAGE, name).__doc__ or "").split("\n\n")[0].split()).rstrip(".")


def show(name: str | None, dim: int) -> int:
    """All models, one a line; with `name`, all that is known of one. Raises LookupFailed."""
    if name is not None:
        return _one(name, dim)
    lines = [("model", "weights", f"multiply-adds, {TILES:,} tiles", "paper")]
    for each in lookup.names(PACKAGE):
        try:
            found = cost(each, dim)
            lines.append((each, count(found.weights), count(found.multiply_adds), paper(each)))
        except (UserError, ImportError) as error:  # one that needs what is not installed here
            lines.append((each, "-", "-", f"{paper(each)} ({error})"))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    for line in lines:
        cells = [line[0].ljust(widths[0]), line[1].rjust(widths[1]), line[2].rjust(widths[2]), line[3]]
        console.out.print(console.escape("  ".join(cells)))
    console.out.print(
        f"counted for features of {dim} numbers (--dim), two classes and the default settings; or your own model: "
        "--model my_module or ./mine.py\nsettings of one: pipeline models NAME"
    )
    return 0


def _one(name: str, dim: int) -> int:
    module = lookup.find(PACKAGE, name)
    found = cost(name, dim)
    console.out.print(console.escape((module.__doc__ or "").strip()))
    console.out.print(
        f"\nweights        {count(found.weights)} on features of {dim} numbers, two classes\n"
        f"multiply-adds  {count(found.multiply_adds)} for one answer on {TILES:,} tiles"
    )
    params: type[BaseModel] = module.Params
    console.out.print("\nsettings (--set train.model_params.NAME=VALUE):")
    for key, field in params.model_fields.items():
        default = field.get_default(call_default_factory=True)
        may_be = (
            f" [{' | '.join(map(str, get_args(field.annotation)))}]" if get_origin(field.annotation) is Literal else ""
        )
        console.out.print(console.escape(f"  {key} = {default}: {field.description or ''}{may_be}"))
    return 0


def count(n: int) -> str:
    """`657,921`; from ten million on `12.3 M`, from ten milliards on `12.3 G`."""
    if n < 10_000_000:
        return f"{n:,}"
    return f"{n / 1e6:.1f} M" if n < 10_000_000_000 else f"{n / 1e9:.1f} G"
