"""A network of several modalities as one more member of late fusion."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mhim.mil.fusion import joined, late
from mhim.mil.fusion.joined import JOINT, Joined, key

N = 120
INNER = [np.arange(i, N, 3) for i in range(3)]


def answers(seed: int = 0, useful: bool = True) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Scores of slide and rna, each with half of the truth, and of a network that knows all of it, or nothing."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(N, 2))
    target = half.sum(axis=1) + 0.3 * rng.normal(size=N)
    knows = target if useful else rng.normal(size=N)
    outside = {"slide": half[:, :1] + 0.5 * rng.normal(size=(N, 1)), "rna": half[:, 1:] + 0.5 * rng.normal(size=(N, 1))}
    outside["rna"][:10] = np.nan
    network = (knows + 0.1 * rng.normal(size=N))[:, None]
    network[:10] = np.nan
    return outside | {key(("slide", "rna")): network}, target


def fitted(outside: dict[str, np.ndarray], target: np.ndarray) -> Joined:
    return joined.fit(outside, target, "number", INNER)


def test_the_network_weighs_what_it_knows() -> None:
    outside, target = answers()
    good = fitted(outside, target).patterns["slide", "rna"].weights
    bad = fitted(*answers(useful=False)).patterns["slide", "rna"].weights
    assert good[JOINT] > max(good["slide"], good["rna"])
    assert bad[JOINT] < 0.1
    assert sum(good.values()) == pytest.approx(1.0)
    assert fitted(outside, target).skill[JOINT] > fitted(outside, target).skill["slide"]


def test_one_modality_alone_is_answered_as_without_a_network() -> None:
    outside, target = answers()
    made = fitted(outside, target)
    plain = late.fit({m: outside[m] for m in ("slide", "rna")}, target, "number", INNER)
    given = {m: s[50] for m, s in outside.items()}
    for m in ("slide", "rna"):
        other = {k: v for k, v in given.items() if k != m}
        assert made.score(other) == plain.score({k: v for k, v in other.items() if k in plain.names})
        assert JOINT not in made.weights(other)
    # and without the network's answer both are weighed as in late fusion
    both = {m: given[m] for m in plain.names}
    assert made.score(both) == plain.score(both)
    assert made.score(given) != plain.score(both)
    pattern = made.patterns["slide", "rna"]
    assert sum(made.parts(given).values()) + np.array(pattern.offset) == pytest.approx(made.score(given), abs=1e-12)


def test_it_is_kept_as_plain_values() -> None:
    outside, target = answers()
    made = fitted(outside, target)
    again = joined.from_json(json.loads(json.dumps(made.to_json())))
    for i in (3, 50):
        given = {m: s[i] for m, s in outside.items() if np.isfinite(s[i]).all()}
        assert again.score(given) == made.score(given)
        assert again.weights(given) == made.weights(given)


def test_a_network_of_another_scale_is_read_in_its_own() -> None:
    outside, target = answers()
    made, k = fitted(outside, target), key(("slide", "rna"))
    other = {k: outside[k][10:] * 7.0 + 2.0}
    moved = made.rescaled(other)
    same = made.rescaled({k: outside[k][10:]})
    given = {m: s[50] for m, s in outside.items()}
    assert moved.score(given | {k: given[k] * 7.0 + 2.0}) == pytest.approx(same.score(given), abs=1e-12)
