"""Bags that are at hand as arrays, stored as the command line stores them: in a work folder, or for one question.

In: arrays by name. Out: a feature store per bag. Knows no model and no label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.exchange.bag_table import StoredArrays
from mhim.pipeline.store import ids

Features: TypeAlias = npt.NDArray[np.floating]  # float16 or float32 (N, D)


@dataclass(frozen=True)
class Bag:
    """One bag of instances.

    features: float (N, D), one row per instance; float16 and float32 are kept, others become float32.
    coords: (N, 2), level-0 px of each tile's top-left corner, x then y; None: the instances in one row, a tile apart.
    tile_l0: edge of a tile in level-0 px."""

    features: Features
    coords: npt.NDArray[np.integer] | None = None
    tile_l0: float = 1.0


def arrays_of(bags: Mapping[str, Features | Bag]) -> dict[str, StoredArrays]:
    """The bags as they are stored. Raises CohortError naming the bag that cannot be one."""
    if not isinstance(bags, Mapping) or not bags:
        raise CohortError("there is no bag: give {name: features}, features being an array (instances, width)")
    made: dict[str, StoredArrays] = {}
    width = 0
    for name, given in bags.items():
        bag = given if isinstance(given, Bag) else Bag(np.asarray(given))
        features = np.asarray(bag.features)
        if why := ids.wrong(name) if isinstance(name, str) else "it is no text":
            raise CohortError(f"{name!r} cannot be the name of a bag: {why}")
        if features.ndim != 2 or not features.size:
            raise CohortError(f"bag {name}: features are {features.shape}; expected (instances, width), at least one")
        if features.dtype.kind not in "fiub":  # complex numbers would lose a part, texts are no features
            raise CohortError(f"bag {name}: features are of type {features.dtype}; expected real numbers")
        features = features if features.dtype in (np.float16, np.float32) else features.astype(np.float32)
        if not np.isfinite(features).all():
            raise CohortError(f"bag {name}: its features hold NaN or infinity")
        width = width or features.shape[1]
        if features.shape[1] != width:
            raise CohortError(f"bag {name}: features are {features.shape[1]} wide, those before {width}")
        order = np.arange(len(features))
        coords = np.stack([order, 0 * order], axis=1) if bag.coords is None else np.asarray(bag.coords)
        if coords.shape != (len(features), 2):
            raise CohortError(f"bag {name}: {len(features)} instances but coords {coords.shape}; expected (N, 2)")
        if coords.dtype.kind not in "fiu" or not (np.abs(coords.astype(np.float64)) < 2**31).all():
            raise CohortError(f"bag {name}: coords are not all numbers of level-0 px that fit into int32")
        if not 0 < bag.tile_l0 < math.inf:
            raise CohortError(f"bag {name}: tile_l0 is {bag.tile_l0}; expected the edge of a tile in level-0 px")
        made[name] = StoredArrays(np.ascontiguousarray(features), np.rint(coords).astype(np.int32), float(bag.tile_l0))
    return made
