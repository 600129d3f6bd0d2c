"""`pipeline map`: which features, labels and run a map is of, told; then the map, and the tiles that stand for it."""

from __future__ import annotations

from pathlib import Path

from mhim.mil.tasks import Several
from mhim.pipeline.backends import Step
from mhim.pipeline.cohort.labels import match
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.labels.rows import CohortError, some
from mhim.pipeline.cohort.labels.table import Table
from mhim.pipeline.maps import embedding, people, sample, stored
from mhim.pipeline.pictures import parts
from mhim.pipeline.results import known, predictions
from mhim.pipeline.resume import console
from mhim.pipeline.stages import runs
from mhim.pipeline.stages.map import Map
from mhim.pipeline.stages.map_gallery import cutting
from mhim.pipeline.stages.session import Session, run_stage, submit, tell
from mhim.pipeline.training import bundle

NO_UMAP = "no UMAP: umap-learn is not installed (pip install 'mhim-pipeline[map]'); the map is of principal components"


def make(session: Session, labels: Path | None, name: str | None, run: str | None) -> int:
    """Make the map `name` (default: the encoder's folder) of a folder of features, coloured by `labels` and by what
    the trainings of `run` say of the patients they held out. Returns 1 where a slide had to be left out."""
    work, config = session.work, session.config
    features = work.features(config.extract.encoder)
    called = runs.named(name, features.name)
    made_of = embedding.methods(config.map)  # told before anything is read
    args = ["--labels", str(labels.resolve())] if labels else []
    args += ["--run", str(runs.find(work, run, config.train.model).resolve())] if run else []
    if session.submits and not session.dry_run:
        return submit(session, [Step("map", ["--name", called, *args], 1)])
    if config.map.method == "auto" and "umap" not in made_of:
        tell([NO_UMAP])
    drawn = sample.draw(features, config.map.tiles, config.map.seed)
    tell(f"left out, {slide}: {why}" for slide, why in drawn.left_out.items())
    scored = _scored(session, run, drawn)
    table, told = _labels(session, labels, features, scored.folder if scored else None)
    if labels is not None and table is not None and not match.match(table.rows, drawn.slides).rows:
        like = f"{some([r.slide or r.patient for r in table.rows])} there, {some(drawn.slides)} here"
        raise CohortError(f"no row of {labels} is of a slide of {features}: {like}")
    whose = people.people(table.rows if table else [], drawn.slides)
    told += f"; scores of the run {scored.name}" if scored else ""
    tell([f"features {features}; {told}", *(table.notes if table else ()), *whose.notes])
    code = run_stage(session, Map(work, config, called, drawn, whose, scored), args)
    if session.dry_run:
        return max(code, int(bool(drawn.left_out)))
    folder = work.maps / called
    codes = [code, int(bool(drawn.left_out))]
    if config.map.gallery and folder.is_dir():
        gallery, lacking = cutting(work, config, stored.read(folder), features)
        tell(lacking)
        codes.append(run_stage(session, gallery, args))
    console.out.print(console.escape(f"map {folder}; look with `pipeline view {work.root}` or `pipeline report`"))
    return max(codes)


def _scored(session: Session, run: str | None, drawn: sample.Sample) -> people.Scored | None:
    """What the run says that was named, or the only scored one of these features that held the slides out."""
    work = session.work
    if run is not None:
        folder = runs.find(work, run, session.config.train.model)
        return people.scored(folder, drawn.slides)
    found = []
    for folder in sorted(work.runs.iterdir()) if work.runs.is_dir() else []:
        if (folder / "metrics.json").is_file():
            try:
                if people.of_features(folder, drawn.facts):
                    found.append(people.scored(folder, drawn.slides))
            except parts.DAMAGED as error:  # or it was trained again since, or is of other slides
                tell([f"not coloured by the run {folder.name}: {parts.reason(error)}"])
    if len(found) > 1:
        tell([f"not coloured by score: name one of {', '.join(f.name for f in found)} with --run"])
    return found[0] if len(found) == 1 else None


def _labels(session: Session, labels: Path | None, features: Path, run: Path | None) -> tuple[Table | None, str]:
    """The label table: as given, or found where `train` finds it, or the run's own record of it; and which."""
    config = session.config
    try:
        found = match.find_labels(labels, session.work, features)
    except match.NoLabels:
        if run is None or not (run / known.PATIENTS).is_file():
            return None, "no labels: each slide is a patient by itself"
        card = bundle.card_of(predictions.folds_of(run)[0])
        task = card.task.value
        targets = task.names if isinstance(task, Several) else ()
        own = label_table.read_table(run / known.PATIENTS, None, may_lack_slide=True, targets=targets, bag=card.bag)
        return own, f"labels as {run.name} was trained with"
    return label_table.read_table(found, config.labels, may_lack_slide=True, bag=config.train.bag), f"labels {found}"
