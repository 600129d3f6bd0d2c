"""On a GPU: the CPU's numbers, no wait for the host inside a step, the same bytes again and after a kill."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mhim.configs.schema import TrainConfig
from mhim.mil import tasks, train
from mhim.mil.feed import Case, Feed
from mhim.mil.mining import of as mined
from mhim.mil.models import Bag
from mhim.mil.parts import masking
from tests.contracts.test_models import CASES, DIM, IDS, TWO, arrays, bag, make, target
from tests.mil import test_golden as golden
from tests.mil.test_train import flat_bytes, through_disk

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
every = pytest.mark.parametrize(("name", "extra"), CASES, ids=IDS)
PUBLISHED = {
    "share_max": 1.0,
    "score": "probability",
    "order": "shuffled",
    "min_kept": 0,
    "merge_at_test": False,
    "student_start": "fresh",
}
STUDENTS = [("mhim", {"student": s, **more}) for s in ("abmil", "dsmil", "transmil") for more in ({}, PUBLISHED)]
STUDENT_IDS = [f"{s}-{form}" for s in ("abmil", "dsmil", "transmil") for form in ("default", "published")]
more = pytest.mark.parametrize(("name", "extra"), [*CASES, *STUDENTS], ids=[*IDS, *STUDENT_IDS])
TASKS = {
    "classes": TWO,
    "weighted": tasks.classification(("no", "yes"), [0, 0, 0, 1], True),
    "nll": tasks.discrete_survival([(float(t), 1.0) for t in range(1, 20)]),
    "cox": tasks.cox_survival([(1.0, 1.0)]),
}


@pytest.fixture(autouse=True)
def _one_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `pipeline train --gpu` sets it


def there(b: Bag, kind: torch.dtype = torch.float32) -> Bag:
    return Bag(b.features.to(GPU, kind), b.mask.to(GPU), b.coords.to(GPU), b.tile_l0.to(GPU), b.mpp, b.sizes)


def still(model: torch.nn.Module) -> torch.nn.Module:
    """Without dropout, and with noise that is the same on every device."""
    for m in model.modules():
        for attribute in ("dropout", "drop", "p"):
            if isinstance(getattr(m, attribute, None), float):
                setattr(m, attribute, 0.0)
    if hasattr(model, "draw"):
        model.draw = lambda rows, n, device: torch.rand(  # type: ignore[assignment]
            rows, n, generator=torch.Generator().manual_seed(n)
        ).to(device)
    return model


@every
def test_the_numbers_are_those_of_the_cpu(name: str, extra: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers, losses and gradients, in float64, also of a packed batch; and what the mask hides."""
    # with the filler that spares a GPU the wait, to which a model that uses order is not indifferent
    monkeypatch.setattr(masking, "numbers_known", lambda device: False)
    here, gone = (still(make(name, extra).double()) for _ in range(2))
    gone = gone.to(GPU)
    b = bag(61, 17)
    b = Bag(b.features.double(), b.mask, b.coords, b.tile_l0, b.mpp, b.sizes)
    far = there(b, torch.float64)
    with torch.no_grad():
        one, other = here.eval()(b), gone.eval()(far)
        torch.testing.assert_close(other.logits.cpu(), one.logits)
        torch.testing.assert_close(other.scores.cpu(), one.scores)
    single = bag(61)
    single = Bag(single.features.double(), single.mask, single.coords, single.tile_l0, single.mpp, single.sizes)
    for key, value in mined(here, single, TWO).items():
        np.testing.assert_allclose(mined(gone, there(single, torch.float64), TWO)[key], value, rtol=1e-5, atol=1e-6)
    if name == "dtfd":
        return  # its pseudo-bags are drawn on the device
    losses = []
    for model, batch in ((here.train(), b), (gone.train(), far)):
        torch.manual_seed(0)
        named = model.losses(batch, target(2).to(batch.features.device), TWO)
        sum(named.values()).backward()
        losses.append({k: v.item() for k, v in named.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for (key, p), (_, q) in zip(here.named_parameters(), gone.named_parameters(), strict=True):
        if p.grad is not None:
            # position codes are float32, and the sines of two devices differ in the last bit
            least = 1e-6 * float(p.grad.abs().max()) + 1e-9
            torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-5, atol=least, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", golden.NAMES)
def test_golden_answers(name: str) -> None:
    case = golden.Recorded(name)
    b = there(case.bag(), torch.float64)
    with torch.no_grad():
        golden.close(case.model.to(GPU).eval()(b).logits.cpu(), case["test_logits"])


@pytest.mark.parametrize("task", TASKS)
@more
def test_no_step_waits_for_the_host(name: str, extra: dict[str, object], task: str) -> None:
    """Batches from RAM, teacher, student, backward, optimiser, EMA: the host only queues. (TransMIL's grid, which has
    to learn its size, is not the default.)"""
    if {name, extra.get("student")} & {"camil", "smabmil"}:
        pytest.skip("a table of neighbours has the size of the tissue, which only the places tell")
    t = TASKS[task]
    values = [(5.0, 1.0), (7.0, 0.0)] if t.survival else [0, 1]
    model = make(name, extra, t.n_out).to(GPU).train()
    data = [arrays(200, s) for s in range(2)]
    feed = Feed(
        [Case(str(i), (str(i),), v, lambda a=a: a) for i, (v, a) in enumerate(zip(values, data, strict=True))],
        t,
        GPU,
        1e9,
        (np.zeros(DIM, np.float32), np.ones(DIM, np.float32)),
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def epoch() -> None:
        for batch in feed.batches([[0], [1]]):
            assert batch.target is not None
            torch.stack(list(model.losses(batch.bag, batch.target, t).values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.after_step()

    epoch()  # what is made once may wait
    epoch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def cases(n: int = 8, survival: bool = False) -> list[Case]:
    made = []
    for i in range(n):
        x, coords, edge = arrays(100 + 37 * i, i)
        x = (x + i % 2).astype(np.float16)
        value = (float(1 + i), float(i % 3 != 0)) if survival else i % 2
        made.append(Case(f"P{i}", (f"S{i}",), value, lambda a=(x, coords, edge): a))
    return made


@more
def test_the_same_bytes_again_and_from_every_epoch(name: str, extra: dict[str, object]) -> None:
    """Deterministic kernels exist for all that a model does, and a training that was killed ends as if it was not."""
    config = TrainConfig(epochs=3, lr=0.01, patience=0, standardize=True, cache_gb=0.0 if "merge" in extra else 1.0)
    data = cases()

    def fit(start: object = None, within: bool = False) -> list[train.State]:
        with train.seeded(1):
            model = make(name, extra).to(GPU)
        return list(train.fit(model, data, cases(4), TWO, config, 7, start, lambda: within))  # type: ignore[arg-type]

    whole = fit()
    assert flat_bytes(fit()[-1]) == flat_bytes(whole[-1])
    inside = [s for s in fit(within=True) if s["within"] is not None]
    for state in (*whole[:-1], inside[1], inside[-2]):
        torch.rand(3, device=GPU)
        assert flat_bytes(fit(through_disk(state))[-1]) == flat_bytes(whole[-1])


@pytest.mark.parametrize(
    "changes", [{"amp": True}, {"batch_bags": 3, "accumulate": 2, "max_tiles": 60}, {"cox_bags": 4}], ids=str
)
def test_settings_of_the_loop_keep_it_deterministic(changes: dict[str, object]) -> None:
    survival = "cox_bags" in changes
    task = TASKS["cox"] if survival else TWO
    config = TrainConfig(epochs=2, lr=0.01, patience=0).model_copy(update=changes)
    data = cases(survival=survival)
    ends = []
    for _ in range(2):
        with train.seeded(1):
            model = make("mhim", {}, task.n_out).to(GPU)
        states = list(train.fit(model, data, data[:4], task, config, 7))
        ends.append(flat_bytes(states[-1]))
        assert np.isfinite(states[-1]["history"][-1]["loss"])
    assert ends[0] == ends[1]


def test_training_and_scoring_agree_with_the_cpu() -> None:
    """Trained on either device from the same weights, the answers are close (without random numbers in between)."""
    found = []
    for device in ("cpu", "cuda"):
        model = still(make("abmil", {})).to(device)
        config = TrainConfig(epochs=5, lr=0.01, patience=0, standardize=True)
        state = list(train.fit(model, cases(), [], TWO, config, 7))[-1]
        found.append(np.stack([p.logits for p in train.predict(model, cases(6), TWO, train.scale_of(state))]))
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3, atol=2e-4)


def test_empty_and_single_bags_of_a_batch() -> None:
    data = [arrays(n, n) for n in (0, 1, 40)]
    feed = Feed([Case(str(i), (str(i),), i % 2, lambda a=a: a) for i, a in enumerate(data)], TWO, GPU, 1e9)
    for cached in (False, True):
        (batch,) = feed.batches([[0, 1, 2]]) if not cached else [feed.batch([0, 1, 2])]
        expected = bag(40, seed=40).features[0]
        torch.testing.assert_close(batch.bag.features[2].cpu(), expected)
        assert batch.bag.mask.sum(1).tolist() == [0, 1, 40]
        assert batch.bag.sizes == (0, 1, 40)
