"""What the outputs of a brought-in model mean, as its owner states it in a file: a task of any kind.

In: a YAML or JSON file, as the key `task` of a `model.json` holds it. Out: a `Task`. Losses' settings (`weights`,
`alpha`, `robust`) may be left out, and are not taken over, since nothing is trained. By kind:

- classification: `classes`, in the order of the logits, the positive one last
- ordinal: `classes`, the levels, lowest first; `link`: corn or cumulative, how K - 1 logits are read
- regression: `mean`, `sd`: the output times sd plus mean is the number in the labels' unit (0 and 1 where it is that)
- nll: `edges`, inner edges of the time bins; cox: nothing
- several: `targets`, name -> one of these, in the order of the logits; a survival target is called `survival`
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mhim.configs import texts
from mhim.mil import tasks
from mhim.pipeline.cohort.outcomes import SURVIVAL
from mhim.pipeline.store.layout import StoreError

NEEDS: dict[str, tuple[str, ...]] = {
    "classification": ("classes",),
    "ordinal": ("classes", "link"),
    "regression": ("mean", "sd"),
    "nll": ("edges",),
    "cox": (),
    "several": ("targets",),
}
OF_LOSSES: dict[str, dict[str, Any]] = {
    "classification": {"weights": []},
    "ordinal": {"weights": []},
    "regression": {"robust": "squared"},
    "nll": {"alpha": 0.0},
}
EXAMPLE = "{kind: regression, mean: 0, sd: 1}"


class NotStated(StoreError):
    """The file states no task; the message says which part is wrong and what is wanted."""


def read(path: Path) -> tasks.Task:
    """The task that a file states. Raises NotStated."""
    try:
        found = texts.read_yaml(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise NotStated(f"--task {path} cannot be read ({error}): write a YAML or JSON file: {EXAMPLE}") from error
    return _task(found, str(path), among=False)


def _task(found: Any, where: str, among: bool) -> tasks.Task:
    """among: the target of several."""
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise NotStated(f"{where} states no task: a mapping with `kind` is wanted, such as {EXAMPLE}")
    kind = found["kind"]
    kinds = [k for k in NEEDS if not among or k != "several"]
    if kind not in kinds:
        raise NotStated(f"{where}: kind {kind!r} is none of {', '.join(kinds)}")
    missing = [key for key in NEEDS[kind] if key not in found]
    if missing:
        raise NotStated(f"{where}: a task of kind {kind} needs {' and '.join(missing)}")
    more = sorted(map(str, found.keys() - {"kind", *NEEDS[kind], *OF_LOSSES.get(kind, {})}))
    if more:
        raise NotStated(f"{where}: a task of kind {kind} has no {more[0]!r}")
    if kind == "several":
        return _several(found["targets"], where)
    told = OF_LOSSES.get(kind, {}) | {"kind": kind}
    if "classes" in found:
        told["classes"] = _names(found["classes"], where)
    if "link" in found:
        if found["link"] not in ("corn", "cumulative"):
            raise NotStated(f"{where}: link {found['link']!r} is neither corn nor cumulative")
        told["link"] = found["link"]
    for key in ("mean", "sd"):
        if key in found:
            told[key] = _number(found[key], key, where)
    if told.get("sd", 1.0) <= 0:
        raise NotStated(f"{where}: sd {told['sd']:g} is not above 0")
    if "edges" in found:
        told["edges"] = edges(found["edges"], where)
    return tasks.from_json(told)


def _several(found: Any, where: str) -> tasks.Task:
    if not isinstance(found, dict) or len(found) < 2 or not all(isinstance(name, str) and name for name in found):
        raise NotStated(f"{where}: targets is a mapping of two or more names, as the columns of labels are called")
    of = {name: _task(one, f"{where}, target {name}", True) for name, one in found.items()}
    wrong = [name for name, task in of.items() if task.survival != (name == SURVIVAL)]
    if wrong:
        raise NotStated(
            f"{where}, target {wrong[0]}: `{SURVIVAL}` is the name of the target of time and event, and of no other"
        )
    return tasks.several(of)


def edges(found: Any, where: str) -> list[float]:
    """Inner edges of time bins, each larger than the one before. Raises NotStated."""
    if not isinstance(found, list) or not found:
        raise NotStated(f"{where}: edges is a list of numbers, such as [12.5, 24, 40]")
    told = [_number(v, "edges", where) for v in found]
    if told != sorted(set(told)):
        shown = ", ".join(f"{v:g}" for v in told)
        raise NotStated(f"{where}: edges {shown}: every edge must be larger than the one before")
    return told


def _names(found: Any, where: str) -> list[str]:
    if not isinstance(found, list) or len(found) < 2:
        raise NotStated(f"{where}: classes is a list of two or more names")
    for name in found:
        if isinstance(name, bool) or not isinstance(name, str | int | float) or name == "":
            raise NotStated(f"{where}: class {name!r} is no name; write words such as yes and no in quotes")
    names = [str(name) for name in found]
    if len(set(names)) < len(names):
        raise NotStated(f"{where}: classes {', '.join(names)}: a name stands twice")
    return names


def _number(found: Any, key: str, where: str) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise NotStated(f"{where}: {key} {found!r} is no finite number")
    return float(found)
