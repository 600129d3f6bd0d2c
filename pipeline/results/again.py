"""The commands that make a run once more, in a fresh work folder, to the same bytes.

In: a work folder and a scored run. Out: lines for a shell. What they need beside the slides lies in the run: its
`config.yaml` (how the slides were tiled, encoded and trained on) and `patients.csv` (labels, µm per px, regions).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from mhim.configs.schema import Config
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.results import known, picture_colours, predictions
from mhim.pipeline.store import layout, reading
from mhim.pipeline.training import bundle

FOLDER = "again"
_MOST_ROOTS = 20


def commands(work: layout.Work, run: Path) -> list[str]:
    """One command a line; lines that begin with # say what a person must supply. Raises StoreError."""
    card = bundle.card_of(predictions.folds_of(run)[0])
    given = ["--work", FOLDER, "--config", _at(run / "config.yaml")]
    labels = ["--labels", _at(run / known.PATIENTS) if (run / known.PATIENTS).exists() else "LABELS.csv"]
    lines = []
    if card.features.weights_id == "imported":
        encoder = card.features.encoder
        lines.append(f"# the features were imported: pipeline import FEATURES/ --work {FOLDER} --encoder {encoder}")
    else:
        roots = _roots(read_cohort(work)) if work.cohort.exists() else {}
        lines += [
            _line("tile", root, *given, *(labels if told else [])) for root, told in list(roots.items())[:_MOST_ROOTS]
        ]
        if len(roots) > _MOST_ROOTS:
            lines.append(f"# and {len(roots) - _MOST_ROOTS} more folders of slides, which {work.cohort} names")
        weights = (card.made or {}).get("encoder.weights_id")
        if weights and card.features.encoder != "texture":
            lines.append(f"# weights or code of the encoder: {weights}")
        lines.append(_line("extract", *given))
    name = ["--name", run.name]
    return [
        *lines,
        _line("train", *given, *labels, *name),
        _line("score", "--work", FOLDER, *name, *_scored(run)),
        _line("report", "--work", FOLDER, *name),
    ]


def _roots(slides: list[SlideEntry]) -> dict[str, bool]:
    """The folders that were tiled -> whether something besides the files is known of their slides (mpp, regions)."""
    found: dict[str, bool] = {}
    for slide in slides:
        root = slide.root
        found[str(root)] = found.get(str(root), False) or slide.mpp is not None or slide.regions is not None
    return found


def _scored(run: Path) -> list[str]:
    """The settings of scoring that are not the default, as `--set`; and of pictures the colours that were then."""
    seal = run / "score.json"
    settings = reading.read_json(seal).get("settings", {}) if seal.exists() else {}
    usual: dict[str, Any] = Config().score.model_dump(mode="json")
    changed = {
        k: v for k, v in settings.items() if k.startswith("score.") and v != usual.get(k.removeprefix("score."), v)
    }
    if picture_colours.are_old(run / "heatmaps"):
        changed[picture_colours.FIELD] = picture_colours.UNRECORDED
    return [part for k, v in changed.items() for part in ("--set", f"{k}={json.dumps(v)}")]


def _at(path: Path) -> str:
    return str(path.resolve())


def _line(*words: str) -> str:
    return shlex.join(["pipeline", *words])
