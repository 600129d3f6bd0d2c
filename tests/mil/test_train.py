"""The loop: resumed from any epoch it ends in the same bytes; it isolates its randomness; it selects on validation."""

import dataclasses
import io
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from mhim.configs.schema import TrainConfig
from mhim.mil import feed, tasks, train
from mhim.mil.feed import BagError, Case, Feed
from mhim.mil.models import Output
from tests.mil import recorded

WIDTH = 6


class Tiny(nn.Module):
    """Attention pooling with dropout: the smallest model of the contract that uses random numbers."""

    def __init__(self, n_out=2):
        super().__init__()
        self.attend, self.classify = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, n_out)
        self.dropout = nn.Dropout(0.3)
        self.progress = []
        self.steps = 0

    def forward(self, bag):
        z = self.dropout(bag.features)
        a = self.attend(z)[..., 0].masked_fill(~bag.mask, -torch.inf).softmax(1)
        pooled = (a[..., None] * z).sum(1)
        return Output(self.classify(pooled), a, pooled)

    def losses(self, bag, target, task):
        return {"task": task.loss(self(bag).logits, target)}

    def set_progress(self, done):
        self.progress.append(done)

    def after_step(self):
        self.steps += 1


def cases(n, seed=0, survival=False, size=(3, 9)):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        y = i % 2
        x = rng.normal(size=(rng.integers(*size), WIDTH)).astype(np.float16)
        x[:, 0] += 2 * y
        target = (float(rng.exponential(1 + 5 * (1 - y))), float(i % 3 != 0)) if survival else y
        arrays = (x, np.arange(2 * len(x), dtype=np.int32).reshape(-1, 2), 256.0)
        made.append(Case(f"P{seed}-{i}", (f"S{i}",), target, lambda a=arrays: a))
    return made


TWO = tasks.Classification(classes=("no", "yes"))
CONFIG = TrainConfig(model="tiny", epochs=5, lr=0.01, patience=0)


def build(n_out=2, seed=3):
    with train.seeded(seed):
        return Tiny(n_out)


def flat_bytes(state):
    """Every tensor and value of a state, for comparison."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, dict):
        return {k: flat_bytes(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [flat_bytes(v) for v in state]
    return repr(state)


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


VARIANTS = {
    "plain": (CONFIG, False),
    "packed": (CONFIG.model_copy(update={"batch_bags": 3, "accumulate": 2, "max_tiles": 4}), False),
    "balanced": (CONFIG.model_copy(update={"balance": "sampling", "standardize": True, "optimizer": "adamw"}), False),
    "bf16": (CONFIG.model_copy(update={"amp": True, "warmup_epochs": 2}), False),
    "cox": (CONFIG.model_copy(update={"cox_bags": 4}), True),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_from_any_epoch_ends_in_the_same_bytes(name, stop):
    config, survival = VARIANTS[name]
    task = tasks.cox_survival([(1.0, 1.0)]) if survival else TWO
    data, val = cases(9, 1, survival), cases(6, 2, survival)
    whole = list(train.fit(build(task.n_out), data, val, task, config, 7))
    assert len(whole) == config.epochs
    torch.rand(5)  # what happens outside must not matter
    begun = list(itertools.islice(train.fit(build(task.n_out), data, val, task, config, 7), stop))
    assert flat_bytes(begun[-1]) == flat_bytes(whole[stop - 1])
    other = build(task.n_out, seed=99)  # its weights are replaced by the state's
    rest = list(train.fit(other, data, val, task, config, 7, start=through_disk(begun[-1])))
    assert flat_bytes(rest[-1]) == flat_bytes(whole[-1])
    assert not list(train.fit(other, data, val, task, config, 7, start=through_disk(whole[-1])))


def test_nothing_outside_is_changed_and_nothing_outside_matters():
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    loop = train.fit(build(), cases(6), [], TWO, CONFIG, 1)
    one = next(loop)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    torch.manual_seed(6)
    with torch.random.fork_rng():
        again = train.fit(build(), cases(6), [], TWO, CONFIG, 1)
        assert flat_bytes(next(again)) == flat_bytes(one)
        torch.rand(100)
        assert flat_bytes(next(again)) == flat_bytes(next(loop))


def test_a_yielded_state_does_not_change_when_training_goes_on():
    loop = train.fit(build(), cases(6), cases(4, 2), TWO, CONFIG, 1)
    first = next(loop)
    kept = flat_bytes(first)
    list(loop)
    assert flat_bytes(first) == kept


def test_it_learns_and_predicts_in_order():
    model, data = build(), cases(24, 1)
    config = CONFIG.model_copy(update={"epochs": 30, "lr": 0.03})
    state = list(train.fit(model, data, cases(12, 2), TWO, config, 1))[-1]
    model.load_state_dict(state["best"]["weights"])
    test = cases(20, 3)
    found = list(train.predict(model, test, TWO))
    assert [p.case.patient for p in found] == [c.patient for c in test]
    assert [len(p.scores) for p in found] == [len(c.load()[0]) for c in test]
    from mhim.mil import metrics

    p = TWO.probabilities(torch.tensor(np.stack([f.logits for f in found]))).numpy()
    assert metrics.auc(np.array([c.target for c in test]), p) > 0.8


def test_the_best_epoch_on_validation_is_kept_and_training_stops_after_patience():
    config = CONFIG.model_copy(update={"epochs": 60, "lr": 0.05, "patience": 3, "min_epochs": 5})
    states = list(train.fit(build(), cases(6), cases(6, 2), TWO, config, 1))
    history, best = states[-1]["history"], states[-1]["best"]
    assert len(states) < 60
    assert states[-1]["done"]
    ranks = [(r["val_auc"], -r["val_loss"]) for r in history]
    assert best["epoch"] == ranks.index(max(ranks))
    assert flat_bytes(best["weights"]) == flat_bytes(states[best["epoch"]]["model"])
    last = list(train.fit(build(), cases(6), cases(6, 2), TWO, CONFIG.model_copy(update={"select": "last"}), 1))[-1]
    assert flat_bytes(last["best"]["weights"]) == flat_bytes(last["model"])


def test_packing_and_accumulation_reach_every_case_and_scale_the_gradient():
    """Three bags in one step give the gradient of three steps added up (without dropout)."""
    data = cases(6, 4)

    def trained(**update):
        model = build()
        model.dropout.p = 0.0
        config = CONFIG.model_copy(update={"epochs": 1, **update})
        list(train.fit(model, data, [], TWO, config, 1))
        return model

    packed, added = trained(batch_bags=3), trained(accumulate=3)
    assert (packed.steps, added.steps) == (2, 2)
    for a, b in zip(packed.parameters(), added.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_learning_rate_follows_the_recorded_schedule():
    half = train.learning_rate(CONFIG.model_copy(update={"epochs": 200, "lr": 2e-4}), 100)
    assert half == pytest.approx((2e-4 + 1e-7) / 2)
    rates = recorded.arrays(recorded.PUBLISHED, "schedules")
    for name, epochs, warm in (("lr_200", 200, 0), ("lr_40", 40, 0), ("lr_40_warm5", 40, 5)):
        config = TrainConfig(lr=2e-4, epochs=epochs, warmup_epochs=warm)
        np.testing.assert_allclose([train.learning_rate(config, e) for e in range(epochs)], rates[name], rtol=1e-9)


def test_a_constant_schedule_keeps_the_learning_rate():
    config = TrainConfig(lr=2e-4, epochs=40, schedule="constant")
    assert [train.learning_rate(config, e) for e in range(40)] == [2e-4] * 40


def test_progress_runs_from_zero_towards_one():
    model = build()
    list(train.fit(model, cases(4), [], TWO, CONFIG, 1))
    assert model.progress == pytest.approx([i / 20 for i in range(20)])


def test_a_loss_that_is_no_number_names_the_patient_and_keeps_the_last_state():
    model, data = build(), cases(6)
    loop = train.fit(model, data, [], TWO, CONFIG, 1)
    good = next(loop)
    assert math.isfinite(good["history"][-1]["loss"])
    with torch.no_grad():
        model.classify.bias.fill_(torch.nan)
    first = data[feed.shuffled(data, 1, None, 1, 1)[0][0]].patient
    with pytest.raises(train.TrainingDiverged, match=rf"epoch 2 at patient {first} .*train\.lr"):
        next(loop)
    assert all(torch.isfinite(v).all() for v in good["model"].values())


def broken(change):
    data = cases(3)
    x, coords, size = data[1].load()
    arrays = change(x.copy(), coords, size)
    return [data[0], Case("P-bad", ("S-bad",), 1, lambda: arrays), data[2]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, c, s: (np.where(np.arange(WIDTH) == 2, np.float16("nan"), x), c, s), "P-bad.*S-bad.*tile 0.*NaN"),
        (lambda x, c, s: (x.astype(np.float64) / 0.0, c, s), "NaN or infinity"),
        (lambda x, c, s: (x[:, :4], c, s), "P-bad.*4 wide, others 6"),
        (lambda x, c, s: (x, c[1:], s), "do not fit"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_features_that_cannot_be_used_are_refused_by_patient(change, says):
    bad = Feed(broken(change), TWO, torch.device("cpu"))
    with pytest.raises(BagError, match=says):
        [bad.load(i) for i in range(3)]


def test_balanced_sampling_shows_every_class_as_often():
    data = [*cases(20, 1)[::2], *cases(4, 2)[1::2]]  # ten of one class, two of the other
    order = feed.shuffled(data, 1, TWO, 3, 0)
    shown = [data[i].target for [i] in order]
    assert len(shown) == 12
    assert shown.count(0) == shown.count(1) == 6
    assert feed.shuffled(data, 1, TWO, 3, 0) == order
    assert feed.shuffled(data, 1, TWO, 3, 1) != order


def test_the_cap_on_tiles_keeps_order_and_changes_with_the_epoch():
    data = cases(2, 1, size=(50, 51))
    capped = Feed(data, TWO, torch.device("cpu"), max_tiles=10)
    one, two = (capped.batch([0, 1], key=(0, e)).bag for e in (0, 1))
    assert one.features.shape[1] == 10
    assert (one.coords[0, 1:, 0] > one.coords[0, :-1, 0]).all()
    assert not torch.equal(one.coords, two.coords)
    assert capped.batch([0, 1]).bag.features.shape[1] == 50  # scoring asks for no cap


def test_the_cache_stays_within_its_limit_and_changes_nothing():
    calls = []
    data = [Case(c.patient, c.slides, c.target, lambda c=c: calls.append(c.patient) or c.load()) for c in cases(4)]
    size = max(sum(a.nbytes for a in c.load()[:2]) for c in cases(4))
    some = Feed(data, TWO, torch.device("cpu"), cache_bytes=2 * size)
    for _ in range(3):
        for batch in some.batches(some.in_turn()):
            assert batch.target is not None
    assert 4 < len(calls) < 12
    assert len(some._kept) >= 2


def test_standardising_gives_mean_zero_and_sd_one_over_the_training_tiles():
    data = cases(8, 5)
    scaled = Feed(data, TWO, torch.device("cpu"))
    scaled.scale = feed.moments(scaled)
    x = torch.cat([scaled.batch([i]).bag.features[0] for i in range(8)])
    torch.testing.assert_close(x.mean(0), torch.zeros(WIDTH), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(WIDTH), atol=1e-3, rtol=0)


NATURAL = {
    "of an encoder": (lambda x: x, None),
    "large": (lambda x: 40.0 * x, r"of size 4\d"),
    "minute": (lambda x: 1e-3 * x, "of size 0.001"),
    "of other units": (lambda x: x * np.array([1, 2e-4, 1e-4, 1, 1, 1]), "spreads differ"),
    "uneven as a CNN's": (lambda x: x * np.array([1, 0.1, 0.05, 1, 1, 1]), None),
    "with a constant": (lambda x: np.where(np.arange(WIDTH) == 2, 3.0, x), None),
}


@pytest.mark.parametrize("name", NATURAL)
def test_auto_standardises_by_size_and_spread_of_the_training_part(name):
    change, why = NATURAL[name]

    def made(seed):
        found = []
        for case in cases(8, seed):
            x, *rest = case.load()
            arrays = (change(x.astype(np.float32)).astype(np.float32), *rest)
            found.append(dataclasses.replace(case, load=lambda a=arrays: a))
        return found

    config = TrainConfig(epochs=2, patience=0, standardize="auto")
    states = list(train.fit(build(), made(0), made(1), TWO, config, seed=1))
    found = states[-1]["judged"]
    assert (found["why"] is None) == (why is None)
    assert (train.scale_of(states[-1]) is None) == (why is None)
    if why:
        assert re.search(why, found["why"])
    again = list(train.fit(build(), made(0), made(1), TWO, config, seed=1, start=states[0]))
    assert again[-1]["judged"] == found
    as_told = TrainConfig(epochs=2, patience=0, standardize=why is not None)
    same = list(train.fit(build(), made(0), made(1), TWO, as_told, seed=1))[-1]
    assert "judged" not in same
    assert all(torch.equal(v, states[-1]["model"][k]) for k, v in same["model"].items())
