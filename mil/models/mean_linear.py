"""The linear control: one linear map of the mean of a slide's features, fitted to convergence.

bag embedding = mean of x_n (D,), nothing embedded; logits = W embedding + b. Before the first step W and b are those
that fit the training part best, loss + ridge / (2 M) |W sd|^2 over its M bags, with sd that of the bags' means: by the
task a logistic regression (sklearn's with C = 1 / ridge on standardised means), a linear or a Cox regression. The steps
that follow keep to the same sum. What no attention model beats on a set has no instances to find there. Instance n adds
W x_n / N to the logits, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn

from mhim.configs.schema import Settings
from mhim.mil.models import MIL, Bag, Encoded, Instances, TaskLike, of_shares
from mhim.mil.parts.convex import smallest
from mhim.mil.parts.layers import weighted_softmax
from mhim.mil.ranges import Span

SCALES_ITSELF = True


class Params(Settings):
    """Settings of the linear control."""

    ridge: float = Field(1.0, gt=0, description="ridge on the weights of the standardised mean, over all bags")


TUNED = {"ridge": Span(1e-2, 1e3, log=True)}


class MeanLinear(MIL):
    """See the module's text."""

    sd: Tensor
    strength: Tensor

    def __init__(self, in_dim: int, n_out: int, params: Params) -> None:
        super().__init__()
        self.params, self.instance_width = params, in_dim
        self.classifier = nn.Linear(in_dim, n_out)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.register_buffer("sd", torch.ones(in_dim))  # of the bags' means
        self.register_buffer("strength", torch.tensor(params.ridge))  # ridge / M

    def prepare(self, batches: Iterable[tuple[Bag, Tensor]], task: TaskLike) -> None:
        """The best fit to the training bags."""
        found = [(torch.stack([_mean(i) for i in self.instances(bag)]), target) for bag, target in batches]
        means, target = torch.cat([m for m, _ in found]).double(), torch.cat([t for _, t in found])
        center, sd = means.mean(0), means.std(0, unbiased=False)
        sd = torch.where(sd > 1e-6, sd, 1.0)
        x = (means - center) / sd
        strength, n_out = self.params.ridge / len(x), self.classifier.out_features

        def loss(at: Tensor) -> Tensor:
            w, b = at[:-1], at[-1]
            return task.loss(x @ w + b, target) + 0.5 * strength * w.square().sum()

        at = smallest(loss, x.new_zeros(x.shape[1] + 1, n_out))
        w = at[:-1] / sd[:, None]  # (D, n_out)
        self.classifier.weight.copy_(w.T)
        self.classifier.bias.copy_(at[-1] - center @ w)
        self.sd.copy_(sd)
        self.strength.fill_(strength)

    def embed(self, x: Tensor) -> Tensor:
        return x

    def losses(self, bag: Bag, target: Tensor, task: TaskLike) -> dict[str, Tensor]:
        ridge = 0.5 * self.strength * (self.classifier.weight * self.sd).square().sum()
        return super().losses(bag, target, task) | {"ridge": ridge}

    def encode(self, instances: Instances, detail: bool = False) -> Encoded:
        z = instances.z
        p = weighted_softmax(z.new_zeros(len(z)), instances.log_count)  # 1 / N each
        embedding = p.to(z.dtype) @ z
        logits = self.classifier(embedding)
        if not detail:
            return Encoded(logits, embedding[None])
        evidence = z @ self.classifier.weight.T.to(z.dtype)
        return of_shares(logits, embedding, p[None], p, evidence)


def _mean(instances: Instances) -> Tensor:
    return instances.z.mean(0)


def build(in_dim: int, n_out: int, params: Params) -> MeanLinear:
    """A new model with weights of zero; `prepare` fits them."""
    return MeanLinear(in_dim, n_out, params)
