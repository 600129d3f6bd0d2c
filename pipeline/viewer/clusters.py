"""Groups of tiles that look alike to the encoder, for the viewer's gallery: what kinds of tissue does a slide hold?

In: a slide's features. Out: for each cluster its share of the slide and its most typical tiles. Cheap on purpose: it
looks at `MOST` tiles, drawn anew by the same seed each time, so that a slide of 275,000 takes as long as one of 3,000.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MOST = 3000  # tiles that are looked at
CLUSTERS = 6
SHOWN = 4  # tiles of each


def clusters(features: Any) -> list[dict[str, Any]]:
    """features: (n, D), an array or what is read like one. k-means on features of length 1, the largest cluster first:
    {"share": of the tiles looked at, "tiles": rows nearest to its middle}."""
    from sklearn.cluster import KMeans

    n = features.shape[0]
    rows = np.sort(np.random.default_rng(0).choice(n, MOST, replace=False)) if n > MOST else np.arange(n)
    x = np.asarray(features[:] if n <= MOST else features[rows], np.float32)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    if not n:
        return []
    fitted = KMeans(min(CLUSTERS, len(np.unique(x, axis=0))), n_init=1, random_state=0).fit(x)
    away = np.linalg.norm(x - fitted.cluster_centers_[fitted.labels_], axis=1)
    made = []
    for c in range(len(fitted.cluster_centers_)):
        own = np.flatnonzero(fitted.labels_ == c)
        nearest = own[np.argsort(away[own], kind="stable")[:SHOWN]]
        made.append({"share": len(own) / len(x), "tiles": rows[nearest].tolist()})
    return sorted(made, key=lambda one: -one["share"])
