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


def _heads(theirs: str, scores: str = "", pool: str = "") -> dict[str, str]:
    """Names of one query attention, of its scores and what it pools with."""
    names: dict[str, str] = {}
    if scores:
        names |= _linear(f"{theirs}.q_proj", f"{scores}.query") | _linear(f"{theirs}.k_proj", f"{scores}.key")
    if pool:
        names |= _linear(f"{theirs}.v_proj", f"{pool}.value") | _linear(f"{theirs}.out_proj", f"{pool}.out")
        names |= _linear(f"{theirs}.layer_norm", f"{pool}.norm")
    return names


def _gated(names: dict[str, str]) -> dict[str, str]:
    names |= _linear("attention.attention_V.0", "attend") | _linear("attention.attention_U.0", "gate")
    return names | _linear("attention.attention_weights", "score")


def _aem(state: State) -> Naming:
    names = _linear("dimreduction.fc1", "feature", bias=False) | _linear("classifier.fc", "classifier")
    settings: dict[str, Any] = {"width": len(state["dimreduction.fc1.weight"])}
    if "q" in state:
        names |= _heads("attention", "scores", "pool") | {"q": "queries"}
        return Naming("aem", settings | {"form": "query"}, names)
    settings["attention_width"] = state["attention.attention_weights.weight"].shape[1]
    return Naming("aem", settings, _gated(names))


def _acmil(state: State) -> Naming:
    settings: dict[str, Any] = {"width": len(state["dimreduction.fc1.weight"])}
    names = _linear("dimreduction.fc1", "feature", bias=False) | _linear("Slide_classifier.fc", "classifier")
    if "q" in state:
        branches = state["q"].shape[1]
        settings |= {"form": "heads"}
        names |= {"q": "queries"} | _heads("bag_attention", pool="pool")
    else:
        branches, hidden = state["attention.attention_weights.weight"].shape
        settings["attention_width"] = hidden
        names = _gated(names)
    settings["branches"] = branches
    several, unused = branches > 1, set()
    for i in range(branches):
        own = _linear(f"classifier.{i}.fc", f"branch_classifiers.{i}")
        pooled = _heads(f"sub_attention.{i}", pool=f"pools.{i}") if "q" in state else {}
        if several:
            names |= own | pooled
        else:  # the bag's classifier alone answers
            unused |= {*own, *pooled}
        if "q" in state:
            names |= _heads(f"sub_attention.{i}", scores=f"scores.{i}")
    return Naming("acmil", settings, names, frozenset(unused))


def _abmilx(state: State) -> Naming:
    norm = "feature.1.weight" in state
    embedding = "feature.1" if norm else "feature.0"
    bias = f"{embedding}.bias" in state
    width = len(state[f"{embedding}.weight"])
    scored, d = state["attention.fc2.weight"].shape
    joint = scored > 1
    settings = {"width": width, "heads": scored if joint else width // d, "joint": joint, "norm": norm, "bias": bias}
    names = _linear(embedding, "feature.linear", bias) | _linear("proj", "project", bias)
    for theirs, ours in (("attention.fc1", "attend"), ("attention.fc2", "score"), ("classifier", "classifier")):
        names |= _linear(theirs, ours, bias)
    if norm:
        names |= {"feature.0.weight": "before.weight", "norm1.weight": "after.weight"}
    settings["ffn"] = "mlp.fc1.weight" in state
    if settings["ffn"]:
        names |= _linear("norm_ffn", "ffn.0") | _linear("mlp.fc1", "ffn.1") | _linear("mlp.fc2", "ffn.3")
    settings["refine"] = "attn_plus_fn.qk.weight" in state
    if settings["refine"]:
        names |= _linear("attn_plus_fn.norm_x", "norm") | _linear("attn_plus_fn.qk", "query_key", bias=False)
        names["attn_plus_fn.v.weight"] = "alpha"
    return Naming("abmilx", settings, names)


def _ilra(state: State) -> Naming:
    norm = "pooling.mha.ln0.weight" in state
    layers = sum(k.endswith(".latent") for k in state)
    _, rank, width = state["gab_blocks.0.latent"].shape
    names = {"pooling.S": "query"} | _linear("classifier", "classifier")
    blocks = {"pooling.mha": "pool"}
    for i in range(layers):
        names[f"gab_blocks.{i}.latent"] = f"latents.{i}"
        for theirs, ours in (("project_forward", "to_latents"), ("project_backward", "back")):
            blocks[f"gab_blocks.{i}.{theirs}"] = f"{ours}.{i}"
            names |= _linear(f"gab_blocks.{i}.{theirs}.gate.0", f"{ours}.{i}.gate")
    inside = {"fc_q": "query", "fc_k": "key", "fc_v": "value", "fc_o": "last", "multihead_attn.out_proj": "out"}
    inside |= {"ln0": "norm0", "ln1": "norm1"} if norm else {}
    for theirs, ours in blocks.items():
        for a, b in inside.items():
            names |= _linear(f"{theirs}.{a}", f"{ours}.{b}")
        names |= {f"{theirs}.multihead_attn.in_proj_{x}": f"{ours}.inner.{x}" for x in _LINEAR}
    return Naming("ilra", {"width": width, "rank": rank, "layers": layers, "norm": norm}, names)


def _dgrmil(state: State) -> Naming:
    heads = state["encoder_instances.0.attn.res_conv.weight"].shape[0]
    width = len(state["triple_optimizer.fc1.weight"])
    names = {"lesionRrepresentation": "globals", "token": "token", "postivecenter": "positive"}
    names |= {"normalcenter": "negative"} | _linear("classifier.0", "classifier")
    names |= _linear("triple_optimizer.fc1", "embed1") | _linear("triple_optimizer.fc2", "embed2")
    for theirs, ours in (("encoder_instances", "of_instances"), ("encoder_globalLesion", "of_globals")):
        names |= _linear(f"{theirs}.0.norm", f"{ours}.norm") | _linear(f"{theirs}.1", f"{ours}.after")
        attention, inner = f"{theirs}.0.attn", f"{ours}.attention"
        names |= {
            f"{attention}.to_qkv.weight": f"{inner}.to_qkv.weight",
            f"{attention}.res_conv.weight": f"{inner}.conv",
        }
        names |= _linear(f"{attention}.to_out.0", f"{inner}.to_out")
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
        names |= _linear(f"crossattention.attn.{theirs}", ours)
    names |= _linear("crossffn.0", "last") | _linear("crossffn.1", "norm")
    globals_ = state["lesionRrepresentation"].shape[-2]
    settings = {"width": width, "heads": heads, "landmarks": width // 2, "globals": globals_}
    return Naming("dgrmil", settings, names)


def _wikg(state: State) -> Naming:
    both, attention = "linear1.weight" in state, "readout.gate_nn.0.weight" in state
    names = _linear("_fc1.0", "feature") | _linear("W_head", "head") | _linear("W_tail", "tail")
    names |= _linear("norm", "norm") | _linear("fc", "classifier")
    names |= _linear("linear1", "added") | _linear("linear2", "multiplied") if both else _linear("linear", "joined")
    if attention:
        names |= _linear("readout.gate_nn.0", "attend") | _linear("readout.gate_nn.2", "score")
    settings = {"width": len(state["_fc1.0.weight"]), "mix": "both" if both else "concat"}
    return Naming("wikg", settings | {"readout": "attention" if attention else "mean"}, names)


def _ibmil(state: State) -> Naming:
    names = _linear("attention.0", "attend") | _linear("attention.2", "score") | _linear("classifier", "classifier")
    settings: dict[str, Any] = {"attention_width": len(state["attention.0.weight"]), "clusters": 0}
    if "confounder_feat" not in state:
        return Naming("ibmil", settings, names)
    names |= _linear("W_q", "bag_map") | _linear("W_k", "confounder_map") | {"confounder_feat": "confounders"}
    clusters, width = state["confounder_feat"].shape
    cat = state["classifier.weight"].shape[1] == 2 * width
    settings |= {"clusters": clusters, "merge": "cat" if cat else "add", "joint_width": len(state["W_q.weight"])}
    return Naming("ibmil", settings, names)


def _camil(state: State) -> Naming:
    gated = "camil_att_pool.fc_gated.weight" in state
    layer = "nystrom_transformer_layer"
    names = _linear(f"{layer}.norm1", "norm") | {f"{layer}.att_module.qkv_nn.weight": "attention.to_qkv.weight"}
    names |= _linear("camil_self_attention.qk_nn", "query_key", bias=False)
    names |= _linear("camil_self_attention.v_nn", "value", bias=False) | _linear("classifier", "classifier")
    names |= _linear("camil_att_pool.fc1", "attend") | _linear("camil_att_pool.fc2", "score", bias=False)
    if gated:
        names |= _linear("camil_att_pool.fc_gated", "gate")
    hidden, width = state["camil_att_pool.fc1.weight"].shape
    settings = {"embed": False, "attention_width": hidden, "gated": gated, "landmarks": width // 2}
    return Naming("camil", settings, names)


def _smabmil(state: State) -> Naming:
    names = _linear("pool.proj1", "attend") | _linear("pool.proj2", "score", bias=False)
    names |= _linear("last_layer", "classifier")
    settings: dict[str, Any] = {"attention_width": len(state["pool.proj1.weight"])}
    if "pool.sm.sm.coef" in state:
        return Naming("smabmil", settings | {"learn_alpha": True}, names | {"pool.sm.sm.coef": "coef"})
    return Naming("smabmil", settings, names)


def _asmil(state: State) -> Naming:
    tokens = state["student.q"].shape[1]
    names = {"student.cls": "query"} | _linear("student.Slide_classifier.fc", "classifier")
    names |= _heads("student.bag_attention", "bag_scores", "bag_pool")
    for side in ("student", "anchor"):
        names |= {f"{side}.q": f"{side}.queries"} | _linear(f"{side}.dimreduction.fc1", f"{side}.feature", bias=False)
        for i in range(tokens):
            names |= _heads(
                f"{side}.sub_attention.{i}", f"{side}.scores.{i}", f"pools.{i}" if side == "student" else ""
            )
    width = len(state["student.dimreduction.fc1.weight"])
    return Naming("asmil", {"width": width, "tokens": tokens, "drop": min(2, tokens - 1), "temperature": 1.0}, names)


def _nnmil(state: State) -> Naming:
    names = _linear("V", "attend") | _linear("w", "score") | _linear("cls", "classifier")
    gated = "U.weight" in state
    return Naming(
        "nnmil",
        {"attention_width": len(state["V.weight"]), "gated": gated},
        names | (_linear("U", "gate") if gated else {}),
    )


def _feather(state: State) -> Naming:
    gated = "global_attn.attention_a.0.weight" in state
    layers = 2 if "patch_embed.3.weight" in state else 1
    names = _linear("patch_embed.0", "embedding.0") | _linear("classifier", "classifier")
    names |= _linear("patch_embed.3", "embedding.1") if layers == 2 else {}
    if gated:
        names |= _linear("global_attn.attention_a.0", "attend") | _linear("global_attn.attention_b.0", "gate")
        names |= _linear("global_attn.attention_c", "score")
    else:
        names |= _linear("global_attn.module.0", "attend") | _linear("global_attn.module.3", "score")
    hidden = len(state["global_attn.attention_a.0.weight" if gated else "global_attn.module.0.weight"])
    settings = {"width": len(state["patch_embed.0.weight"]), "layers": layers, "gated": gated}
    return Naming("feather", settings | {"attention_width": hidden}, names)


ROWS: dict[str, Callable[[State], Naming]] = {
    "lse": _lse,
    "aem": _aem,
    "acmil": _acmil,
    "abmilx": _abmilx,
    "ilra": _ilra,
    "dgrmil": _dgrmil,
    "wikg": _wikg,
    "ibmil": _ibmil,
    "camil": _camil,
    "smabmil": _smabmil,
    "asmil": _asmil,
    "nnmil": _nnmil,
    "feather": _feather,
}
