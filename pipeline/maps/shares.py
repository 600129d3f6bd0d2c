"""What the clusters of a map are made of: their share in each patient, averaged by class, and the tiles that stand for
a cluster or a class.

In: clusters of tiles, whose each tile is, the patients' classes. Out: rows of tables. A patient counts once, however
many tiles or slides it has. What is over-represented in a class is told after looking at the labels: a picture, no
test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEADING = 3  # clusters that stand for a class, at most


@dataclass(frozen=True)
class Prototype:
    """One of the tiles that stand for a cluster or a class. of: `cluster` or the name of the labels. name: which.
    tile: its place in the sample. away: distance to the centre of its cluster."""

    of: str
    name: str
    tile: int
    cluster: int
    away: float


def by_patient(cluster: np.ndarray, slide: np.ndarray, patient_of: Sequence[str], n: int) -> dict[str, np.ndarray]:
    """Patient -> share of each of n clusters, (n,): the mean over its slides. cluster, slide: int (tiles,)."""
    counts = np.zeros((len(patient_of), n))
    np.add.at(counts, (slide, cluster), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    groups: dict[str, list[np.ndarray]] = {}
    for k, patient in enumerate(patient_of):
        groups.setdefault(patient, []).append(shares[k])
    return {p: np.mean(of, axis=0) for p, of in sorted(groups.items())}


def table(shares: dict[str, np.ndarray], labels: dict[str, dict[str, str]]) -> list[dict[str, object]]:
    """Rows: cluster, labels, class, patients, share (mean over them), sd, patients_with (who have any of it). With
    empty labels and class: of all patients. labels: name -> patient -> class."""
    rows: list[dict[str, object]] = []
    n = len(next(iter(shares.values())))
    groups = [("", "", list(shares))]
    for name, of in labels.items():
        groups += [(name, c, [p for p in shares if of.get(p) == c]) for c in sorted(set(of.values()))]
    for k in range(n):
        for name, called, members in groups:
            own = np.array([shares[p][k] for p in members])
            if not len(own):
                continue
            sd = float(own.std(ddof=1)) if len(own) > 1 else None
            rows.append(
                {
                    "cluster": k,
                    "labels": name,
                    "class": called,
                    "patients": len(own),
                    "share": float(own.mean()),
                    "sd": sd,
                    "patients_with": int((own > 0).sum()),
                }
            )
    return rows


def leading(shares: dict[str, np.ndarray], of: dict[str, str], called: str) -> list[int]:
    """The clusters whose mean share in the class exceeds most that in the other classes; those that do so at all, at
    most LEADING."""
    own = [shares[p] for p in shares if of.get(p) == called]
    others = [shares[p] for p in shares if of.get(p) not in (None, called)]
    if not own or not others:
        return []
    more = np.mean(own, axis=0) - np.mean(others, axis=0)
    return [int(k) for k in np.argsort(-more, kind="stable")[:LEADING] if more[k] > 0]


def prototypes(
    cluster: np.ndarray,
    away: np.ndarray,
    patient: Sequence[str],
    shares: dict[str, np.ndarray],
    labels: dict[str, dict[str, str]],
    each: int,
) -> list[Prototype]:
    """`each` tiles of each cluster and of each class. patient: of each tile. A cluster's are those nearest to its
    centre, one of each patient first; a class's are its own patients' of the clusters that lead in it."""
    made: list[Prototype] = []
    whose = np.asarray(patient, dtype=object)
    for k in range(len(next(iter(shares.values())))):
        chosen = _nearest(np.flatnonzero(cluster == k), away, whose, each)
        made += [Prototype("cluster", str(k), t, k, float(away[t])) for t in chosen]
    for name, of in labels.items():
        for called in sorted(set(of.values())):
            mine = np.array([of.get(p) == called for p in patient])
            best = leading(shares, of, called)
            for at, k in enumerate(best):
                room = each // len(best) + (at < each % len(best))
                chosen = _nearest(np.flatnonzero(mine & (cluster == k)), away, whose, room)
                made += [Prototype(name, called, t, k, float(away[t])) for t in chosen]
    return made


def _nearest(tiles: np.ndarray, away: np.ndarray, whose: np.ndarray, most: int) -> list[int]:
    """The tiles with the smallest distance, one of each patient, then a second of each, and so on."""
    order = tiles[np.argsort(away[tiles], kind="stable")].tolist()
    turn: dict[str, int] = {}
    ranked: list[tuple[int, int]] = []
    for t in order:
        turn[whose[t]] = turn.get(whose[t], 0) + 1
        ranked.append((turn[whose[t]], t))
    return [t for _, t in sorted(ranked, key=lambda pair: pair[0])[:most]]
