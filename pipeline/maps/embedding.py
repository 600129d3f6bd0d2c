"""Where tiles lie on a map: principal components, UMAP, and clusters. Arrays in, arrays out; the same each time.

PCA and k-means by scikit-learn, UMAP (McInnes et al., arXiv 1802.03426) by umap-learn, an extra. All in one thread and
by one seed: sums split over threads change last bits. Knows no slides.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from typing import Any

import numpy as np

from mhim.configs.errors import UserError
from mhim.configs.schema import MapConfig

FITTED = 20_000  # tiles that PCA is fitted on, evenly out of all: 160 MB for features of 1,024 numbers
BLOCK = 8192  # tiles that are projected at a time
FEWEST = 10  # points that UMAP is made of


class NoUmap(UserError):
    """UMAP is asked for and not installed."""

    exit_code = 2
    whole = True


def method() -> dict[str, Any]:
    """What else than settings decides the numbers."""
    return {"fitted": FITTED, "version": 1}


def versions(made: Iterable[str]) -> dict[str, str]:
    """Versions that decide the numbers of these maps. made: as of `methods`."""
    names = ("mhim-pipeline", "numpy", "scikit-learn", *(("umap-learn",) if "umap" in made else ()))
    return {name: metadata.version(name) for name in names}


def methods(config: MapConfig) -> tuple[str, ...]:
    """The maps that are made with these settings on this machine. Raises NoUmap."""
    if config.method == "pca":
        return ("pca",)
    try:
        metadata.version("umap-learn")
    except metadata.PackageNotFoundError:
        if config.method == "umap":
            raise NoUmap("map.method=umap needs umap-learn: pip install 'mhim-pipeline[map]'") from None
        return ("pca",)
    return ("pca", "umap")


def reduced(features: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) -> principal components float64 (n, k), and the share of variance of each (k,). The sign of each is that
    of its largest loading."""
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_limits

    n, width = features.shape
    rows = np.unique(np.linspace(0, n - 1, min(n, FITTED)).astype(np.int64))
    k = min(components, len(rows), width)
    with threadpool_limits(1):
        fitted = PCA(k, svd_solver="covariance_eigh" if len(rows) >= width else "full")
        fitted.fit(features[rows].astype(np.float64))
        largest = np.abs(fitted.components_).argmax(axis=1)
        fitted.components_ *= np.sign(fitted.components_[np.arange(k), largest])[:, None]
        parts = [fitted.transform(features[at : at + BLOCK].astype(np.float64)) for at in range(0, n, BLOCK)]
    shares = np.nan_to_num(fitted.explained_variance_ratio_)
    return np.concatenate(parts), shares


def spread_out(z: np.ndarray, config: MapConfig) -> np.ndarray | None:
    """UMAP of (n, k) as float64 (n, 2), begun at the first two components; None of fewer than FEWEST points."""
    if len(z) < FEWEST:
        return None
    import umap
    from threadpoolctl import threadpool_limits

    first = np.zeros((len(z), 2))
    first[:, : min(2, z.shape[1])] = z[:, :2]
    span = np.ptp(first, axis=0).max() or 1.0
    neighbors = min(config.neighbors, len(z) - 1)
    with threadpool_limits(1):
        made = umap.UMAP(
            n_neighbors=neighbors,
            min_dist=config.min_dist,
            init=(10 * (first - first.min(axis=0)) / span).astype(np.float32),
            random_state=config.seed % 2**32,
            n_jobs=1,
        ).fit_transform(z.astype(np.float32))
    return np.asarray(made, dtype=np.float64)


def clusters(z: np.ndarray, config: MapConfig) -> tuple[np.ndarray, np.ndarray]:
    """k-means of (n, k): the cluster of each tile int (n,), the largest is 0; and the distance to its centre (n,)."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    most = min(config.clusters, len(np.unique(z, axis=0)))
    with threadpool_limits(1):
        fitted = MiniBatchKMeans(most, random_state=config.seed % 2**32, n_init=5, batch_size=4096).fit(z)
        own = fitted.predict(z)
    sizes = np.bincount(own, minlength=most)
    place = np.empty(most, np.int64)
    place[np.argsort(-sizes, kind="stable")] = np.arange(most)
    away = np.linalg.norm(z - fitted.cluster_centers_[own], axis=1)
    return place[own], away
