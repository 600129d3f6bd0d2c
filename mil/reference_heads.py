"""Weights of newer models in the naming of their authors' programs -> the same model of this folder.

In: a state dict, a row of the table of models, and what no weight tells (`options`, settings of the model). Out: the
model's settings, and the names of its parameters. `reference.load_reference` fills the model. A name that carries
nothing (a branch that no loss reaches) is listed as unused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]
_LINEAR = ("weight", "bias")


@dataclass(frozen=True)
class Naming:
    """settings: what the shapes tell. names: theirs -> ours. unused: theirs that never touch the output."""

    model: str
    settings: dict[str, Any]
    names: dict[str, str]
    unused: frozenset[str] = frozenset()


def _linear(theirs: str, ours: str, bias: bool = True) -> dict[str, str]:
    return {f"{theirs}.{x}": f"{ours}.{x}" for x in (_LINEAR if bias else ("weight",))}


def _lse(state: State) -> Naming:
    names = _linear("fc1", "feature.linear") | _linear("fc2", "classifier")
    return Naming("lse", {"width": len(state["fc1.weight"])}, names)


def _acmil(state: State) -> Naming:
    branches, hidden = state["attention.attention_weights.weight"].shape
    names = _linear("dimreduction.fc1", "feature", bias=False)
    names |= _linear("attention.attention_V.0", "attend") | _linear("attention.attention_U.0", "gate")
    names |= _linear("attention.attention_weights", "score") | _linear("Slide_classifier.fc", "classifier")
    each = {k: v for i in range(branches) for k, v in _linear(f"classifier.{i}.fc", f"branch_classifiers.{i}").items()}
    settings = {"width": len(state["dimreduction.fc1.weight"]), "attention_width": hidden, "branches": branches}
    if branches == 1:  # the bag's classifier alone answers
        return Naming("acmil", settings, names, frozenset(each))
    return Naming("acmil", settings, names | each)


def _abmilx(state: State) -> Naming:
    width, d = len(state["feature.0.weight"]), state["attention.fc1.weight"].shape[1]
    names = _linear("feature.0", "feature.linear") | _linear("attention.fc1", "attend")
    names |= _linear("attention.fc2", "score") | _linear("proj", "project") | _linear("classifier", "classifier")
    refine = "attn_plus_fn.qk.weight" in state
    if refine:
        names |= _linear("attn_plus_fn.norm_x", "norm") | _linear("attn_plus_fn.qk", "query_key", bias=False)
        names["attn_plus_fn.v.weight"] = "alpha"
    return Naming("abmilx", {"width": width, "heads": width // d, "refine": refine}, names)


ROWS: dict[str, Callable[[State], Naming]] = {"lse": _lse, "acmil": _acmil, "abmilx": _abmilx}
