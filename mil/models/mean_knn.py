"""The neighbours control: what the training slides with the most alike mean features are.

bag embedding = mean of x_n (D,), standardised by the training bags' means. Before the first step the model keeps those
means, and of each training bag the answer v (n_out) that fits its outcome best, loss + |v|^2 / (2 M) over all M bags,
so that every outcome a loss is made for has one. logits = scale * mean of v over the k nearest (Euclidean) + bias.
Scale and bias alone are trained, and in training the nearest bag, which is the bag itself, is left out: what neighbours
say counts as much as it is worth for slides not kept. All instances have the same share; a neighbour gives no evidence
per instance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike
from mhim.mil.parts.convex import smallest
from mhim.mil.parts.layers import weighted_softmax
from mhim.mil.ranges import Choice

SCALES_ITSELF = True


class Params(Settings):
    """Settings of the neighbours control."""

    k: int = Field(10, ge=1, description="neighbours; at most all the training bags")


TUNED = {"k": Choice((1, 3, 5, 10, 20, 40))}


class MeanKnn(MIL):
    """See the module's text."""

    means: Tensor
    answers: Tensor
    center: Tensor
    sd: Tensor

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params, self.instance_width = params, in_dim
        self.scale = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(n_out))
        for name, shape in (("means", (0, in_dim)), ("answers", (0, n_out))):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("center", torch.zeros(in_dim))
        self.register_buffer("sd", torch.ones(in_dim))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As always; the number of bags kept is that of the state."""
        for name in ("means", "answers"):
            kept, own = state_dict.get(prefix + name), getattr(self, name)
            if kept is not None and kept.shape[1:] == own.shape[1:]:
                setattr(self, name, own.new_zeros(kept.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def prepare(self, batches: Iterable[tuple[Bag, Tensor]], task: TaskLike) -> None:
        """Keep the training bags."""
        found = [(torch.stack([i.z.mean(0) for i in self.instances(bag)]), target) for bag, target in batches]
        means, target = torch.cat([m for m, _ in found]), torch.cat([t for _, t in found])
        sd = means.std(0, unbiased=False)
        self.center.copy_(means.mean(0))
        self.sd.copy_(torch.where(sd > 1e-6, sd, 1.0))
        self.means = (means - self.center) / self.sd

        def loss(v: Tensor) -> Tensor:
            return task.loss(v, target) + 0.5 / len(v) * v.square().sum()

        self.answers = smallest(loss, means.new_zeros(len(means), len(self.bias))).to(means.dtype)

    def embed(self, x: Tensor) -> Tensor:
        return x

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        p = weighted_softmax(z.new_zeros(len(z)), instances.log_count)  # 1 / N each
        embedding = p.to(z.dtype) @ z
        said = self.said((embedding - self.center) / self.sd)
        return Encoded(self.scale * said + self.bias, embedding[None], share=p if detail else None)

    def said(self, mean: Tensor) -> Tensor:
        """Mean answer (n_out,) of the bags nearest to a standardised mean (D,)."""
        if not len(self.means):
            return torch.zeros_like(self.bias)
        apart = (self.means - mean.to(self.means.dtype)).square().mean(1)
        # the bag itself; not told by a distance of 0, since a draw of its tiles (train.max_tiles) or bfloat16 moves it
        itself = int(self.training and len(self.means) > 1)
        nearest = apart.topk(min(self.params.k + itself, len(apart)), largest=False).indices[itself:]
        return self.answers[nearest].mean(0)


def build(in_dim: int, n_out: int, params: Params) -> MeanKnn:
    """A new model that knows no bag; `prepare` shows it the training part's."""
    return MeanKnn(in_dim, n_out, params)
