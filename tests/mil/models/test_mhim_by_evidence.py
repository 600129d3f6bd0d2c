"""MHIM with the mask by evidence: kinds and the share are learnt before the first step, kept, and shown in maps."""

import dataclasses

import numpy as np
import pytest
import torch

from mhim.configs.schema import TrainConfig, fingerprint_fields
from mhim.mil import mining, train
from mhim.mil.bags import collate
from mhim.mil.feed import Case
from mhim.mil.models import NoAttention, mhim
from mhim.mil.tasks import Classification, from_json

TASK = Classification(classes=("a", "b"))
STUDENT = {"student": "abmil", "student_params": {"width": 16, "attention_width": 8}}


def made(n, seed=0, size=40):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        x = rng.normal(size=(size, 6)).astype(np.float32)
        x[: size // 2, 0] += 3.0 * (i % 2)
        coords = np.stack([np.arange(size), np.zeros(size)], 1).astype(np.int32)
        found.append(Case(f"{seed}-{i}", (f"{i}",), i % 2, lambda x=x, c=coords: (x, c, 1.0)))
    return found


def model(**params):
    with train.seeded(1):
        return mhim.build(6, 2, mhim.Params(**STUDENT, mask="evidence", **params))


def test_settings_of_before_keep_their_fingerprint():
    fields = fingerprint_fields(mhim.Params())
    assert not {"mask", "evidence_left", "evidence_few", "kinds", "learn_left"} & fields.keys()
    with pytest.raises(ValueError, match="mask=evidence"):
        mhim.Params(kinds=3)


@pytest.mark.parametrize(
    "other", [{"mask_ratio": 0.1}, {"mask_ratio_l": 0.1}, {"mask_ratio_hr": 0.5}, {"mask_decay": "cosine"}]
)
def test_no_other_mask_is_asked_for_and_then_not_made(other):
    with pytest.raises(ValueError, match=f"{next(iter(other))} is of mask=rate"):
        mhim.Params(mask="evidence", **other)
    assert mhim.Params(**other).mask == "rate"


def test_a_student_that_does_not_tell_its_instances_part_is_named():
    with train.seeded(1):
        net = mhim.build(6, 2, mhim.Params(student="mean_knn", mask="evidence", merge="none"))
    bag = collate([made(1)[0].load()], 0.5)
    with pytest.raises(NoAttention, match=r"student mean_knn.*train\.model_params\.mask=rate"):
        net.losses(bag, torch.tensor([0]), TASK)


def test_kinds_and_share_are_learnt_once_and_a_resumed_training_ends_in_the_same_bytes():
    config = TrainConfig(epochs=3, patience=0, lr=1e-3)
    states = list(train.fit(model(kinds=3, learn_left=True), made(8), made(6, 1), TASK, config, 5))
    first, last = states[0]["model"], states[-1]["model"]
    assert first["kinds"].unique(dim=0).shape == (3, 6)
    assert torch.equal(first["kinds"], last["kinds"])
    assert float(last["left"]) in (0.3, 0.5, 0.7, 0.9, 1.0)
    again = list(train.fit(model(kinds=3, learn_left=True), made(8), made(6, 1), TASK, config, 5, start=states[0]))
    assert all(torch.equal(v, last[k]) for k, v in again[-1]["model"].items())


def test_without_validation_the_share_stays_as_it_is_set():
    config = TrainConfig(epochs=1, patience=0)
    (state,) = train.fit(model(learn_left=True, evidence_left=0.6), made(4), [], TASK, config, 5)
    assert float(state["model"]["left"]) == 0.6


def test_a_teacher_that_loses_its_answer_on_masked_bags_masks_nothing():
    net = model(learn_left=True)
    net.eval()
    torn = {0: 0.0, 1: 5.0}
    batches = [(None, torch.tensor([i % 2])) for i in range(6)]
    net._rises = lambda bag, target, task: torch.full((4,), torn[int(target)], dtype=torch.float64)
    net.calibrate(batches, TASK)
    assert float(net.left) == 1.0
    assert net.calibrated() == {"evidence_left": 1.0}
    assert model().calibrated() == {}
    torn[1] = 0.0
    net.calibrate(batches, TASK)
    assert float(net.left) == 0.3


def test_maps_show_what_the_mask_takes():
    net = model()
    config = TrainConfig(epochs=8, patience=0, lr=5e-3)
    for _ in train.fit(net, made(12), [], TASK, config, 5):
        pass
    case = made(2, 3)[1]
    bag = collate([case.load()], 0.5)
    found = mining.of(net.eval(), bag, TASK)
    seen = net.assess(*_parts(bag))[0]
    want = net.removed(seen, bag.features[0], net.score(seen, 40, TASK), TASK, 0.5).flags
    assert np.array_equal(found["masked"], want.numpy().astype(np.float32))
    assert 0 < want.sum() <= 20


def _parts(bag):
    return bag.features[0], [40], [None]


def test_a_task_of_several_shares_its_evidence():
    several = from_json({"kind": "several", "targets": {"x": TASK.to_json(), "y": TASK.to_json()}})
    each = several.evidence(torch.tensor([[5.0, 0, 0, 0], [0, 0, 0, 0.1], [0, 0, 0, 0]]), torch.zeros(4))
    assert torch.allclose(each, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    assert dataclasses.is_dataclass(several)
