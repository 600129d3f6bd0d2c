"""Settings of the table of models: which rows there are, and what they are held against.

In: nothing. Out: `BenchmarkConfig`, a section of `schema.Config`. Knows no model's code.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mhim.configs.base import Settings

# Controls without attention, attention models one paper each, and MHIM-MIL with each student, as shipped and as published.
BENCHMARK: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            "mean",
            "max",
            "mean_linear",
            "simlp",
            "mean_knn",
            "lse",
            "abmil",
            "gated_abmil",
            "feather",
            "aem",
            "acmil",
            "abmilx",
            "asmil",
            "nnmil",
            "ibmil",
            "smabmil",
            "clam_sb",
            "clam_mb",
            "dsmil",
            "transmil",
            "camil",
            "dgrmil",
            "ilra",
            "wikg",
            "dtfd",
            "rrt",
            "transformer",
        )
    },
    **{f"mhim_{student}": {"model": "mhim", "student": student} for student in ("abmil", "dsmil", "transmil")},
    **{f"mhim_v2_{student}": {"preset": "mhim_v2", "student": student} for student in ("abmil", "dsmil", "transmil")},
}


class BenchmarkConfig(Settings):
    """Every model on one set, as one table (`pipeline benchmark`)."""

    models: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: dict(BENCHMARK),
        description="rows of the table: name -> what differs from `train`, as settings of training or model; `model` where it is not the name, or `preset` whose model, model_params and fallback it takes",
    )
    params: dict[str, Any] = Field(
        default_factory=dict,
        description="settings for every model that has them, of MHIM for its student, e.g. {width: 128}",
    )
    against: tuple[str, ...] = Field(
        ("abmil", "mean_linear"),
        description="rows that every other one is held against, patient by patient, where they are in the table",
    )
