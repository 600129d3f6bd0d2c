"""What MHIM's training hides: per instance how hard the teacher finds it, and how often its hard mask takes it.

In: a trained model and a batch of one bag. Out: two values per instance, or nothing for a model without a teacher. They
are those of the teacher as it ended, followed through the schedule of the mask; the teachers of earlier epochs are not
kept. Knows no file and draws nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from mhim.mil.models import MIL, Bag, TaskLike, flatten, grids
from mhim.mil.models.mhim import Mhim
from mhim.mil.parts import masking

STEPS = 20  # points of the schedule that are looked at


def of(model: MIL, bag: Bag, task: TaskLike) -> dict[str, np.ndarray]:
    """What `model` hides of the one bag in `bag`; empty without a teacher or a hard mask.

    hardness: float32 (N,), by which the hard mask ranks. masked: float32 (N,), the share of the training in which it
    takes the instance (where a random part of a larger pool is taken, the chance).
    """
    if not isinstance(model, Mhim) or (model.params.mask == "rate" and model.params.mask_ratio_h <= 0):
        return {}
    p = model.params
    x, sizes = flatten(bag)
    n, done = sizes[0], model.done
    if n < 2:
        return {}
    try:
        model.set_progress(0.0)  # at its end a decaying mask asks the teacher for nothing
        with torch.inference_mode():
            (seen,) = model.assess(x, sizes, grids(bag))
            if seen is None or seen.share is None:
                return {}
            hardness = model.score(seen, n, task).float()
            if p.mask == "evidence":  # the same at every point of the schedule
                taken = model.removed(seen, x, model.score(seen, n, task), task, model.left_now).flags.float()
                return {"hardness": hardness.cpu().numpy(), "masked": taken.cpu().numpy()}
            masked = torch.zeros(n)
            for step in range(STEPS):
                model.set_progress(step / STEPS)
                if model.ratio_high <= 0:
                    continue
                pool = masking.pool(n, model.ratio_high, p.mask_ratio_hr, p.rounding)
                order = masking.hardest(hardness, pool)
                number = masking.count(pool, p.mask_ratio_hr)
                if p.share_max < 1:
                    order = order[: int(masking.within(seen.share, order, p.share_max))]
                if len(order):
                    masked[order.cpu()] += number / pool / STEPS
    finally:
        model.set_progress(done)
    return {"hardness": hardness.cpu().numpy(), "masked": masked.numpy()}
