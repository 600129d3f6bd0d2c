"""Late fusion: what a missing modality may change, what a weight rests on, and what no score may depend on."""

import json

import numpy as np
import pytest

from mhim.mil import estimators
from mhim.mil.fusion import late, linear, skill

FORMS = ("survival", "classes", "grades", "number")


def _world(form, n=240, seed=0, noise=(0.8, 1.5)):
    """Two modalities' out-of-fold scores of one hidden truth, and the target."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    seen = [truth + s * rng.normal(size=n) for s in noise]
    if form == "survival":
        time = rng.exponential(np.exp(-1.5 * truth))
        target = np.stack([time, (rng.random(n) < 0.7).astype(float)], axis=1)
        scores = [s[:, None] for s in seen]
    elif form == "classes":
        target = (truth > 0).astype(int)
        scores = [np.stack([-s, s], axis=1) for s in seen]
    elif form == "grades":
        target = np.digitize(truth, [-0.5, 0.5])
        scores = [np.stack([s + 0.5, s - 0.5], axis=1) for s in seen]
    else:
        target = 40 + 9 * truth
        scores = [40 + 9 * s[:, None] for s in seen]
    inner = [np.arange(n)[i::4] for i in range(4)]
    return dict(zip(("slide", "rna"), scores, strict=True)), target, inner


def _fit(form, **changes):
    outside, target, inner = _world(form, **changes)
    return late.fit(outside, target, form, inner, 3 if form == "grades" else 2), outside, target


@pytest.mark.parametrize("form", FORMS)
def test_fused_fits_better_than_either_alone(form):
    made, outside, target = _fit(form)
    rows = [{m: s[i] for m, s in outside.items()} for i in range(len(target))]
    losses = {
        names: linear.loss(np.stack([made.score({m: r[m] for m in names}) for r in rows]), target, form)
        for names in (("slide",), ("rna",), ("slide", "rna"))
    }
    assert losses["slide", "rna"] < losses["slide",] < losses["rna",]
    weights = made.patterns["slide", "rna"].weights
    assert weights["slide"] > weights["rna"] > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["slide", "rna"])
def test_all_missing_but_one_is_that_one(form, name):
    """The order of the patients is the member's own, exactly."""
    made, outside, _ = _fit(form)
    own = outside[name]
    fused = np.stack([made.score({name: s}) for s in own])
    column = (lambda s: s[:, 1] - s[:, 0]) if form == "classes" else (lambda s: s[:, 0])
    assert (np.argsort(column(own), kind="stable") == np.argsort(column(fused), kind="stable")).all()


def test_a_useless_modality_keeps_its_own_order_and_moves_nobody_else():
    made, outside, target = _fit("survival", noise=(0.5, 60.0), n=600)
    assert made.patterns["slide", "rna"].weights["rna"] < 0.15
    alone = np.array([made.score({"rna": s})[0] for s in outside["rna"]])
    assert np.abs(alone).max() < 0.6  # nearly in the middle of those who are known better
    assert (np.argsort(alone) == np.argsort(outside["rna"][:, 0])).all()
    full = np.array([made.score({"slide": a, "rna": b})[0] for a, b in zip(*outside.values(), strict=True)])
    c = {}
    for name, risk in {"full": full, "slide": outside["slide"][:, 0]}.items():
        above, below = estimators.concordance_pairs(target[:, 0], target[:, 1], risk, np.ones((1, 600)))
        c[name] = above[0] / below[0]
    assert c["full"] > c["slide"] - 0.005


def test_incomplete_patients_are_fairly_placed():
    """A quarter without slide, a quarter without RNA: ranked at least as well as with a mean for what is gone."""
    made, outside, _ = _fit("survival", n=1200)
    fresh, target, _ = _world("survival", n=1200, seed=9)
    n = len(target)
    has = {"slide": np.arange(n) % 4 != 0, "rna": np.arange(n) % 4 != 1}
    risk = np.array([made.score({m: fresh[m][i] for m in fresh if has[m][i]})[0] for i in range(n)])
    plain = sum(
        np.where(has[m], (fresh[m][:, 0] - outside[m].mean()) / outside[m].std(), 0.0) * w
        for m, w in made.patterns["slide", "rna"].weights.items()
    )

    def c(values):
        above, below = estimators.concordance_pairs(target[:, 0], target[:, 1], values, np.ones((1, n)))
        return above[0] / below[0]

    assert c(risk) > c(plain) - 0.002
    assert c(risk) > c(np.where(has["rna"], fresh["rna"][:, 0], 0.0)) + 0.03


@pytest.mark.parametrize("form", FORMS)
def test_parts_add_up_and_json_loses_nothing(form):
    made, outside, _ = _fit(form)
    again = late.from_json(json.loads(json.dumps(made.to_json())))
    given = {m: s[5] for m, s in outside.items()}
    assert (again.score(given) == made.score(given)).all()
    total = sum(made.parts(given).values()) + np.array(made.pattern(given).offset)
    assert total == pytest.approx(made.score(given), abs=1e-12)


def test_patients_without_a_modality_train_too():
    outside, target, inner = _world("survival")
    outside["rna"][::3] = np.nan
    made = late.fit(outside, target, "survival", inner)
    assert made.patterns["slide",].patients == 240
    assert made.patterns["slide", "rna"].patients == 160
    assert np.isfinite(made.score({"rna": np.array([0.3])})).all()


def test_none_at_hand_and_none_in_training_are_told():
    made, _, _ = _fit("survival")
    with pytest.raises(late.FusionError, match="none of the modalities slide, rna"):
        made.score({})
    outside, target, inner = _world("survival")
    with pytest.raises(late.FusionError, match="no patient of the training part has scores of rna"):
        late.fit(outside | {"rna": outside["rna"] * np.nan}, target, "survival", inner)


def test_skill_is_the_concordance_inside_inner_folds_and_its_error_is_right():
    outside, target, inner = _world("survival")
    found = skill.of(outside["slide"], target, "survival", inner)
    pairs = [
        estimators.concordance_pairs(target[i, 0], target[i, 1], outside["slide"][i, 0], np.ones((1, len(i))))
        for i in inner
    ]
    assert found.value + 0.5 == pytest.approx(sum(p[0][0] for p in pairs) / sum(p[1][0] for p in pairs), abs=1e-12)
    several = [
        skill.of(o["slide"], t, "survival", i).value for o, t, i in (_world("survival", seed=s) for s in range(60))
    ]
    assert np.sqrt((found.influence**2).sum()) == pytest.approx(np.std(several), rel=0.35)


def test_weights_follow_the_evidence():
    """The same difference of skill counts more the more patients it is of; without skill all are equal."""

    rng = np.random.default_rng(0)

    def weight(n):
        noise = rng.normal(size=(2, n)) * 0.8 / n  # the error of a concordance falls as 1 / sqrt(n)
        return skill.weights([skill.Skill(v, e) for v, e in zip((0.2, 0.05), noise, strict=True)])[0]

    few, some, many = (weight(n) for n in (40, 150, 20_000))
    assert 0.5 <= few < some < many
    assert few < 0.7
    assert many == pytest.approx(0.8, abs=0.01)
    none = skill.Skill(-0.1, np.zeros(10))
    assert skill.weights([none, none]).tolist() == [0.5, 0.5]
    assert skill.weights([none]).tolist() == [1.0]
