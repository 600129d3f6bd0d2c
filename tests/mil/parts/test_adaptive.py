"""The mask by evidence: nothing where evidence is a few instances, its share where there is plenty, no kind whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhim.mil.parts import adaptive


def test_evidence_of_a_few_instances_is_never_masked():
    evidence = torch.full((100,), 1e-4)
    evidence[:5] = 1.0  # worth five instances
    assert not adaptive.remove(evidence, evidence, 0.5, 8.0, None, 0).flags.any()


def test_of_plenty_its_share_goes_hardest_first():
    evidence = torch.zeros(100)
    evidence[:40] = torch.linspace(1.2, 1.0, 40)
    flags = adaptive.remove(evidence, evidence, 0.5, 8.0, None, 0).flags
    taken = flags.nonzero()[:, 0]
    assert taken.tolist() == list(range(len(taken)))
    assert evidence[flags].sum() <= 0.5 * evidence.sum() < evidence[: len(taken) + 1].sum()


def test_what_is_left_is_worth_the_few_at_least():
    evidence = torch.zeros(100)
    evidence[:10] = 1.0
    assert int(adaptive.remove(evidence, evidence, 0.1, 8.0, None, 0).flags.sum()) == 2


def test_a_scarce_kind_stays_whole_where_a_plentiful_one_is_masked():
    evidence, kind = torch.zeros(100), torch.zeros(100, dtype=torch.int64)
    evidence[:3], kind[:3] = 2.0, 1  # the scarce kind is the hardest
    evidence[10:40] = 1.0
    whole = adaptive.remove(evidence, evidence, 0.5, 8.0, None, 0).flags
    assert whole[:3].all()
    apart = adaptive.remove(evidence, evidence, 0.5, 8.0, kind, 2).flags
    assert not apart[:3].any()
    assert 10 <= int(apart.sum()) <= 18  # half of 30, and no more than half of all


@settings(max_examples=100)
@given(st.integers(1, 60), st.floats(0.05, 1.0), st.floats(1, 10), st.integers(1, 5), st.integers(0, 999))
def test_no_kind_loses_more_than_the_rule_allows(n, left, few, kinds, seed):
    torch.manual_seed(seed)
    evidence, kind = torch.rand(n) ** 4, torch.randint(kinds, (n,))
    removed = adaptive.remove(torch.rand(n), evidence, left, few, kind, kinds)
    assert removed.low == removed.high == int(removed.flags.sum()) <= n // 2
    assert evidence[removed.flags].sum() <= (1 - left) * evidence.sum() + 1e-4
    for k in range(kinds):
        own = evidence[kind == k].double()
        if not len(own):
            continue
        worth = float(own.sum() ** 2 / own.square().sum())
        gone = evidence[removed.flags & (kind == k)].double().sum() / own.sum()
        assert gone <= max(0.0, min(1 - left, 1 - few / worth)) + 1e-6


def test_fixed_shapes_say_the_same_as_exact_ones(monkeypatch):
    torch.manual_seed(0)
    args = (torch.rand(80), torch.rand(80), 0.5, 4.0, torch.randint(3, (80,)), 3)
    exact = adaptive.remove(*args)
    monkeypatch.setattr(adaptive, "numbers_known", lambda device: False)
    fixed = adaptive.remove(*args)
    assert torch.equal(exact.flags, fixed.flags)
    assert fixed.low <= exact.low <= fixed.high


def test_prototypes_are_the_groups_and_the_same_again():
    torch.manual_seed(0)
    centre = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    bags = [centre[torch.arange(50) % 3] + 0.1 * torch.randn(50, 2) for _ in range(4)]
    found = adaptive.prototypes(bags, 3)
    assert torch.equal(found, adaptive.prototypes(bags, 3))
    assert (torch.cdist(centre, found).amin(1) < 0.2).all()
    assert adaptive.nearest(bags[0], found).unique().numel() == 3
    assert adaptive.nearest(bags[0], adaptive.prototypes([bags[0][:1]] * 2, 3)).tolist() == [0] * 50  # one real centre


def test_many_bags_give_fewer_instances_each(monkeypatch):
    """What is held stays small however many bags there are, and the groups are found all the same."""
    monkeypatch.setattr(adaptive, "ROWS", 100)
    held = []
    real = torch.cat
    monkeypatch.setattr(adaptive.torch, "cat", lambda rows: held.append(sum(map(len, rows))) or real(rows))
    torch.manual_seed(0)
    centre = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    bags = [centre[torch.randint(2, (64,))] + 0.1 * torch.randn(64, 2) for _ in range(40)]
    found = adaptive.prototypes(iter(bags), 2)
    assert held == [80]  # two of each of 40
    assert (torch.cdist(centre, found).amin(1) < 0.2).all()


def test_kinds_are_told_in_float32_also_in_half_precision():
    centres = torch.tensor([[100.0, 0.0], [100.2, 0.0]])
    x = torch.tensor([[100.2, 0.0]] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adaptive.nearest(x, centres).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("rises", "left"),
    [
        ([[0.0] * 4] * 5, 0.3),
        ([[0.2, 0.1, 0.04, 0.0]] * 5, 0.7),
        ([[0.2, 0.2, 0.0, 0.0], [0.2, 0.2, 0.0, 0.0], [0.2, 0.2, 0.12, 0.0]], 0.9),  # the mean, .04, alone would do
        ([[1.0] * 4] * 5, 1.0),
        ([[0.0] * 4], 1.0),  # one bag proves nothing
    ],
)
def test_the_share_is_learnt_from_the_loss_on_masked_validation_bags(rises, left):
    assert adaptive.learnt(torch.tensor(rises, dtype=torch.float64)) == left
