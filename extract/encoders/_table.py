"""The table of known encoders as data: `table.csv`, one line each, facts with their sources and marks of doubt.

In: a name. Out: a typed row. `~` marks what is general knowledge and was not read in a source. Imports no model code.
"""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

Pooling = Literal["model", "layer3", "cls", "cls_mean", "mean", "keep", "pooler", "clip", "siglip", "attention"]

POOLING_TEXT = {
    "model": "the model's own pooling",
    "layer3": "global average of the map after the third residual stage",
    "cls": "class token after the final norm",
    "cls_mean": "class token and mean of the patch tokens (registers left out), concatenated",
    "mean": "mean of the patch tokens (registers left out)",
    "keep": "class token through the projection head, L2-normalised",
    "pooler": "pooler_output of the authors' code",
    "clip": "projected class token, not normalised",
    "siglip": "attention-pooling head (pooler_output)",
    "attention": "attention pooling with one learnt query, then LayerNorm; no projection, not normalised",
}


class Row(BaseModel):
    """One encoder.

    dim: width with the row's `pooling`. prefix_tokens: class token and registers before the patch tokens.
    tile_px, mpp: what tiles it accepts (px; µm/px), the recommended first; empty: any.
    hub_files: file names to try on the hub. needs: what it needs beyond timm. wheel: file of an installed Python
    package that holds the weights, package folder first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: str
    hub_id: str
    hub_files: tuple[str, ...]
    loader: Literal["timm", "transformers", "open_clip", "package"]
    arch: str
    kwargs: dict[str, Any]
    dim: int
    prefix_tokens: int
    pooling: Pooling
    input_px: int
    resize_px: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tile_px: tuple[int, ...]
    mpp: tuple[float, ...]
    precision: Literal["float32", "float16", "bfloat16"]
    licence: str
    commercial: Literal["yes", "no", "unclear"]
    gated: Literal["yes", "no", "unclear"]
    needs: str
    paper: str
    doubt: str
    sources: str
    wheel: str = ""

    @field_validator("hub_files", "tile_px", "mpp", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(v for v in value.split(";") if v) if isinstance(value, str) else value

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _triple(cls, value: Any) -> Any:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("kwargs", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value


@cache
def rows() -> dict[str, Row]:
    """Every row by name, in alphabetical order."""
    with Path(__file__).with_name("table.csv").open(newline="", encoding="utf-8") as stream:
        return {raw["name"]: Row.model_validate(raw) for raw in csv.DictReader(stream)}
