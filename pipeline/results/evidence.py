"""What the maps of a run are worth: which tiles keep the model's answer, and which it cannot do without.

In: a patient's bag, the models that score it, and their maps. Out: numbers and the smallest set of tiles per map; and
their means over the patients, `evidence.json`. How it is measured stands in `mil/evidence.py`. Knows no stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhim.mil import evidence, metrics
from mhim.mil import train as loop
from mhim.mil.evidence import Evidence
from mhim.mil.feed import Feed
from mhim.pipeline.cohort.patients import Patient
from mhim.pipeline.results.present import Present, slides
from mhim.pipeline.store import reading, seals, writing
from mhim.pipeline.training import bundle, fold

FOLDER, SUMMARY = "evidence", "evidence.json"


def of_patient(
    patient: Patient, models: Sequence[bundle.Bundle], maps: Mapping[str, np.ndarray], gpu: bool = False
) -> dict[str, Evidence]:
    """Map -> what it is worth on the patient's bag, which all of `models` answer for together.

    maps: scores (N,) by name, over all slides of the patient in their order. What is tested is the class that the bag
    is called. The map of another class says nothing of it and is left out; of two classes it is turned round: what
    speaks least for one speaks most for the other."""
    case = fold.cases([patient], float(models[0].card.features.mpp or 0.0))
    at, task = fold.device(gpu), models[0].task
    found: dict[str, Evidence] = {}
    with loop.isolated(None, at, models[0].card.train["threads"]):
        bags = []
        for one in models:
            bag = Feed(case, one.task, at, scale=one.scale).batch([0]).bag
            bags.append(evidence.Embedded(one.model().to(at), bag))
        answer, called = evidence.answer_of(bags, [one.task for one in models])
        for name, scores in maps.items():
            own = name.partition("_")[2]
            if called is not None and own in task.classes and own != task.classes[called]:
                if len(task.classes) > 2:
                    continue
                scores = -scores
            found[name] = evidence.of_map(scores, answer)
    return found


def needed(folder: Path, slide: str, scores: str) -> dict[str, np.ndarray]:
    """The smallest sets of a slide by name, float32 (n,), 1 in the set and 0 outside.

    folder: of the results. scores: fingerprint of the scores that they must be of; none where they are of others, or
    were not made."""
    path = folder / FOLDER / f"{slide}.zarr"
    found = seals.look(path)
    if found is None or found.wrong or found.attrs.get("scores") != scores:
        return {}
    names = [one["array"] for one in found.attrs["maps"].values()]
    return {name: np.asarray(reading.read_array(path, name)).astype(np.float32) for name in names}


def means(folder: Path) -> dict[str, Any]:
    """The content of `evidence.json` of the results in `folder`: per map, mean and sd over the patients. Only what is
    of the scores that lie there now, measured as this version does: maps of other models are not averaged in, such as
    those of patients whom the run was trained without since."""
    how = {f"evidence.{name}": value for name, value in evidence.method().items()}
    present = Present(folder)
    patients = dict[str, dict[str, dict[str, float]]]()
    stores = {folder / FOLDER / f"{slide}.zarr": slide for slide in slides(folder, FOLDER)}
    for path, slide in sorted(stores.items()):
        found = seals.look(path)
        scores = present.scores(slide)
        if found is None or found.wrong or scores is None:
            continue  # told by the commands that make them
        if found.attrs.get("scores") == scores.fingerprint and how.items() <= found.settings.items():
            maps = {k: v["numbers"] for k, v in found.attrs["maps"].items()}
            bag = str(path) if found.attrs.get("unit") == "slide" else str(found.attrs["patient"])
            patients.setdefault(bag, maps)
    rows: dict[str, list[dict[str, float]]] = {}
    for maps in patients.values():
        for name, numbers in maps.items():
            rows.setdefault(name, []).append(numbers)
    told: dict[str, Any] = {
        name: {
            "patients": len(each),
            **{k: {"mean": mean, "sd": sd} for k, (mean, sd, _) in metrics.over_folds(each).items()},
        }
        for name, each in rows.items()
    }
    best = sorted(told, key=lambda name: -told[name]["gain"]["mean"])
    return {"kept": evidence.WANTED, "few": evidence.FEW, "best_first": best, "maps": told}


def summarise(folder: Path) -> dict[str, Any]:
    """Write and return `evidence.json` of the results in `folder`."""
    summary = means(folder)
    writing.write_atomic(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary
