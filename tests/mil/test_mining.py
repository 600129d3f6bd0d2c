"""What is told of the mask is what the mask does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mhim.mil import mining
from mhim.mil.models import MIL, Bag, abmil, mhim
from mhim.mil.parts import masking
from mhim.mil.tasks import Classification

TWO = Classification(("no", "yes"))


def bag(n: int) -> Bag:
    torch.manual_seed(3)
    return Bag(torch.randn(1, n, 8), torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, 2), torch.ones(1), 0.5, (n,))


def student(**params: object) -> MIL:
    torch.manual_seed(0)
    return mhim.build(8, 2, mhim.Params.model_validate({"share_max": 1.0, **params})).eval()


@pytest.mark.parametrize("cap", [1.0, 0.2])
def test_masked_is_the_share_of_steps_in_which_the_mask_takes_the_instance(cap: float) -> None:
    model = student(mask_ratio_h=0.2, mask_decay="cosine", mask_ratio_hr=1.0, share_max=cap)
    found = mining.of(model, bag(50), TWO)
    x, sizes, places = mining.flatten(bag(50))[0], [50], mining.grids(bag(50))
    with torch.inference_mode():
        (seen,) = model.assess(x, sizes, places)
        score = model.score(seen, 50, TWO)
        expected = torch.zeros(50)
        for step in range(mining.STEPS):
            model.set_progress(step / mining.STEPS)
            taken = masking.remove(score, seen.share, model.ratio_high, share_max=cap, rounding=model.params.rounding)
            expected += taken.flags / mining.STEPS
    np.testing.assert_allclose(found["masked"], expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(found["hardness"], score.numpy(), rtol=1e-5)
    if cap == 1.0:
        order = np.argsort(-found["hardness"])
        assert (np.diff(found["masked"][order]) <= 1e-6).all()  # the harder, the longer hidden
        assert found["masked"].max() > 0


def test_a_random_share_of_a_larger_pool_is_told_as_its_chance() -> None:
    model = student(mask_ratio_h=0.1, mask_decay="none", mask_ratio_hr=0.5)
    masked = mining.of(model, bag(40), TWO)["masked"]
    assert (masked > 0).sum() == 8  # 40 x 0.1 / 0.5
    np.testing.assert_allclose(masked[masked > 0], 0.5, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = student(mask_ratio_h=0.1)
    model.set_progress(0.7)
    mining.of(model, bag(10), TWO)
    assert model.done == 0.7


def test_other_models_and_tiny_bags_hide_nothing() -> None:
    assert mining.of(abmil.build(8, 2, abmil.Params()).eval(), bag(5), TWO) == {}
    assert mining.of(student(mask_ratio_h=0.1), bag(1), TWO) == {}
    assert mining.of(student(mask_ratio_h=0.0), bag(5), TWO) == {}
