"""How much a hard mask may take of a bag, from how its evidence is spread over instances and kinds of tissue. Pure.

The rule, of one kind of tissue: with evidence e_n >= 0 the number of instances it is worth is n_eff = (Σe)² / Σe², and
its hardest instances may go while at least max(evidence_left, few / n_eff) of Σe stays. So a kind whose evidence is a
few instances loses nothing, and one with plenty loses up to 1 - evidence_left; of all kinds together no more than that
goes. Counts depend on the data: they are tensors with known bounds, see `masking`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mhim.mil.parts.masking import FIXED_POINT, Removed, numbers_known

MOST = 0.5  # of a bag's instances may go at most: where evidence is spread evenly, it is not mined but thinned out
LEFT = (0.3, 0.5, 0.7, 0.9)  # shares that are tried when `evidence_left` is learnt
RISE = 0.05  # of the validation loss, that a share may cost
ROUNDED = 2**16  # what rounding may add to a sum in fixed point: 6e-8 of the evidence
SAMPLED = 256  # instances of a bag that the prototypes are made of, fewer where all together are more than:
ROWS = 100_000


def remove(
    score: Tensor, evidence: Tensor, left: float | Tensor, few: float, kind: Tensor | None, kinds: int
) -> Removed:
    """Which instances the rule takes, hardest first.

    score: (N,), by which they are ranked. evidence: (N,) >= 0. left: `evidence_left`, also as a scalar tensor. kind:
    int64 (N,) in [0, kinds), or None for one kind. At most MOST of the bag go, and one always stays.
    """
    n = len(score)
    flags = torch.zeros(n, dtype=torch.bool, device=score.device)
    most = min(int(MOST * n), n - 1)
    if most < 1:
        return Removed(flags, 0, 0)
    e = evidence.double()
    e = e / e.sum().clamp_min(torch.finfo(torch.float64).tiny)
    order = score.topk(most).indices  # what lies behind is never taken
    may = 1.0 - torch.as_tensor(left, dtype=torch.float64, device=score.device)
    fixed = (e[order] * FIXED_POINT).round().to(torch.int64)  # added up as integers: exact on every device
    if kind is None:
        goes = fixed.cumsum(0) <= _allowed(e.sum(), e.square().sum(), may, few)
    else:
        own, squares = (e.new_zeros(kinds).index_add_(0, kind, v) for v in (e, e.square()))
        of = kind[order]
        each = torch.zeros(most, kinds, dtype=torch.int64, device=score.device).scatter_(1, of[:, None], fixed[:, None])
        within = each.cumsum(0).gather(1, of[:, None])[:, 0] <= _allowed(own, squares, may, few)[of]
        goes = within & ((fixed * within).cumsum(0) <= (may * FIXED_POINT).floor().to(torch.int64) + ROUNDED)
    # what argues for nothing is no evidence, and stays: thinning out is the random mask's
    goes = goes & (fixed > 0)
    if numbers_known(score.device):
        taken = order[goes]
        flags.index_fill_(0, taken, True)
        return Removed(flags, len(taken), len(taken))
    flags[order] = goes
    return Removed(flags, 0, most)


def _allowed(total: Tensor, squares: Tensor, may: Tensor, few: float) -> Tensor:
    """Evidence that may go, in fixed point, of kinds with sums of evidence `total` and of its squares `squares`."""
    worth = total.square() / squares.clamp_min(torch.finfo(torch.float64).tiny)
    share = torch.minimum(may, 1.0 - few / worth.clamp_min(1e-9)).clamp_min(0.0)
    return torch.where(share > 0, (share * total * FIXED_POINT).floor() + ROUNDED, 0.0).to(torch.int64)


def learnt(rises: Tensor) -> float:
    """`evidence_left` from the rises (V, len(LEFT)) of the plain model's loss on V masked validation bags.

    The smallest share of LEFT is taken at which the mean rise plus its standard error is at most RISE. Where there is
    none, or fewer than two bags tell, nothing is masked: 1."""
    if len(rises) < 2:
        return 1.0
    worst = rises.mean(0) + rises.std(0) / len(rises) ** 0.5
    return next((left for left, rise in zip(LEFT, worst.tolist(), strict=True) if rise <= RISE), 1.0)


def prototypes(bags: Iterable[Tensor], kinds: int) -> Tensor:
    """float32 (kinds, D): centres of the features (N, D) of the training part's bags by k-means with a fixed seed.

    Of a bag SAMPLED instances, evenly apart, take part, so that a large bag has no larger say; of many bags fewer each,
    halved until all are at most ROWS (one of each, if there are more bags). With fewer different instances than kinds
    some centres are there twice, and the second never has an instance."""
    from sklearn.cluster import KMeans

    rows: list[Tensor] = []
    each, held = SAMPLED, 0
    for x in bags:
        rows.append(_evenly(x, each).cpu())
        held += len(rows[-1])
        while held > ROWS and each > 1:
            each //= 2
            rows = [_evenly(r, each) for r in rows]
            held = sum(len(r) for r in rows)
    together = torch.cat(rows).double()
    k = min(kinds, len(torch.unique(together, dim=0)))
    # one start, chosen by k-means++: of ten the best would cost minutes on thousands of bags
    found = torch.from_numpy(KMeans(k, n_init=1, random_state=0).fit(together.numpy()).cluster_centers_)
    return found[torch.arange(kinds) % k].float()


def _evenly(x: Tensor, most: int) -> Tensor:
    """At most so many rows of x, evenly apart: a copy, so that x itself is not held."""
    return x[:: max(1, len(x) // most)][:most].clone()


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """int64 (N,): the centre (K, D) that each of x (N, D) lies nearest to, the first of equals; in float32 also where
    a training is in half precision, so that maps show the kinds that were masked."""
    with torch.autocast(x.device.type, enabled=False):
        y = x.to(centres.dtype)
        return (centres.square().sum(1) - 2.0 * (y @ centres.T)).argmin(1)
