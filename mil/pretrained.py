"""A start from pretrained weights that a user brings: FEATHER's layout (Shao et al., ICML 2025, arXiv 2506.09022).

In: a fresh model and a state dict. Out: the model filled, and the names that filled it. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mhim.mil.models import MIL
from mhim.mil.models.feather import Feather
from mhim.mil.reference import NotReference, fill
from mhim.mil.reference_heads import ROWS

CLASSIFIER = ("classifier.weight", "classifier.bias")


def start(model: MIL, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Fill a fresh `feather` model with pretrained weights and return their names, without the prefix `model.` of
    wrapped checkpoints. A classifier of the same shape comes along; one of another, or none, leaves the fresh one.
    Raises NotReference naming each missing, unexpected and misshapen weight, so that no half of a file is taken."""
    if not isinstance(model, Feather):
        raise NotReference("train.pretrained is for train.model=feather (or mhim with student=feather)")
    training = model.training
    given = {k.removeprefix("model."): v.float() for k, v in state.items()}
    own = {"classifier.weight": model.classifier.weight, "classifier.bias": model.classifier.bias}
    fits = all(k in given and given[k].shape == v.shape for k, v in own.items())
    if not fits:
        given |= {k: v.detach() for k, v in own.items()}
    try:
        naming = ROWS["feather"](given)
    except KeyError as error:
        raise NotReference(f"missing {error.args[0]}: these are no weights of FEATHER's layout") from error
    for name, value in naming.settings.items():
        if getattr(model.params, name) != value:
            raise NotReference(
                f"these weights have {name} {value}, the model {getattr(model.params, name)}: "
                f"set train.model_params={{{name}: {str(value).lower()}}}"
            )
    fill(model, given, {ours: theirs for theirs, ours in naming.names.items()}, "FEATHER's layout on these features")
    model.train(training)
    return tuple(k for k in given if fits or k not in CLASSIFIER)
