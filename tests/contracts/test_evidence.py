"""Maps tested against the model: smaller bags answer as the model does, and the numbers are those counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mhim.mil import evidence, tasks
from mhim.mil.bags import collate
from mhim.mil.models import Bag
from tests.contracts.test_models import CASES, DIM, IDS, make

TWO = tasks.Classification(classes=("no", "yes"))


def bag_of(n: int, seed: int = 0) -> tuple[Bag, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIM)).astype(np.float32)
    coords = (np.stack([np.arange(n) % 5, np.arange(n) // 5], 1) * 256).astype(np.int32)

    def of(rows: np.ndarray) -> Bag:
        return collate([(x[rows], coords[rows], 256.0)], 0.5, torch.device("cpu"))

    return of(np.arange(n)), of


@pytest.mark.parametrize(("name", "extra"), CASES, ids=IDS)
def test_embedded_once_answers_as_the_model_does(name: str, extra: dict[str, Any]) -> None:
    model = make(name, extra).eval()
    whole, of = bag_of(23)
    embedded = evidence.Embedded(model, whole)
    for rows in (np.arange(23), np.array([3, 4, 17, 8, 22]), np.array([9])):
        with torch.inference_mode():
            wanted = model(of(np.sort(rows))).logits
        torch.testing.assert_close(embedded.logits(rows).float(), wanted, rtol=1e-4, atol=1e-5)


# whose tiles do not look at each other: what is drawn as `probability` is what the model says of the tile alone
ALONE = ("abmil", "abmilx", "acmil", "aem", "clam_mb", "clam_sb", "dsmil", "dtfd", "gated_abmil", "lse", "max", "mean")


@pytest.mark.parametrize("name", ALONE)
def test_evidence_of_a_tile_is_the_answer_about_a_bag_of_it_alone(name: str) -> None:
    model = make(name, {}).eval()
    whole, of = bag_of(9)
    with torch.inference_mode():
        told = model(whole).evidence
        alone = torch.stack([model(of(np.array([k]))).logits[0] for k in range(9)])
    assert told is not None
    less = alone - told[0]
    torch.testing.assert_close(less, less[:1].expand_as(less), rtol=1e-4, atol=1e-5, msg="but for the bias, the same")


class Counted:
    """An answer that is the share of the tiles 0..4 at hand; counts the tiles that it is asked about."""

    def __init__(self) -> None:
        self.tiles = 0

    def __call__(self, rows: np.ndarray) -> float:
        self.tiles += len(rows)
        return float(np.isin(np.arange(5), rows).sum() / 5)


def test_numbers_of_a_true_a_random_and_a_false_map() -> None:
    n = 320
    true = np.zeros(n)
    true[:5] = [5, 4, 3, 2, 1]
    answer = Counted()
    found = evidence.of_map(true, answer)
    assert found.ks == (2, 10, 40, 160, 320)
    assert found.kept == (0.4, 1, 1, 1, 1)
    assert found.left == (0, 0)  # without 160 and 10 tiles
    assert sorted(found.smallest) == [0, 1, 2, 3, 4]
    assert found.gain == pytest.approx(4.4 / 5)
    told = found.numbers(n)
    assert (told["sufficiency"], told["necessity"]) == (1, 1), "of a 32nd of the tiles: 10"
    assert (told["smallest_tiles"], told["smallest_share"]) == (5, 5 / n)
    assert answer.tiles < 2.3 * n, "all bags together"
    false = evidence.of_map(-true, Counted())
    assert false.gain < -0.7
    assert len(false.smallest) == n, "the last tile is needed"
    shuffled = np.random.default_rng(0).permutation(n).astype(float)
    assert abs(evidence.of_map(shuffled, Counted()).gain) < 0.5


def test_a_bag_of_one_tile() -> None:
    found = evidence.of_map(np.array([0.3]), lambda rows: float(len(rows)))
    assert (found.ks, found.kept, found.left) == ((1,), (1.0,), (0.0, 0.0))
    assert found.numbers(1)["smallest_tiles"] == 1


@pytest.mark.parametrize("kind", ["classes", "number"])
def test_the_answer_is_a_share_of_the_whole_bags(kind: str) -> None:
    task = TWO if kind == "classes" else tasks.regression([1.0, 2.0, 3.0])
    model = make("abmil", {}, n_out=task.n_out).eval()
    whole, of = bag_of(12)
    answer, called = evidence.answer_of([evidence.Embedded(model, whole)], [task])
    assert answer(np.arange(12)) == pytest.approx(1)
    some = np.array([1, 5])
    with torch.inference_mode():
        all_, part = model(whole).logits.double(), model(of(some)).logits.double()
        none = model(
            collate([(np.zeros((0, DIM), np.float32), np.zeros((0, 2), np.int32), 256.0)], 0.5, torch.device("cpu"))
        ).logits.double()
    if kind == "classes":
        p = all_.softmax(1)[0]
        assert called == int(p.argmax())
        assert answer(some) == pytest.approx(float(part.softmax(1)[0, called] / p[called]), rel=1e-5)
    else:
        assert called is None
        value = [float(task.risk(v)) for v in (all_, part, none)]
        assert answer(some) == pytest.approx(1 - abs(value[1] - value[0]) / abs(value[0] - value[2]), rel=1e-4)


def test_pointing_and_froc_where_the_truth_is_known() -> None:
    grid = np.array([[0, 0], [1, 1], [3, 0], [3, 3]])
    true = np.array([True, True, True, False])
    assert evidence.found_in(true, grid).tolist() == [1, 1, 2, 0], "corners touch"
    assert evidence.points(np.array([0.1, 0.9, 0.2, 0.8]), true) is True
    assert evidence.points(np.array([0.1, 0.2, 0.2, 0.8]), true) is False
    assert evidence.points(np.array([0.1]), np.array([False])) is None
    maps = [np.array([0.1, 0.9, 0.2, 0.8]), np.array([0.3, 0.1])]
    truths, findings = [true, np.zeros(2, bool)], [np.array([1, 1, 2, 0]), np.zeros(2, int)]
    # two slides: 1/4 a slide allows no false tile, 1/2 one (.8), 1 two (.3); the finding at .2 is met from then on
    assert evidence.froc(maps, truths, findings) == pytest.approx((0.5 + 0.5 + 1 + 1 + 1 + 1) / 6)
    assert np.isnan(evidence.froc(maps[1:], truths[1:], findings[1:]))
