"""The settings of maps of the cohort. Part of the schema, see `schema.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mhim.configs.base import Settings


class MapConfig(Settings):
    """Maps of the cohort (`pipeline map`)."""

    tiles: int = Field(20000, ge=50, le=1_000_000, description="most tiles that are drawn, equally many of each slide")
    method: Literal["auto", "pca", "umap"] = Field(
        "auto", description="pca alone, or umap besides; auto: umap where umap-learn is installed (extra `map`)"
    )
    components: int = Field(
        50, ge=2, le=512, description="principal components of which UMAP and the clusters are made"
    )
    neighbors: int = Field(15, ge=2, le=200, description="neighbours of a point in UMAP; more shows the larger order")
    min_dist: float = Field(0.1, ge=0, le=1, description="smallest distance of points in UMAP's picture")
    clusters: int = Field(10, ge=2, le=100, description="clusters of tiles (k-means)")
    gallery: int = Field(8, ge=0, le=64, description="tiles that stand for each cluster and class; 0 cuts none")
    seed: int = Field(2021, ge=0, description="seed of which tiles are drawn, of UMAP and of the clusters")
