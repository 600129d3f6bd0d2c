"""Weights in the naming of the MHIM-MIL authors' program -> a model of this folder, so that their checkpoints live on.

In: a state dict (tensors by name), the student, the number of classes and the feature width. Out: `mhim` when the
state holds the recycle network, else the bare student, filled with exactly these weights. Knows no file.

The names say nothing of the activations and of the training settings: those of the published configurations are taken
(GELU after the embedding, ReLU in the attention, and configs/mhim_v2.yaml). Two names carry nothing: `merge.global_q`
is an alias of `merge.global_q_mm`, and dsmil's `predictor` is never used there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor

from mhim.configs import lookup
from mhim.configs.errors import UserError
from mhim.mil.models import MIL
from mhim.mil.reference_heads import ROWS

Student = Literal["abmil", "transmil", "dsmil"]

# How the published program trains; the rest of mhim's settings does not differ from it.
PUBLISHED: dict[str, Any] = {
    "mask_ratio_h": 0.03,
    "share_max": 1.0,
    "score": "probability",
    "merge": "mca",
    "merge_at_test": False,
    "keep_ratio": 0.8,
    "min_kept": 0,
    "order": "shuffled",
    "consistency": "embedding",
    "teacher": "ema",
    "teacher_mode": "train",
    "student_start": "fresh",
}

_LINEAR = ("weight", "bias")
# theirs -> ours, for the bare student
_NAMES: dict[str, dict[str, str]] = {
    "abmil": {
        **{f"feature.0.{x}": f"feature.linear.{x}" for x in _LINEAR},
        "online_encoder.attention.attention.0.weight": "attend.weight",
        "online_encoder.attention.attention.2.weight": "score.weight",
        **{f"predictor.{x}": f"classifier.{x}" for x in _LINEAR},
    },
    "transmil": {
        **{f"feature.0.{x}": f"feature.linear.{x}" for x in _LINEAR},
        "online_encoder.cls_token": "token",
        **{
            f"online_encoder.layer{k}.{theirs}": f"{ours}"
            for k in (1, 2)
            for theirs, ours in [
                *((f"norm.{x}", f"norm{k}.{x}") for x in _LINEAR),
                ("attn.to_qkv.weight", f"layer{k}.to_qkv.weight"),
                ("attn.res_conv.weight", f"layer{k}.conv"),
                *((f"attn.to_out.0.{x}", f"layer{k}.to_out.{x}") for x in _LINEAR),
            ]
        },
        **{
            f"online_encoder.pos_embedding.{theirs}.{x}": f"position.{ours}.{x}"
            for theirs, ours in (("proj", "conv7"), ("proj1", "conv5"), ("proj2", "conv3"))
            for x in _LINEAR
        },
        **{f"online_encoder.norm.{x}": f"norm.{x}" for x in _LINEAR},
        **{f"predictor.{x}": f"classifier.{x}" for x in _LINEAR},
    },
    "dsmil": {
        **{f"feature.0.{x}": f"feature.linear.{x}" for x in _LINEAR},
        **{f"online_encoder.i_classifier.0.{x}": f"instance.{x}" for x in _LINEAR},
        **{f"online_encoder.b_classifier.q.{k}.{x}": f"query.{k}.{x}" for k in (0, 2) for x in _LINEAR},
        **{f"online_encoder.b_classifier.v.1.{x}": f"value.{x}" for x in _LINEAR},
        **{f"online_encoder.b_classifier.fcc.{x}": f"bag.{x}" for x in _LINEAR},
    },
}
_RECYCLE = {
    "merge.global_q_mm": "queries",
    **{f"merge.norm.{x}": f"norm.{x}" for x in _LINEAR},
    "merge.attn.to_q.weight": "to_q.weight",
    "merge.attn.to_kv.weight": "to_kv.weight",
    **{f"merge.attn.to_out.0.{x}": f"to_out.{x}" for x in _LINEAR},
}
_UNUSED = {
    "abmil": {"merge.global_q"},
    "transmil": {"merge.global_q"},
    "dsmil": {"merge.global_q", "predictor.weight", "predictor.bias"},
}

_MARKS: dict[Student, str] = {  # a name that only this student has
    "abmil": "online_encoder.attention.attention.0.weight",
    "transmil": "online_encoder.cls_token",
    "dsmil": "online_encoder.i_classifier.0.weight",
}


class NotReference(UserError, ValueError):
    """The weights are not those of the named student; the message lists every name and shape that does not fit."""


def settings(state: Mapping[str, Tensor], student: Student, activation: str = "gelu") -> tuple[str, dict[str, Any]]:
    """Model name and `model_params` with which `load_reference` builds: what a bundle's card has to say."""
    state = _plain(state)
    width = len(_known(state, "feature.0.weight"))
    own: dict[str, Any] = {"width": width, "activation": activation}
    if student == "abmil":
        own["attention_width"] = len(_known(state, "online_encoder.attention.attention.0.weight"))
    if student == "dsmil":
        own["query_width"] = len(_known(state, "online_encoder.b_classifier.q.0.weight"))
    if student == "transmil":  # landmarks and head size follow from the width in their program
        own |= {"landmarks": width // 2, "heads": _known(state, "online_encoder.layer1.attn.res_conv.weight").shape[0]}
    if "merge.global_q_mm" not in state:
        return student, own
    k = state["merge.global_q_mm"].shape[1]
    return "mhim", {**PUBLISHED, "student": student, "student_params": own, "merge_k": k}


def student_of(state: Mapping[str, Tensor]) -> Student:
    """Which student the names belong to. Raises NotReference."""
    for student, name in _MARKS.items():
        if name in _plain(state):
            return student
    some = ", ".join(list(state)[:3])
    raise NotReference(f"no student of the MHIM-MIL program has these weights (they begin with {some})")


def features(state: Mapping[str, Tensor]) -> int:
    """Width of the features that these weights take. Raises NotReference."""
    return _known(_plain(state), "feature.0.weight").shape[1]


def outputs(state: Mapping[str, Tensor], student: Student) -> int:
    """Number of logits that these weights give. Raises NotReference."""
    name = "online_encoder.i_classifier.0.weight" if student == "dsmil" else "predictor.weight"
    return len(_known(_plain(state), name))


def load_reference(
    state_dict: Mapping[str, Tensor],
    student: str,
    n_classes: int,
    in_dim: int,
    activation: str | None = None,
    **options: Any,
) -> MIL:
    """The model that these weights are, in eval mode and in their dtype; as its own teacher, the student's weights.

    student: one of the MHIM-MIL program's, or a row of `reference_heads.ROWS`, whose names are its authors'.
    activation: after the embedding: gelu as in the published configurations (the default here), or relu, the program's
    default; no name tells. Of a row, that model's own default. options: of a row, settings of the model that no weight
    tells. Raises NotReference for a student that is not known and for every missing, unexpected or misshapen name.
    """
    if student in ROWS:
        given = options if activation is None else options | {"activation": activation}
        return _load_row(state_dict, student, n_classes, in_dim, given)
    if student not in _NAMES:
        raise NotReference(f"unknown student {student!r}; there is: {', '.join([*_NAMES, *ROWS])}")
    state = {k: v for k, v in _plain(state_dict).items() if k not in _UNUSED[student]}
    name, params = settings(state, cast(Student, student), activation or "gelu")
    module = lookup.find("mhim.mil.models", name)
    model: MIL = module.build(in_dim, n_classes, lookup.params(module, params))
    names = {ours: theirs for theirs, ours in _NAMES[student].items()}
    if name == "mhim":
        names = {f"{part}.{ours}": theirs for part in ("student", "teacher") for ours, theirs in names.items()}
        names |= {f"recycle.{ours}": theirs for theirs, ours in _RECYCLE.items()}
    return fill(model, state, names, f"a {student} of {n_classes} classes on {in_dim} features")


def _load_row(state_dict: Mapping[str, Tensor], row: str, n_classes: int, in_dim: int, options: dict[str, Any]) -> MIL:
    state = _plain(state_dict)
    try:
        naming = ROWS[row](state)
    except KeyError as error:
        raise NotReference(f"missing {error.args[0]}: these are not weights of {row}") from error
    module = lookup.find("mhim.mil.models", naming.model)
    # a loaded model answers, also in training mode, as its weights say: dropout is on where it is asked for
    still = {name: 0.0 for name in module.Params.model_fields if name.endswith("dropout")}
    theirs = {ours: theirs for theirs, ours in naming.names.items()}["classifier.weight"]
    n_out = 1 if n_classes == 2 and len(_known(state, theirs)) == 1 else n_classes  # one logit tells two classes apart
    model: MIL = module.build(in_dim, n_out, lookup.params(module, still | naming.settings | options))
    state = {k: v for k, v in state.items() if k not in naming.unused}
    names = {ours: theirs for theirs, ours in naming.names.items()}
    return fill(model, state, names, f"a {row} of {n_classes} classes on {in_dim} features")


def fill(model: MIL, state: Mapping[str, Tensor], names: Mapping[str, str], what: str) -> MIL:
    """`model` with the weights `state`, in eval mode and in their dtype. names: ours -> theirs. Raises NotReference."""
    own = model.state_dict()
    filled = {ours: _fitting(state, theirs, own[ours]) for ours, theirs in names.items() if ours in own}
    wrong = [f"missing {theirs}" for theirs in dict.fromkeys(names.values()) if theirs not in state]
    wrong += [f"unexpected {k}" for k in state if k not in names.values()]
    wrong += [
        f"{names[ours]} is {tuple(state[names[ours]].shape)}, expected {tuple(own[ours].shape)}"
        for ours, t in filled.items()
        if t is None and names[ours] in state and not ours.startswith("teacher.")
    ]
    if wrong:
        raise NotReference(f"these are not the weights of {what}: {'; '.join(wrong)}")
    model.to(next(iter(state.values())).dtype)
    drawn = {k: v for k, v in model.state_dict().items() if k not in names}  # no weight: a fixed random order
    model.load_state_dict(drawn | {k: v for k, v in filled.items() if v is not None})
    return model.eval()


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that training on several GPUs leaves."""
    return {k.removeprefix("module."): v for k, v in state.items()}


def _known(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise NotReference(f"missing {name}: these are not weights of the MHIM-MIL program, or of another student")
    return state[name]


def _fitting(state: Mapping[str, Tensor], name: str, own: Tensor) -> Tensor | None:
    """The named weights in our shape: theirs may have axes of length one, and a Conv1d kernel is flat here."""
    theirs = state.get(name)
    if theirs is None:
        return None
    squeezed = [d for d in theirs.shape if d != 1]
    same = squeezed == [d for d in own.shape if d != 1]
    folded = own.ndim == 2 and theirs.ndim == 3 and theirs[0].numel() == own.shape[1] and len(theirs) == len(own)
    return theirs.detach().clone().reshape(own.shape) if same or folded else None
