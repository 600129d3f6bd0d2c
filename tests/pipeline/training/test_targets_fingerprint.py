"""What a table is fitted on is in its fingerprint, whatever the task comes to be made of."""

from __future__ import annotations

import ast
import inspect

from mhim.configs.schema import TrainConfig
from mhim.pipeline.resume import fingerprints
from mhim.pipeline.training import targets

CHANGED = TrainConfig(
    task="ordinal",
    classes=("1", "2"),
    levels={"grade": ("1", "2")},
    ordinal="corn",
    regression_loss="huber",
    survival_loss="cox",
    survival_bins=6,
    balance="sampling",
)


def test_every_setting_that_a_task_is_made_of_is_in() -> None:
    tree = ast.parse(inspect.getsource(targets))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    assert {"ordinal", "regression_loss", "survival_loss"} <= read  # it finds what is there
    assert read <= fingerprints.of_task(CHANGED).keys()


def test_a_changed_setting_changes_it() -> None:
    plain = fingerprints.of_task(TrainConfig())
    for name, value in fingerprints.of_task(CHANGED).items():
        assert plain.get(name) != value, name
