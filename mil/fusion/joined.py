"""A network that reads several modalities at once, weighed beside the answers of each alone by the rule of `late.py`.

The network is one more member: where two modalities or more are at hand, P, its out-of-fold answer to just these (its
other inputs withheld, for which modality dropout trained it) enters the late fusion of P, with a skill, a scale and a
weight of its own for each P. So it weighs nothing where it knows nothing, and the fused answer stays by the better of
the others. With one modality at hand the network is not asked: the answer ranks as that member alone.

Scores of the network are given under the names of `key(P)`, as many as there are patterns P at hand; so a modality is
taken away by leaving out its scores, and the network's answer without it is then the one that counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mhim.mil.fusion import late
from mhim.mil.fusion.late import Late, OnLate, Pattern
from mhim.mil.fusion.linear import Form

JOINT = "joint"  # the network's name as a member


def key(of: Sequence[str]) -> str:
    """The name of the network's scores with just the modalities `of` at hand, in whatever order these are given."""
    return f"{JOINT} of {'+'.join(sorted(of))}"


def is_key(name: str) -> bool:
    """Whether scores of this name are the network's."""
    return name.startswith(f"{JOINT} of ")


@dataclass(frozen=True)
class Joined(OnLate):
    """late: the fusion of the modalities without the network. joined: pattern of two modalities or more -> late fusion
    of them and of `JOINT`, of which only the whole pattern is fitted. The network is no modality."""

    joined: Mapping[tuple[str, ...], Late]

    @property
    def skill(self) -> Mapping[str, float]:
        """Also of the network with every modality at hand."""
        whole = self.joined.get(self.names)
        return dict(self.late.skill) | ({} if whole is None else {JOINT: whole.skill[JOINT]})

    @property
    def patterns(self) -> Mapping[tuple[str, ...], Pattern]:
        """The modalities at hand -> how they and the network are weighed."""
        return dict(self.late.patterns) | {of: one.patterns[one.names] for of, one in self.joined.items()}

    def score(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64 (q,) of one patient. given: modality -> scores (q,), and those of the network."""
        fusion, scores = self._at(given)
        return fusion.score(scores)

    def parts(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Late.parts`."""
        fusion, scores = self._at(given)
        return fusion.parts(scores)

    def weights(self, given: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Modality at hand, and `JOINT` -> its weight, sum 1."""
        fusion, scores = self._at(given)
        return fusion.weights(scores)

    def rescaled(self, scores: Mapping[str, np.ndarray]) -> Joined:
        """See `Late.rescaled`; scores: also of the network, by pattern."""
        own = {m: s for m, s in scores.items() if m in self.names}
        joined = {
            of: one.rescaled(
                {m: own[m] for m in of if m in own} | ({JOINT: scores[key(of)]} if key(of) in scores else {})
            )
            for of, one in self.joined.items()
        }
        return replace(self, late=self.late.rescaled(own), joined=joined)

    def to_json(self) -> dict[str, Any]:
        """Plain values from which `from_json` makes the same."""
        joined = [{"of": list(of), "late": one.to_json()} for of, one in self.joined.items()]
        return {"late": self.late.to_json(), "joined": joined}

    def _at(self, given: Mapping[str, np.ndarray]) -> tuple[Late, dict[str, np.ndarray]]:
        of = tuple(m for m in self.names if m in given)
        scores = {m: given[m] for m in of}
        if of in self.joined and key(of) in given:
            return self.joined[of], scores | {JOINT: given[key(of)]}
        return self.late, scores


def from_json(value: Mapping[str, Any]) -> Joined:
    """The fusion that `Joined.to_json` described."""
    joined = {tuple(one["of"]): late.from_json(one["late"]) for one in value["joined"]}
    return Joined(late.from_json(value["late"]), joined)


def fit(
    outside: Mapping[str, np.ndarray], target: np.ndarray, form: Form, inner: Sequence[np.ndarray], levels: int = 0
) -> Joined:
    """Weigh modalities and the network. outside: as of `late.fit`, with the network's scores under `key(P)`, NaN for
    who lacks one of P. Other arguments and errors as there."""
    alone = late.fit({m: s for m, s in outside.items() if not is_key(m)}, target, form, inner, levels)
    joined = {}
    for of in alone.patterns:
        scores = outside.get(key(of))
        if scores is not None and np.isfinite(scores).all(axis=1).any():
            members = {m: outside[m] for m in of} | {JOINT: scores}
            joined[of] = late.fit(members, target, form, inner, levels, whole=True)
    return Joined(alone, joined)
