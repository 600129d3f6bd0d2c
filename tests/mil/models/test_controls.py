"""Controls against scikit-learn; what is prepared from a training part; attention entropy for every attention model."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from mhim.configs import lookup
from mhim.configs.schema import TrainConfig
from mhim.mil import tasks, train
from mhim.mil.bags import collate
from mhim.mil.models import MIL, Bag, NoAttention, ibmil
from tests.contracts.test_models import arrays, make, target
from tests.mil.test_train import TWO, WIDTH, cases

MODELS = "mhim.mil.models"


def bags(n: int) -> list[tuple[Bag, torch.Tensor]]:
    """Bags of two classes whose means differ by a little."""
    found = []
    for s in range(n):
        x, coords, tile = arrays(20 + s % 3, s)
        x[:, :2] += 0.3 * (s % 2)
        found.append((collate([(3.0 * x + 5.0, coords, tile)], 0.5), torch.tensor([s % 2])))
    return found


def prepared(name: str, made: list[tuple[Bag, torch.Tensor]]) -> MIL:
    module = lookup.find(MODELS, name)
    model: MIL = module.build(12, 2, module.Params()).eval()
    with torch.no_grad():
        model.prepare(iter(made), TWO)
    return model


def test_the_linear_control_is_a_logistic_regression_on_the_mean_tile() -> None:
    made = bags(40)
    model = prepared("mean_linear", made)
    x = np.stack([b.features[0].mean(0).numpy() for b, _ in made]).astype(np.float64)
    scaler = StandardScaler().fit(x)
    y = [int(t) for _, t in made]
    # two logits share what one has, so that a ridge of 1 on both is one of 1/2 on their difference
    reference = LogisticRegression(C=2.0, max_iter=10_000, tol=1e-10).fit(scaler.transform(x), y)
    with torch.no_grad():
        p = torch.cat([TWO.probabilities(model(b).logits) for b, _ in made]).numpy()
    np.testing.assert_allclose(p[:, 1], reference.predict_proba(scaler.transform(x))[:, 1], atol=1e-4)
    named = model.train().losses(*made[0], TWO)
    assert float(named["ridge"].detach()) > 0


@pytest.mark.parametrize("kind", ["cox", "regression"])
def test_the_controls_take_outcomes_without_classes(kind: str) -> None:
    made = bags(30)
    rng = np.random.default_rng(0)
    values = [(float(rng.exponential(1 + 3 * (s % 2))), 1.0) if kind == "cox" else 2.0 + s % 2 for s in range(30)]
    task = tasks.cox_survival(values) if kind == "cox" else tasks.regression(values, "squared")
    for name in ("mean_linear", "mean_knn"):
        module = lookup.find(MODELS, name)
        model = module.build(12, 1, module.Params()).eval()
        with torch.no_grad():
            model.prepare(((b, task.target([v])) for (b, _), v in zip(made, values, strict=True)), task)
            said = torch.cat([model(b).logits[:, 0] for b, _ in made]).numpy()
        second = np.arange(30) % 2 == 1
        better = said[second].mean() - said[~second].mean()
        assert (better < 0) if kind == "cox" else (better > 0), name


def test_the_neighbours_are_the_nearest_and_never_the_bag_itself_in_training() -> None:
    made = bags(40)
    model = prepared("mean_knn", made)
    x = np.stack([b.features[0].mean(0).numpy() for b, _ in made]).astype(np.float64)
    z = StandardScaler().fit_transform(x)
    near = NearestNeighbors(n_neighbors=11).fit(z).kneighbors(z, return_distance=False)
    answers = model.answers.numpy()  # type: ignore[operator]
    found = torch.cat([model(b).logits for b, _ in made]).detach().numpy()
    np.testing.assert_allclose(found, answers[near[:, :10]].mean(1), atol=1e-5)
    found = torch.cat([model.train()(b).logits for b, _ in made]).detach().numpy()
    np.testing.assert_allclose(found, answers[near[:, 1:]].mean(1), atol=1e-5)
    moved = [
        dataclasses.replace(b, features=b.features + 1e-3) for b, _ in made
    ]  # as bfloat16 or a draw of its tiles moves a bag
    found = torch.cat([model(b).logits for b in moved]).detach().numpy()
    assert np.mean(np.abs(found - answers[near[:, 1:]].mean(1)).max(1) < 1e-5) > 0.8
    fresh = lookup.find(MODELS, "mean_knn").build(12, 2, lookup.find(MODELS, "mean_knn").Params()).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(made[0][0]).logits, model.eval()(made[0][0]).logits)


def test_the_confounders_are_the_means_of_clusters_of_the_first_stages_bags() -> None:
    rng = np.random.default_rng(0)
    raw = np.concatenate([rng.normal(c, 0.05, size=(20, 4)) for c in ([4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 4])])
    found = ibmil.dictionary(torch.from_numpy(raw), 3).numpy()
    wanted = raw.reshape(3, 20, 4).mean(1)
    assert min(np.abs(found[list(o)] - wanted).max() for o in itertools.permutations(range(3))) < 1e-9
    few = ibmil.dictionary(torch.from_numpy(raw[:2]), 3)
    assert few.shape == (3, 4)
    model = make("ibmil", {}).eval()
    before = model.confounders.clone()  # type: ignore[operator]
    with torch.no_grad():
        model.prepare(iter(bags(20)), TWO)
    assert not torch.equal(model.confounders, before)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stage 1 of ibmil do not fit: missing attend\.weight"):
        model.start_from({})  # type: ignore[operator]


ATTENTIVE = ["abmil", "gated_abmil", "clam_sb", "clam_mb", "dsmil", "dtfd", "acmil", "asmil", "dgrmil", "mhim", "camil"]


@pytest.mark.parametrize("name", ATTENTIVE)
def test_the_entropy_of_attention_rises_with_its_weight(name: str) -> None:
    made, flat = collate([arrays(30)], 0.5), {}
    for weight in (0.0, 20.0):
        model = make(name, {}).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(25):
            model.entropy_weight = weight
            named = model.losses(made, target(1), TWO)
            assert ("entropy" in named) == (weight > 0)
            optimizer.zero_grad()
            sum(named.values(), torch.zeros(())).backward()
            optimizer.step()
        with torch.no_grad():
            p = model.eval().encode(model.instances(made)[0], True).attention
        assert p is not None
        flat[weight] = float(-(p * p.clamp_min(1e-30).log()).sum(-1).mean())
    assert flat[20.0] > flat[0.0]


@pytest.mark.parametrize("name", ["mean", "max", "transmil", "simlp"])
def test_a_model_without_attention_that_learns_refuses_the_term(name: str) -> None:
    model = make(name, {}).train()
    model.entropy_weight = 0.1
    with pytest.raises(NoAttention, match=r"train\.attention_entropy"):
        model.losses(collate([arrays(30)], 0.5), target(1), TWO)


def test_the_loop_anneals_the_entropy_of_any_attention_model() -> None:
    module = lookup.find(MODELS, "abmil")
    model = module.build(WIDTH, 2, lookup.params(module, {"width": 8}))
    config = TrainConfig(epochs=4, patience=0, attention_entropy=0.3)
    states = list(train.fit(model, cases(6), [], TWO, config, seed=1))
    terms = [row["entropy"] for row in states[-1]["history"]]
    assert len(terms) == 4
    assert all(a < b <= 0 for a, b in itertools.pairwise(terms))
    plain = module.build(WIDTH, 2, lookup.params(module, {"width": 8}))
    assert "entropy" not in list(train.fit(plain, cases(6), [], TWO, TrainConfig(epochs=1), seed=1))[-1]["history"][0]


def test_a_model_that_needs_another_before_it_is_no_student() -> None:
    module = lookup.find(MODELS, "mhim")
    with pytest.raises(ValueError, match="ibmil needs another model before it"):
        module.build(12, 2, lookup.params(module, {"student": "ibmil"}))


@pytest.mark.parametrize(
    "name", ["abmil", "clam_sb", "acmil", "asmil", "smabmil", "camil", "wikg", "nnmil", "dsmil", "ilra"]
)
def test_bags_packed_into_one_step_are_the_bags_one_by_one(name: str) -> None:
    """A batch has a softmax, a loss and a gradient per bag, nothing of padding: its step is the mean of theirs."""
    sizes = (40, 1, 7, 90)
    given = [arrays(n, seed) for seed, n in enumerate(sizes)]
    still = {k: 0.0 for k in lookup.find(MODELS, name).Params.model_fields if k.endswith("dropout")}
    model = make(name, still | ({"drop": 0} if name == "asmil" else {"top_k": 0} if name == "acmil" else {})).double()
    model.train(name != "nnmil")

    def step(chosen: list[int]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        b = collate([given[i] for i in chosen], 0.5)
        b = dataclasses.replace(b, features=b.features.double())
        loss = sum(model.losses(b, torch.tensor([i % 2 for i in chosen]), TWO).values(), torch.zeros(()))
        loss.backward()
        return float(loss.detach()), [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()
        ]

    together, packed = step([0, 1, 2, 3])
    alone = [step([i]) for i in range(4)]
    assert together == pytest.approx(np.mean([v for v, _ in alone]), rel=1e-12)
    for k, gradient in enumerate(packed):
        mean = torch.stack([g[k] for _, g in alone]).mean(0)
        torch.testing.assert_close(gradient, mean, rtol=1e-12, atol=1e-12 * max(1.0, float(mean.abs().max())))
