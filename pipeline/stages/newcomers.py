"""New slides for a trained run: the folder their results lie in, and their tiles and features, made as the run's were.

In: a run, the slides or features, perhaps a name for them. Out: one folder a cohort, so that two hospitals' `slides/`
stay apart, and features that its models may read. Knows nothing of scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mhim.configs import lookup, texts
from mhim.configs.schema import Config, ExtractConfig, TileConfig, marked
from mhim.extract import encoders
from mhim.pipeline.cohort import provenance
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.results import predictions
from mhim.pipeline.store import layout, writing
from mhim.pipeline.training import bundle
from mhim.pipeline.training.card import Card

SOURCE = ".source"  # in that folder: the hash of the place that its slides or features came from


def folder_of(new: Path, source: Path, given: str | None) -> Path:
    """The folder below `new` for the results of the slides or features at `source`. Writes nothing.

    given: the user's name for the cohort (`--as`). Else the last name of `source`, with the names above it where the
    results of another place have that one. Raises CohortError if `given` is taken by another place, or is no name."""
    if given is not None:
        if given in ("", ".", "..") or any(c in given for c in "/\\\0"):
            raise CohortError(f"--as {given!r} is no name of a folder")
        if not _free(new / given, source):
            raise CohortError(f"{new / given} holds the results of another folder; choose another name with --as")
        return new / given
    place = source.resolve()
    last = place.stem if place.is_file() else place.name
    above = [part for part in place.parts[1:-1] if part != "features"]
    names = ["-".join([*above[len(above) - k :], last]) for k in range(len(above) + 1)]
    return next((new / name for name in names if _free(new / name, source)), new / f"{last}-{_mark(source)}")


def remember(folder: Path, source: Path) -> None:
    """Note in `folder` whose results it holds."""
    if not (folder / SOURCE).exists():
        writing.write_atomic(folder / SOURCE, _mark(source) + "\n")


def _free(folder: Path, source: Path) -> bool:
    """Whether `folder` is new, or holds the results of `source`."""
    try:
        return (folder / SOURCE).read_text().strip() == _mark(source)
    except FileNotFoundError:
        pass
    # version 0.1 left no mark: slides are known by where they lie, features not at all
    work = layout.Work(folder)
    root = source.resolve() if source.is_dir() else source.resolve().parent
    return not work.cohort.exists() or any(s.path.resolve().is_relative_to(root) for s in read_cohort(work))


def _mark(source: Path) -> str:
    return hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]


def settings_of(run: Path, own: Config) -> tuple[Config, list[str]]:
    """`own` with the settings by which a run's slides were tiled and extracted; and lines on what of `own` is not used.

    The run may be a stranger's: its files give values of settings that decide results and nothing else, name no code
    but what this command allows, and must agree with each other. Raises StoreError, ConfigError, LookupFailed,
    EncoderError or CohortError."""
    card, file = card_of(run), run / "config.yaml"
    said = _sections(file) if card.made is None or file.exists() else {}
    _permitted(said)
    made = provenance.of_run(card.made, card.features.plain(), said)
    known = provenance.sections(made)
    if "mpp" not in known.get("tile", {}):
        raise CohortError(
            f"the features that {run.name} was trained on were imported, and nothing tells how its "
            "slides were tiled and encoded: make features of the new slides with the same program, and "
            "give them with --features"
        )
    for name, value in {f"{s}.{k}": v for s, values in said.items() for k, v in values.items()}.items():
        if card.made is not None and made.get(name, "nothing") != value:
            raise layout.StoreError(
                f"{file} says {name}={value!r}, the models beside it were trained on slides made "
                f"with {made.get(name, 'nothing')!r}: copy the run again from where it was trained"
            )
    _permitted(known)
    return provenance.settings_for_new_slides(own, made, run.name)


def _sections(file: Path) -> dict[str, dict[str, Any]]:
    """The sections tile and extract of a run's `config.yaml`, those that it has."""
    try:
        raw = texts.read_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise layout.StoreError(f"{file} cannot be read: {error}; new slides need the settings of the run") from error
    if not isinstance(raw, dict):
        raise layout.StoreError(f"{file} is damaged: no sections; copy the run again from where it was trained")
    found = {}
    for section, kind in (("tile", TileConfig), ("extract", ExtractConfig)):
        if section not in raw:
            continue
        if not isinstance(raw[section], dict):
            raise layout.StoreError(f"{file}: `{section}` is no section; copy the run again from where it was trained")
        machine = sorted(raw[section].keys() & marked(kind, "speed"))
        if machine:
            raise layout.StoreError(
                f"{file}: {section}.{machine[0]} is about the machine and no business of a run's "
                "settings; if the file is yours, delete that line"
            )
        found[section] = dict(raw[section])
    return found


def _permitted(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise NotTrusted (or that there is none) unless this command may use the segmenters and the encoder named."""
    tile = sections.get("tile", {})
    for key in ("segmenter", "fallback_segmenter"):
        if tile.get(key):
            lookup.find("mhim.extract.tissue", str(tile[key]))
    if encoder := sections.get("extract", {}).get("encoder"):
        encoders.known(str(encoder))


def card_of(run: Path) -> Card:
    """The card of a run's first model. Raises BundleError."""
    return bundle.card_of(predictions.folds_of(run)[0])
