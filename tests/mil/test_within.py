"""Checkpoints inside an epoch: from any bag, with any model and setting of the loop, the same bytes at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mhim.configs.schema import TrainConfig
from mhim.mil import tasks, train
from mhim.mil.feed import Case
from mhim.mil.models import MILModel
from tests.contracts.test_models import CASES, IDS, TWO, arrays, make
from tests.mil.test_train import VARIANTS, flat_bytes, through_disk
from tests.mil.test_train import build as tiny
from tests.mil.test_train import cases as tiny_cases

ALWAYS: Callable[[], bool] = lambda: True  # noqa: E731


def cases(n: int, seed: int) -> list[Case]:
    made = []
    for i in range(n):
        x, coords, edge = arrays(5 + 3 * i, seed + i)
        values = ((x + i % 2).astype(np.float16), coords, edge)
        made.append(Case(f"P{seed}-{i}", (f"S{seed}-{i}",), i % 2, lambda a=values: a))
    return made


def every_state_leads_to_the_same_end(
    build: Callable[[int], MILModel],
    data: list[Case],
    val: list[Case],
    task: tasks.Task,
    config: TrainConfig,
    picks: int = 3,
) -> list[train.State]:
    """Train without a look inside, with a look after every step, and from `picks` of the states seen; compare."""

    def fit(seed: int, start: Any = None, due: Callable[[], bool] = lambda: False) -> Iterator[train.State]:
        return train.fit(build(seed), data, val, task, config, 7, start, due)

    calm = list(fit(3))
    seen = list(fit(3, due=ALWAYS))
    whole = [s for s in seen if s["within"] is None]
    assert [flat_bytes(s) for s in whole] == [flat_bytes(s) for s in calm]
    inside = [s for s in seen if s["within"] is not None]
    assert inside
    for state in np.random.default_rng(len(inside)).choice(np.array(inside, dtype=object), picks, replace=False):
        torch.rand(3)  # what happens outside must not matter
        rest = list(fit(99, through_disk(state), ALWAYS))  # the other weights are replaced by the state's
        assert flat_bytes(rest[-1]) == flat_bytes(calm[-1])
        after = next(i for i, s in enumerate(seen) if s is state) + 1
        assert [flat_bytes(s) for s in rest] == [flat_bytes(s) for s in seen[after:]]
    return inside


@pytest.mark.parametrize(("name", "extra"), CASES, ids=IDS)
def test_every_model_goes_on_from_inside_an_epoch(name: str, extra: dict[str, Any]) -> None:
    config = TrainConfig(epochs=2, lr=0.01, patience=0)
    inside = every_state_leads_to_the_same_end(
        lambda seed: make(name, extra, seed=seed), cases(3, 1), cases(3, 20), TWO, config, 2
    )
    assert [s["within"]["step"] for s in inside] == [1, 2, 3] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_of_the_loop_goes_on_from_inside_an_epoch(variant: str) -> None:
    config, survival = VARIANTS[variant]
    task = tasks.cox_survival([(1.0, 1.0)]) if survival else TWO
    every_state_leads_to_the_same_end(
        lambda seed: tiny(task.n_out, seed), tiny_cases(9, 1, survival), tiny_cases(6, 2, survival), task, config, 5
    )


def test_a_state_is_offered_after_a_step_of_the_optimiser_only() -> None:
    config = TrainConfig(epochs=1, lr=0.01, patience=0, accumulate=4)
    inside = every_state_leads_to_the_same_end(lambda s: tiny(2, s), tiny_cases(10), [], TWO, config, 2)
    assert [s["within"]["step"] for s in inside] == [4, 8, 10]


def test_early_stopping_is_the_same_from_inside_an_epoch() -> None:
    config = TrainConfig(epochs=60, lr=0.05, patience=3, min_epochs=5)
    inside = every_state_leads_to_the_same_end(lambda s: tiny(2, s), tiny_cases(6), tiny_cases(6, 2), TWO, config)
    assert inside[-1]["epoch"] < 58


def test_a_loss_that_is_lost_is_told_at_the_checkpoint_and_not_kept() -> None:
    model = tiny()
    loop = train.fit(model, tiny_cases(6), [], TWO, TrainConfig(epochs=2, lr=0.01, patience=0), 1, None, ALWAYS)
    good = next(loop)
    with torch.no_grad():
        model.classify.bias.fill_(torch.nan)
    with pytest.raises(train.TrainingDiverged, match=r"in epoch 1 .*\(step 2\)"):
        next(loop)
    assert good["within"]["step"] == 1


def test_states_of_the_first_format_are_still_read() -> None:
    config = TrainConfig(epochs=3, lr=0.01, patience=0)
    states = list(train.fit(tiny(), tiny_cases(6), tiny_cases(4, 2), TWO, config, 1))
    old = {k: v for k, v in states[0].items() if k != "within"} | {"format": 1}
    rest = list(train.fit(tiny(seed=9), tiny_cases(6), tiny_cases(4, 2), TWO, config, 1, through_disk(old)))
    assert flat_bytes(rest[-1]) == flat_bytes(states[-1])
