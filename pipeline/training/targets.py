"""The task of a fold, from what the labels hold and the targets of its training patients.

In: outcomes, settings, targets. Out: a `Task`, with everything that is learnt from labels learnt from these alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from mhim.configs.schema import TrainConfig
from mhim.mil import tasks
from mhim.mil.tasks import Cells, Target, Task, TaskError
from mhim.pipeline.cohort.outcomes import Outcome


def task_of(outcomes: Sequence[Outcome], targets: Sequence[Target], config: TrainConfig) -> Task:
    """The task of these outcomes. Raises TaskError, which names the target where there are several."""
    if len(outcomes) == 1:
        return _one(outcomes[0], targets, config)
    if config.balance == "sampling":
        raise TaskError("train.balance=sampling is of one target; of several use weights or none")
    found: dict[str, Task] = {}
    for k, outcome in enumerate(outcomes):
        values = [t.values[k] for t in targets if isinstance(t, Cells)]
        try:
            found[outcome.name] = _one(outcome, [v for v in values if v is not None], config, True)
        except TaskError as error:
            raise TaskError(f"target {outcome.name}: {error}") from error
    return tasks.several(found)


def _one(outcome: Outcome, targets: Sequence[Target], config: TrainConfig, among: bool = False) -> Task:
    """among: of several targets, where weights are for those that have classes."""
    weighted = config.balance == "weights"
    if outcome.kind == "classification":
        return tasks.classification(outcome.classes, targets, weighted)
    if outcome.kind == "ordinal":
        return tasks.ordinal(outcome.classes, targets, config.ordinal, weighted)
    if outcome.kind == "regression":
        if config.balance != "none" and not among:
            raise TaskError(f"train.balance={config.balance} is of classes; a number has none: set train.balance=none")
        return tasks.regression(targets, config.regression_loss)
    if weighted and not among:
        raise TaskError("train.balance=weights is of classes; for survival use sampling or none")
    if config.survival_loss == "cox":
        return tasks.cox_survival(targets)
    return tasks.discrete_survival(targets, config.survival_bins)
