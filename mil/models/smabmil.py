"""Sm-ABMIL: attention smoothed over tiles that touch (Castro-Macías et al., NeurIPS 2024, arXiv 2410.03276).

s_n = w tanh(V x_n + v), p = softmax(s), bag embedding = sum_n p_n x_n, logits = W embedding + b; no embedding layer.
The smoothing S minimises a f's distance to what it was plus gamma times how much it varies over the graph of touching
tiles: S f = ((1 + gamma) I - gamma A)^-1 f, A = D^-1/2 (A8 + I) D^-1/2 with the 8 neighbours of each tile. place
"early": S of x, in scores and bag; "mid": of V x + v; "late": of s. mode "approx": `steps` times g <- (1 - a) f + a A
g, a = gamma / (1 + gamma); "exact": as often as the numbers' precision can tell, which is the inverse. learn_alpha: a =
1 / (1 + c), c learned. (A public program takes 1 / (1 + gamma) for a fixed a; the two agree at alpha = .5, its default
and this one's.)

S is symmetric and linear: V S x = S V x, and sum_n p_n (S x)_n = sum_n (S p)_n x_n, so smoothing early costs no more
than mid. Instance n adds p_n W x_n (early: (S p)_n W x_n) to the logits, exactly.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Encoded, Instances
from mhim.mil.parts.layers import initialise, weighted_softmax
from mhim.mil.parts.neighbours import Graph, normalised
from mhim.mil.ranges import Choice, Span

USES_POSITION = True


class Params(Settings):
    """Settings of Sm-ABMIL."""

    attention_width: int = Field(128, ge=1, description="width of the attention's hidden layer")
    place: Literal["early", "mid", "late"] = Field("early", description="what is smoothed: features, hidden, scores")
    mode: Literal["approx", "exact"] = Field("approx", description="a number of steps, or the inverse")
    alpha: float = Field(0.5, gt=0, lt=1, description="weight of the neighbours, gamma / (1 + gamma)")
    learn_alpha: bool = Field(False, description="this weight is learned, from alpha on")
    steps: int = Field(10, ge=1, description="steps of mode=approx")


TUNED = {"alpha": Span(0.1, 0.9), "place": Choice(("early", "mid", "late"))}


class SmAbMil(MIL):
    """See the module's text."""

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params, self.instance_width = params, in_dim
        self.attend = nn.Linear(in_dim, params.attention_width)
        self.score = nn.Linear(params.attention_width, 1, bias=False)
        self.classifier = nn.Linear(in_dim, n_out)
        initialise(self)
        if params.learn_alpha:
            self.coef = nn.Parameter(torch.tensor(1.0 / params.alpha - 1.0))

    def embed(self, x: Tensor) -> Tensor:
        return x

    def smooth(self, f: Tensor, graph: Graph) -> Tensor:
        """S f for f (N,) or (N, h)."""
        p = self.params
        a = (1.0 / (1.0 + self.coef.clamp_min(1e-3))).to(f.dtype) if p.learn_alpha else p.alpha
        steps = p.steps
        if p.mode == "exact":  # the eigenvalues of A lie in [-1, 1], so that each step takes the error times a
            steps = math.ceil(math.log(torch.finfo(f.dtype).eps) / math.log(float(a)))
        g = f
        for _ in range(steps):
            g = (1 - a) * f + a * graph.product(g)
        return g

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z, log_count = instances.z, instances.log_count
        place = self.params.place
        grid = z.new_zeros(len(z), 2) if instances.grid is None else instances.grid
        graph = normalised(grid, z, None if log_count is None else log_count.isneginf())
        hidden = z @ self.attend.weight.T.to(z.dtype)
        if place == "early":
            hidden = self.smooth(hidden, graph) + self.attend.bias
        else:
            hidden = hidden + self.attend.bias
        if place == "mid":
            hidden = self.smooth(hidden, graph)
        s = self.score(torch.tanh(hidden))[:, 0]
        if place == "late":
            s = self.smooth(s, graph)
        p = weighted_softmax(s, log_count)
        weight = self.smooth(p, graph) if place == "early" else p  # of x_n in the bag
        embedding = weight.to(z.dtype) @ z
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = z @ self.classifier.weight.T.to(z.dtype)
        contribution = weight[:, None] * evidence
        published = torch.softmax(contribution, dim=1).amax(dim=1)
        share = weight / weight.sum()
        return Encoded(logits, embedding[None], p[None], share, evidence, contribution, published)


def build(in_dim: int, n_out: int, params: Params) -> SmAbMil:
    """A new model with fresh weights."""
    return SmAbMil(in_dim, n_out, params)
