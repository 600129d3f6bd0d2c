"""`pipeline map`: which features, labels and run a map is of, told; then the map, and the tiles that stand for it."""

from __future__ import annotations

from pathlib import Path

from mhim.pipeline.backends import Step
from mhim.pipeline.cohort.labels import match
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.maps import embedding, people, sample, stored
from mhim.pipeline.resume import console
from mhim.pipeline.stages import runs
from mhim.pipeline.stages.map import Map
from mhim.pipeline.stages.map_gallery import cutting
from mhim.pipeline.stages.session import Session, run_stage, submit, tell
from mhim.pipeline.store import layout, reading

NO_UMAP = "no UMAP: umap-learn is not installed (pip install 'mhim-pipeline[map]'); the map is of principal components"


def make(session: Session, labels: Path | None, name: str | None, run: str | None) -> int:
    """Make the map `name` (default: the encoder's folder) of a folder of features, coloured by `labels` and by what
    the trainings of `run` say of the patients they held out. Returns 1 where a slide had to be left out."""
    work, config = session.work, session.config
    features = work.features(config.extract.encoder)
    called = runs.named(name, features.name)
    made_of = embedding.methods(config.map)  # told before anything is read
    if session.submits and not session.dry_run:
        args = ["--name", called, *(["--labels", str(labels.resolve())] if labels else [])]
        args += ["--run", str(runs.find(work, run, config.train.model).resolve())] if run else []
        return submit(session, [Step("map", args, 1)])
    if config.map.method == "auto" and "umap" not in made_of:
        tell([NO_UMAP])
    drawn = sample.draw(features, config.map.tiles, config.map.seed)
    tell(f"left out, {slide}: {why}" for slide, why in drawn.left_out.items())
    scored = _scored(session, run, drawn)
    rows, told = _rows(session, labels, features, scored.folder if scored else None)
    whose = people.people(rows, drawn.slides)
    tell([f"features {features}; {told}", *whose.notes])
    code = run_stage(session, Map(work, config, called, drawn, whose, scored))
    if session.dry_run:
        return max(code, int(bool(drawn.left_out)))
    folder = work.maps / called
    codes = [code, int(bool(drawn.left_out))]
    if config.map.gallery and folder.is_dir():
        gallery, lacking = cutting(work, config, stored.read(folder), features)
        tell(lacking)
        codes.append(run_stage(session, gallery))
    console.out.print(console.escape(f"map {folder}; look with `pipeline view {work.root}` or `pipeline report`"))
    return max(codes)


def _scored(session: Session, run: str | None, drawn: sample.Sample) -> people.Scored | None:
    """What the run says that was named, or the only scored one that held these slides out; told."""
    work = session.work
    if run is not None:
        folder = runs.find(work, run, session.config.train.model)
        reading.check_scored(folder)
        return people.scored(folder, drawn.slides)
    found = []
    for folder in sorted(work.runs.iterdir()) if work.runs.is_dir() else []:
        if (folder / "predictions.csv").is_file() and (folder / "metrics.json").is_file():
            try:
                reading.check_scored(folder)
                found.append(people.scored(folder, drawn.slides))
            except (layout.StoreError, KeyError, ValueError):
                continue  # of other features, or damaged, which `pipeline status` and `verify` tell
    if len(found) > 1:
        tell([f"not coloured by score: name one of {', '.join(f.name for f in found)} with --run"])
    return found[0] if len(found) == 1 else None


def _rows(session: Session, labels: Path | None, features: Path, run: Path | None) -> tuple[list[Row], str]:
    """Rows of the label table: as given, or found where `train` finds it, or the run's own record of it; and which."""
    settings = session.config.labels
    if labels is None and (features / "labels.csv").is_file():
        labels = features / "labels.csv"
    if labels is None:
        try:
            labels = match.find_labels(None, session.work)
        except CohortError:
            own = run / "patients.csv" if run is not None else None
            if own is None or not own.is_file():
                return [], "no labels: each slide is a patient by itself"
            return label_table.read_table(
                own, bag="slide"
            ).rows, f"labels as {run.name if run else ''} was trained with"
    table = label_table.read_table(labels, settings, may_lack_slide=True, bag=session.config.train.bag)
    return table.rows, f"labels {labels}"
