"""Several runs on the same splits, each against chosen ones of them, and the rank of each: paired over the patients.

In: scored runs of one set. Out: per run its headline with interval, its difference to every run that it is held
against, its rank among all, each with an interval over the same resampled patients, drawn as for the intervals. Refuses
what `compare` refuses. A row that is held against itself has no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import ScoreConfig
from mhim.mil import ranks, resampling
from mhim.mil.resampling import Interval
from mhim.pipeline.results import compare, estimand, measures, several, views
from mhim.pipeline.results.views import View

Metric = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Standing:
    """One run. against: row -> `resampling.verdict` of this one minus that. drawn: the headline in every draw, more is
    better."""

    headline: str
    value: Interval
    rank: Interval
    against: dict[str, dict[str, Any]]
    drawn: np.ndarray


def standings(runs: Mapping[str, Path], config: ScoreConfig, against: Sequence[str] = ()) -> dict[str, Standing]:
    """Row -> how it stands, by its headline. runs: row -> folder of a scored run. Raises StoreError."""
    names = list(runs)
    if views.of(runs[names[0]])[0].target:
        return _stand(names, "headline", *_of_several(list(runs.values())), config, against)
    told, rows = zip(*(compare.scored(View(run)) for run in runs.values()), strict=True)
    for k in range(1, len(names)):
        compare.refuse_others((names[0], names[k]), (told[0], told[k]), (rows[0], rows[k]))
    headline, task = told[0].headline, told[0].task.value
    sign = -1.0 if headline in measures.of(task).less_is_better else 1.0
    sides = [estimand.answers(sorted(r, key=compare.order), task) for r in rows]
    metrics = [estimand.metric(side, told[0].horizons or ()) for side in sides]

    def signed(metric: Metric) -> Metric:
        return lambda weights: {headline: sign * metric(weights)[headline]}

    return _stand(
        names,
        headline,
        [signed(m) for m in metrics],
        len(sides[0].patients),
        sides[0].strata,
        sides[0].clusters,
        config,
        against,
        sign,
    )


def _of_several(runs: Sequence[Path]) -> tuple[list[Metric], int, np.ndarray, np.ndarray | None]:
    """The numbers of all targets together of each run, how many patients these are of, the stratum and the
    cluster of each."""
    each = [several.together(side) for side in compare.of_targets(runs)]
    _, patients, strata, clusters = each[0]
    return [metric for metric, *_ in each], len(patients), strata, clusters


def _stand(
    names: Sequence[str],
    headline: str,
    metrics: Sequence[Metric],
    patients: int,
    strata: np.ndarray,
    clusters: np.ndarray | None,
    config: ScoreConfig,
    against: Sequence[str],
    sign: float = 1.0,
) -> dict[str, Standing]:
    """metrics: of each run, the headline so that more is better; sign turns it back."""

    def values(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {n: m(weights)[headline] for n, m in zip(names, metrics, strict=True)}

    point, drawn = resampling.bootstrap(values, patients, config.bootstrap, strata, clusters=clusters)
    here = ranks.ranks(np.array([point[n] for n in names]))
    there = ranks.ranks(np.stack([drawn[n] for n in names], axis=-1)) if config.bootstrap else np.empty((0, len(names)))
    found = {}
    for k, n in enumerate(names):
        differences = {
            other: resampling.verdict(point[n] - point[other], drawn[n] - drawn[other], config.confidence)
            for other in against
            if other in point and other != n
        }
        found[n] = Standing(
            headline,
            resampling.interval(sign * point[n], sign * drawn[n], config.confidence),
            resampling.interval(float(here[k]), there[:, k], config.confidence),
            differences,
            drawn[n],
        )
    return found
