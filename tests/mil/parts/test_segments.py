"""Packed bags: several in one row of instances are the same as one by one, losses and gradients, to 1e-12."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mhim.configs import lookup
from mhim.mil import tasks
from mhim.mil import train as loop
from mhim.mil.models import MIL, Bag, Encoded, Instances
from mhim.mil.models.abmil import AbMil, Params
from mhim.mil.parts import segments

SIZES = (7, 1, 40, 3)
TASK = tasks.Classification(("a", "b"))


def batch() -> Bag:
    rng = torch.Generator().manual_seed(0)
    n = max(SIZES)
    features = torch.randn(len(SIZES), n, 12, generator=rng, dtype=torch.float64)
    mask = torch.arange(n) < torch.tensor(SIZES)[:, None]
    # padding that would show if it were read
    features[~mask] = 1e6
    return Bag(features, mask, torch.zeros(len(SIZES), n, 2), torch.ones(len(SIZES)), 0.5, SIZES)


def built(name: str, **params: object) -> MIL:
    module = lookup.find("mhim.mil.models", name)
    with loop.seeded(1):
        model: MIL = module.build(12, 2, lookup.params(module, params)).double()
    return model


def step(model: MIL) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    with loop.seeded(3):
        total = torch.stack(list(model.losses(batch(), torch.tensor([0, 1, 1, 0]), TASK).values())).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return float(total.detach()), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("abmil", {"width": 16, "dropout": 0.25}),
        ("gated_abmil", {"width": 16}),
        ("mean", {"width": 16}),
        ("nnmil", {"attention_width": 8, "dropout": 0.0}),
    ],
)
def test_packed_equals_one_by_one(name: str, params: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name, **params)
    alone, grads = step(model)
    used = []
    encode = type(model).encode_pack
    monkeypatch.setattr(type(model), "encode_pack", lambda *a: used.append(1) or encode(*a))
    model.packed = True
    together, packed = step(model)
    assert used == [1]
    assert together == pytest.approx(alone, abs=1e-12)
    assert packed.keys() == grads.keys()
    for key, grad in grads.items():
        np.testing.assert_allclose(packed[key].numpy(), grad.numpy(), rtol=0, atol=1e-12, err_msg=key)


def test_what_cannot_be_packed_goes_one_by_one() -> None:
    model = built("transmil", width=16, heads=2, landmarks=4)
    model.packed = True
    assert step(model)[0] == step(model)[0]
    entropy = built("abmil", width=16)
    entropy.entropy_weight = 0.1
    plain = step(entropy)[0]
    entropy.packed = True
    assert step(entropy)[0] == plain


def test_who_encodes_otherwise_is_not_packed_as_the_model_that_it_comes_from() -> None:
    class Mine(AbMil):
        def encode(self, instances: Instances, detail: bool = False) -> Encoded:
            found = super().encode(instances, detail)
            return replace(found, logits=2.0 * found.logits)

    with loop.seeded(1):
        model = Mine(12, 2, Params(width=16)).double()
    alone = step(model)[0]
    model.packed = True
    assert step(model)[0] == alone


def test_a_softmax_stays_inside_its_segment_and_large_numbers_do_not_overflow() -> None:
    bag = segments.of_sizes((2, 3), torch.device("cpu"))
    assert bag.tolist() == [0, 0, 1, 1, 1]
    found = segments.softmax(torch.tensor([800.0, 800.0, -900.0, -900.0, -900.0]), bag, 2)
    assert found.tolist() == pytest.approx([0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])
    assert segments.total(torch.ones(5, 1), bag, 2).tolist() == [[2.0], [3.0]]


def test_half_precision_is_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU adds in bfloat16 stands still after hundreds of instances; a CPU's kernel happens not to."""
    added: list[torch.dtype] = []
    real = torch.Tensor.index_add
    monkeypatch.setattr(torch.Tensor, "index_add", lambda self, *a: added.append(a[2].dtype) or real(self, *a))
    rows = torch.full((4096, 2), 1 / 4096, dtype=torch.bfloat16)
    found = segments.total(rows, torch.zeros(4096, dtype=torch.int64), 1)
    assert (found.dtype, found.tolist(), added) == (torch.bfloat16, [[1.0, 1.0]], [torch.float32])
