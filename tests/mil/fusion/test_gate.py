"""Gated fusion: what a missing modality may change, and that it learns whom to believe when."""

import json

import numpy as np
import pytest

from mhim.mil.fusion import gate, late, linear
from tests.mil.fusion.test_late import FORMS, _world


@pytest.mark.parametrize("form", FORMS)
def test_one_modality_at_hand_is_that_member(form):
    outside, target, inner = _world(form, n=120)
    made = gate.fit(outside, target, form, inner, 3 if form == "grades" else 2)
    column = (lambda s: s[:, 1] - s[:, 0]) if form == "classes" else (lambda s: s[:, 0])
    for name, own in outside.items():
        fused = np.stack([made.score({name: s}) for s in own])
        assert (np.argsort(column(own), kind="stable") == np.argsort(column(fused), kind="stable")).all()
        assert made.weights({name: own[0]}) == {name: 1.0}
    given = {m: s[5] for m, s in outside.items()}
    assert sum(made.weights(given).values()) == pytest.approx(1.0)
    assert sum(made.parts(given).values()) + made.offset == pytest.approx(made.score(given))
    again = gate.from_json(json.loads(json.dumps(made.to_json())))
    assert (again.score(given) == made.score(given)).all()
    assert (gate.fit(outside, target, form, inner, 3 if form == "grades" else 2).to == made.to).all()


def test_it_learns_whom_to_believe_when():
    """RNA that tells the truth only where it is loud: the gate leans on it there, and late fusion cannot."""
    rng = np.random.default_rng(0)
    n = 800
    truth, loud = rng.normal(size=n), rng.random(n) < 0.5
    rna = np.where(loud, 3.0 * np.sign(truth), 0.0) + 0.1 * rng.normal(size=n)
    slide = truth + rng.normal(size=n)
    target = 5.0 * truth
    outside = {"slide": slide[:, None], "rna": rna[:, None]}
    inner = [np.arange(n)[i::4] for i in range(4)]
    made, plain = gate.fit(outside, target, "number", inner), late.fit(outside, target, "number", inner)
    rows = [{m: s[i] for m, s in outside.items()} for i in range(n)]
    losses = [linear.loss(np.stack([m.score(r) for r in rows]), target, "number") for m in (made, plain)]
    assert losses[0] < losses[1]


def test_none_at_hand_is_told():
    outside, target, inner = _world("survival", n=60)
    with pytest.raises(late.FusionError, match="none of the modalities"):
        gate.fit(outside, target, "survival", inner).weights({})
