"""The co-attention network: what its tokens are, what it computes, and that any modality may be absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mhim.mil import tasks
from mhim.mil import train as loop
from mhim.mil.bags import collate
from mhim.mil.feed import Case, Feed
from mhim.mil.fusion import coattn, columns
from mhim.mil.fusion.coattn import CoAttention, Params
from mhim.mil.fusion.rows import Rows
from mhim.mil.models import Bag
from mhim.pipeline.training.fold import whole_params
from tests.pipeline.trained import settings

N, DIM = 12, 5
NAMES = tuple(f"p{i:02d}" for i in range(N))


def table(seed: int = 0, grouped: bool = True, lacking: int = 2) -> Rows:
    """Seven genes, five of them in two groups that share one; the last `lacking` patients have no known cell."""
    values = np.random.default_rng(seed).normal(size=(N, 7))
    values[N - lacking :] = np.nan
    genes = tuple(f"G{i}" for i in range(7))
    groups = {"A": genes[:3], "B": genes[2:5]} if grouped else {}
    return Rows(NAMES, genes, values, {}, groups)


def known(**given: Rows) -> dict[str, columns.Columns]:
    return {n: columns.fit(r, columns.Options(smallest_group=2)) for n, r in given.items()}


def bags(sizes: list[int], numbers: np.ndarray, seed: int = 0) -> Bag:
    rng = np.random.default_rng(seed)
    each = [(rng.normal(size=(n, DIM)).astype(np.float32), np.zeros((n, 2), np.int32), 1.0) for n in sizes]
    bag = collate(each, 0.5)
    return Bag(bag.features, bag.mask, bag.coords, bag.tile_l0, 0.5, bag.sizes, torch.from_numpy(numbers))


def network(made: dict[str, columns.Columns], **params: object) -> CoAttention:
    with loop.seeded(0):
        return coattn.build(DIM, 2, made, Params.model_validate({"width": 8, "hidden": 6} | params)).eval()


def test_a_token_is_a_group_and_the_other_columns_are_one_more() -> None:
    made = known(rna=table(), clinical=table(1, grouped=False))
    found = coattn.tokens(made)
    assert [(t.table, t.name, t.at) for t in found] == [
        ("rna", "A", (0, 1, 2)), ("rna", "B", (2, 3, 4)), ("rna", coattn.REST, (5, 6)),
        ("clinical", coattn.REST, tuple(range(7, 14))),
    ]  # fmt: skip
    # a table without a group is told by its columns all the same
    assert [(t.table, t.name) for t in coattn.tokens(made, rest=False)] == [
        ("rna", "A"), ("rna", "B"), ("clinical", coattn.REST),
    ]  # fmt: skip
    values = coattn.numbers(made, {"rna": table()}, ["p03", "p11", "stranger"])
    np.testing.assert_array_equal(values[:, 14:], [[1, 0], [0, 0], [0, 0]])
    np.testing.assert_allclose(values[0, :7], made["rna"].matrix(table().of(["p03"]))[0], rtol=1e-6)
    assert not values[1:].any()


def test_the_formula_by_hand() -> None:
    made = known(rna=table())
    net = network(made, layers=0, heads=2)
    values = coattn.numbers(made, {"rna": table()}, ["p00"])
    bag = bags([4], values)
    z, x = torch.from_numpy(values)[0], bag.features[0]
    t = torch.stack([f(z[list(of.at)][None])[0] for f, of in zip(net.networks, net.tokens, strict=True)])
    h = torch.relu(x @ net.tile.linear.weight.T + net.tile.linear.bias)
    found = torch.zeros(3, 8)
    for head in (slice(0, 4), slice(4, 8)):
        a = torch.softmax(net.query(t)[:, head] @ net.key(h)[:, head].T / 2.0, dim=1)  # sqrt(8 / 2)
        found[:, head] = a @ net.value(h)[:, head]
    u = net.norm(t + net.out(found))

    def pooled(pool: coattn.Pool, rows: torch.Tensor) -> torch.Tensor:
        s = pool.score(torch.tanh(pool.what(rows)) * torch.sigmoid(pool.gate(rows)))[:, 0]
        return torch.softmax(s, 0) @ rows

    wanted = net.head(torch.cat([pooled(net.pool_tokens, u), pooled(net.pool_tiles, h)]))
    torch.testing.assert_close(net(bag).logits[0], wanted)
    torch.testing.assert_close(net.attention(bag).sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("params", [{}, {"token_network": "mlp", "heads": 4, "layers": 2}])
def test_each_patient_is_answered_by_itself_whatever_it_lacks(params: dict[str, object]) -> None:
    made = known(rna=table(), clinical=table(1, grouped=False, lacking=0))
    net = network(made, **params)
    rows = {"rna": table(), "clinical": table(1, grouped=False, lacking=0)}
    values = coattn.numbers(made, rows, NAMES[-4:])  # the last two lack rna
    whole = net(bags([3, 0, 5, 0], values))
    assert torch.isfinite(whole.logits).all()
    every = bags([3, 0, 5, 0], values)
    for i in range(4):
        n = every.sizes[i]  # type: ignore[index]
        one = Bag(every.features[i : i + 1, :n], every.mask[i : i + 1, :n], every.coords[i : i + 1, :n],
                  every.tile_l0[i : i + 1], 0.5, (n,), every.numbers[i : i + 1])  # type: ignore[index]  # fmt: skip
        torch.testing.assert_close(net(one).logits[0], whole.logits[i])
        if n:
            torch.testing.assert_close(whole.scores[i, :n].sum(), torch.tensor(1.0))
    # what is absent may hold anything
    changed = values.copy()
    changed[-1, : len(made["rna"].features)] = 99.0
    torch.testing.assert_close(net(bags([3, 0, 5, 0], changed)).logits, whole.logits)


def test_a_withheld_modality_is_an_absent_one_and_nobody_is_left_without_any() -> None:
    made = known(rna=table(), clinical=table(1, grouped=False))
    net = network(made)
    rows = {"rna": table(), "clinical": table(1, grouped=False)}
    values = coattn.numbers(made, rows, ["p00"])
    answers = net.answers(bags([4], values), [[True, True, True], [True, False, True], [False, True, True]])
    torch.testing.assert_close(answers[0], net(bags([4], values)).logits[0])
    without = coattn.numbers(made, {"clinical": rows["clinical"]}, ["p00"])
    torch.testing.assert_close(answers[1], net(bags([4], without)).logits[0])
    torch.testing.assert_close(answers[2], net(bags([0], values)).logits[0])
    assert len({tuple(a.tolist()) for a in answers}) == 3
    net.train()
    net.params = net.params.model_copy(update={"modality_dropout": 0.9})
    kept = net._kept([[True, True, False]] * 200)
    assert all(any(k) and not k[2] for k in kept)
    assert {tuple(k) for k in kept} == {(True, True, False), (True, False, False), (False, True, False)}


def test_it_learns_what_neither_modality_tells_alone() -> None:
    """The outcome is whether tile and gene have one sign: no weighing of answers of each alone can know it."""
    rng = np.random.default_rng(0)
    names = tuple(f"p{i}" for i in range(60))
    sign = rng.integers(0, 2, size=(60, 2)) * 2 - 1
    genes = Rows(names, ("G",), sign[:, :1] + rng.normal(size=(60, 1)) * 0.1, {}, {})
    made = known(rna=genes)
    values = coattn.numbers(made, {"rna": genes}, names)

    def case(i: int) -> Case:
        x = np.random.default_rng(i).normal(size=(6, DIM)).astype(np.float32) * 0.1
        x[:, 0] += sign[i, 1]
        load = lambda: (x, np.zeros((6, 2), np.int32), 1.0)  # noqa: E731
        return Case(names[i], ("s",), int(sign[i, 0] == sign[i, 1]), load, 0.5, values[i])

    config = whole_params(settings(epochs=12, lr=0.02, batch_bags=8, select="last").train)
    task = tasks.classification(("no", "yes"), [case(i).target for i in range(60)])  # type: ignore[misc]
    net = network(made, modality_dropout=0.1, dropout=0.0)
    for _ in loop.fit(net, [case(i) for i in range(40)], [], task, config, 0):
        pass
    held = Feed([case(i) for i in range(40, 60)], task, torch.device("cpu"))
    assert loop.evaluate(net, held, task)["auc"] > 0.9


def test_heads_share_the_width() -> None:
    with pytest.raises(ValueError, match="width 8 is not a multiple of 3"):
        network(known(rna=table()), heads=3)
