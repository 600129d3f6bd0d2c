"""The scored runs that the viewer shows: what each says of the slides, of each target where there are several.

In: the folder of a run, or of new slides that a run scored. Out: rows by slide, and what of their scores may be shown.
Results of trainings that are there no more are refused (`results/present.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from mhim.mil.tasks import Several, Task
from mhim.pipeline.pictures.parts import DAMAGED, reason
from mhim.pipeline.results import ensemble, estimand, fused, predictions, views
from mhim.pipeline.results.measures.measure import Row
from mhim.pipeline.results.metrics_file import Metrics
from mhim.pipeline.results.present import NEW, Present
from mhim.pipeline.store import layout
from mhim.pipeline.training import bundle


@dataclass(frozen=True)
class ShownRun:
    """One scored run, or one target of it. rows: slide id -> the columns of its patient in predictions.csv. encoder: of
    its features, "" where that is not known. logits: of several targets, which columns of the evidence are its own.
    shares: of a fused run, patient -> what each modality weighs and adds. note: what of it cannot be shown."""

    name: str
    folder: Path
    task: Task
    rows: dict[str, Row]
    seal: str
    encoder: str = ""
    logits: slice | None = None
    shares: dict[str, fused.Share] = field(default_factory=dict)
    note: str = ""

    @cached_property
    def present(self) -> Present:
        """What of its scores may be shown."""
        return Present(self.folder)


def of_run(folder: Path) -> list[ShownRun]:
    """The views of a run that is scored; none of one that is not. Raises what `parts.DAMAGED` lists."""
    made = []
    for view in views.of(folder):
        if not (view.folder / "predictions.csv").exists() or not (view.folder / "metrics.json").exists():
            continue
        own = view.folder.relative_to(folder)
        Present(folder).check(only=[(own / name).as_posix() for name in ("predictions.csv", "metrics.json")])
        found = Metrics.read(view.folder)
        shown = _shown_run(view.name, view, found.task.value)
        beside, note = _shares(folder)
        encoder = str(found.features.encoder)
        made.append(replace(shown, encoder=encoder, logits=_logits(folder, view.target), shares=beside, note=note))
    return made


def _shares(folder: Path) -> tuple[dict[str, fused.Share], str]:
    """Of a fused run what each modality weighs; or why that cannot be read, which does not cost the run."""
    try:
        return (fused.shares(predictions.folds_of(folder)) if fused.read(folder) else {}), ""
    except DAMAGED as error:
        return {}, f"no weights of its modalities: {reason(error)}"


def of_new_slides(folder: Path) -> list[ShownRun]:
    """New slides that `pipeline score` put into a work folder of their own, `<run>/new/<name>`: the run's scores."""
    run = folder.resolve().parent.parent
    if folder.resolve().parent.name != NEW:
        return []
    if not (folder / "predictions.csv").exists() and not (folder / views.FOLDER).is_dir():
        return []
    Present(folder).check()
    card = bundle.card_of(bundle.find(run)[0])
    made = []
    for view in views.of(folder):
        if not (view.folder / "predictions.csv").exists():
            continue
        shown = _shown_run(views.View(run, view.target).name, view, card.seen_as(view.target).task.value)
        made.append(replace(shown, logits=_logits(run, view.target)))
    return made


def _logits(run: Path, target: str) -> slice | None:
    """Which columns of the evidence are the target's; None of a single one."""
    task = bundle.card_of(bundle.find(run)[0]).task.value if target else None
    return task.slices[target] if isinstance(task, Several) else None


def _shown_run(name: str, view: views.View, task: Task) -> ShownRun:
    file = view.folder / "predictions.csv"
    rows: dict[str, Row] = {}
    # of several trainings the answer that the report shows too
    for row in ensemble.ensemble(estimand.read(file), task):
        for slide in row["slide"].split(";"):
            rows.setdefault(slide, row)
    return ShownRun(name, view.run, task, rows, layout.sha256(file))
