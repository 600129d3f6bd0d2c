"""IBMIL: bags set against what they are confused with (Lin et al., CVPR 2023, arXiv 2303.06873).

Stage 1 (clusters=0): s_n = w tanh(V x_n + v) + b_w, p = softmax(s), bag vector b = sum_n p_n x_n, logits = W b + b_c;
no embedding layer. Between: k-means of the training part's bag vectors in unit length; a confounder c_k is the mean of
the raw vectors of a cluster, and the K of them stay in the model. Stage 2, all weights new: alpha = softmax_k((W_k c_k)
(W_q b) / sqrt(l)), ĉ = sum_k alpha_k c_k, logits = W [b | ĉ] + b_c ("cat") or W (b + ĉ) + b_c ("add"). learn: the
confounders are trained on.

Stage 1 is the model's `baseline`, trained before it on the same fold; `prepare` makes the dictionary from the training
bags with it. With fewer bags than clusters some confounders are there twice, which only weighs them. The scale sqrt(l)
is in single precision, as published. Instance n adds p_n W_b x_n to the logits, exactly, given alpha.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike, of_shares
from mhim.mil.parts.layers import initialise, load_exact, weighted_softmax
from mhim.mil.ranges import Choice

FALLS_BACK = False  # stage 1 is a step of the method, not the plain model that it must beat


class Params(Settings):
    """Settings of IBMIL."""

    attention_width: int = Field(128, ge=1, description="width of the attention's hidden layer")
    clusters: int = Field(8, ge=0, description="confounders; 0: stage 1 alone, without any")
    joint_width: int = Field(128, ge=1, description="width in which bag and confounders are compared")
    merge: Literal["cat", "add"] = Field("cat", description="bag vector and confounder side by side, or added")
    learn: bool = Field(False, description="confounders are trained on")


TUNED = {"clusters": Choice((2, 4, 8)), "merge": Choice(("cat", "add"))}


class IbMil(MIL):
    """See the module's text."""

    confounders: Tensor

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params, self.instance_width = params, in_dim
        wide = 2 * in_dim if params.clusters and params.merge == "cat" else in_dim
        self.attend = nn.Linear(in_dim, params.attention_width)
        self.score = nn.Linear(params.attention_width, 1)
        self.classifier = nn.Linear(wide, n_out)
        if params.clusters:
            self.bag_map = nn.Linear(in_dim, params.joint_width)
            self.confounder_map = nn.Linear(in_dim, params.joint_width)
            start = torch.randn(params.clusters, in_dim)
            if params.learn:
                self.confounders = nn.Parameter(start)
            else:
                self.register_buffer("confounders", start)
        initialise(self)
        self._first: list[IbMil] = []  # stage 1, in a list: it is no part of this model's weights

    def start_from(self, baseline_state: dict[str, Tensor]) -> None:
        """Take stage 1, with which `prepare` reads the training bags. Raises ValueError naming what does not fit."""
        params = self.params.model_copy(update={"clusters": 0})
        n_out, in_dim = self.classifier.out_features, self.attend.in_features
        first = IbMil(in_dim, n_out, params)
        load_exact(first, baseline_state, "stage 1 of ibmil")
        self._first = [first.requires_grad_(False).eval()]

    def prepare(self, batches: Iterable[tuple[Bag, Tensor]], task: TaskLike) -> None:
        """Confounders out of the training bags, by stage 1."""
        if not self._first:
            return
        first = self._first[0].to(self.attend.weight.device)
        vectors = [first.encode(i).embedding[0] for bag, _ in batches for i in first.instances(bag)]
        found = dictionary(torch.stack(vectors), self.params.clusters)
        with torch.no_grad():
            self.confounders.copy_(found)
        self._first = []

    def embed(self, x: Tensor) -> Tensor:
        return x

    def alone(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.score(torch.tanh(self.attend(z)))[:, 0],)

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        (s,) = instances.alone or self.alone(z)
        p = weighted_softmax(s, instances.log_count)
        embedding = p.to(z.dtype) @ z
        if self.params.clusters:
            alpha = self.intervened(embedding)
            confounder = alpha.to(embedding.dtype) @ self.confounders.to(embedding.dtype)
            if self.params.merge == "cat":
                embedding = torch.cat([embedding, confounder])
            else:
                embedding = embedding + confounder
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = z @ self.classifier.weight[:, : z.shape[1]].T.to(z.dtype)
        return of_shares(logits, embedding, p[None], p, evidence)

    def intervened(self, bag: Tensor) -> Tensor:
        """alpha (K,) of a bag vector (D,)."""
        scale = torch.tensor(float(self.params.joint_width), dtype=torch.float32).sqrt().item()
        return weighted_softmax(self.confounder_map(self.confounders) @ self.bag_map(bag) / scale, None)


def dictionary(vectors: Tensor, clusters: int) -> Tensor:
    """K confounders (K, D) of bag vectors (M, D): means of the clusters k-means finds among them in unit length."""
    from sklearn.cluster import KMeans

    raw = vectors.double().cpu()
    unit = torch.nn.functional.normalize(raw, dim=1).numpy()
    k = min(clusters, len(torch.unique(raw, dim=0)))
    member = torch.from_numpy(KMeans(k, n_init=10, random_state=0).fit_predict(unit)).long()
    means = torch.stack([raw[member == i].mean(0) for i in range(k)])
    return means[torch.arange(clusters) % k].to(vectors.dtype).to(vectors.device)


def baseline(params: Params) -> tuple[str, dict[str, Any]] | None:
    """Stage 1, or None where this is it."""
    return ("ibmil", params.model_dump() | {"clusters": 0}) if params.clusters else None


def build(in_dim: int, n_out: int, params: Params) -> IbMil:
    """A new model with fresh weights; call `start_from` with stage 1's weights, then `prepare`."""
    return IbMil(in_dim, n_out, params)
