"""The alarm, the fallback by validation and the cells of a grid are counted: how many of how many."""

from __future__ import annotations

from typing import Any

import pytest

from mhim.pipeline.training import choices
from mhim.pipeline.training.card import Card, DrawnRecord
from tests.pipeline import records

ALARM = {"from": "mhim", "why": "training loss 2.1 with whole bags, against 0.4 of the plain model"}
BEATEN = {"from": "mhim", "by": "validation", "why": "validation AUC 0.6, against 0.7 of the plain model"}


def card(fold: int, fallback: dict[str, str] | None = None, allowed: float | None = 0.1, model: str = "mhim") -> Card:
    told: dict[str, Any] = {"fallback": fallback} if fallback else {}
    told |= {"taught": True} if model == "mhim" else {}
    used = "abmil" if fallback else model
    return records.card(fold=fold, model=used, train={"model": model, "fallback": allowed}, **told)


def test_both_ways_to_fall_back_are_counted_and_the_model_keeps_its_name() -> None:
    cards = [card(0, ALARM), card(1), card(2, BEATEN), card(3, BEATEN), card(4)]
    found = choices.count(cards)
    assert (found.trainings, found.watched, found.alarm, found.validation) == (5, 5, 1, 2)
    (line,) = choices.lines(found)
    assert "1 of 5 trainings by the alarm, 2 of 5 by validation; 2 of 5 kept their own model" in line
    assert cards[0].asked == "mhim"  # a first fold that fell back does not rename the run


def test_students_that_hardly_trained_are_counted_and_told() -> None:
    own = {"model_params": {"student_start": "teacher"}}
    early = card(0).model_copy(update={"epoch": 2, "epochs": 20, **own})
    later = card(1).model_copy(update={"epoch": 4, "epochs": 20, **own})
    found = choices.count([early, later, card(2).model_copy(update=own)])
    assert found.early == 1  # epoch 1 of 2 is no early one
    assert "an epoch up to 3 was kept in 1 of 3 taught trainings" in choices.lines(found)[1]
    assert "early" not in choices.count([card(0)]).plain()
    fresh = early.model_copy(update={"model_params": {"student_start": "fresh"}})  # the published form
    assert choices.count([fresh]).early is None, "it did not start from the plain model"
    drawn = early.model_copy(update={"drawn": DrawnRecord(number=1, draws=2)})  # of a search too
    assert choices.count([drawn]).early == 1


def test_none_of_many_is_a_count_too() -> None:
    (line,) = choices.lines(choices.count([card(k) for k in range(3)]))
    assert "0 of 3 trainings by the alarm, 0 of 3 by validation; 3 of 3" in line


@pytest.mark.parametrize(
    ("cards", "said"),
    [
        ([card(0, allowed=None)], "no fallback to the plain model was allowed"),
        ([card(0, model="abmil")], None),
    ],
)
def test_what_could_not_be_chosen_is_not_counted(cards: list[Card], said: str | None) -> None:
    lines = choices.lines(choices.count(cards))
    assert [said in line for line in lines] == [True] if said else lines == []


def test_cells_of_a_grid_are_counted_by_fold_not_by_seed() -> None:
    cards = [card(k, model="abmil") for k in (0, 0, 1, 1, 2, 2)]  # two seeds each
    found = choices.count(cards, ["lr-0.1", "lr-0.1", "lr-0.2", "lr-0.2", "lr-0.1", "lr-0.1"], offered=3)
    assert found.grid is not None
    assert found.grid.plain() == {"cells": 3, "folds": 3, "chosen": {"lr-0.1": 2, "lr-0.2": 1}}
    (line,) = choices.lines(found)
    assert "grid of 3 cells" in line
    assert "lr-0.1 in 2 of 3 folds, lr-0.2 in 1 of 3 folds" in line
