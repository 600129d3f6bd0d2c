"""A gigapixel slide's bag of 200,000 instances is scored and trained on, by every model, in a bounded memory."""

import resource
import sys

import pytest
import torch

from mhim.configs import lookup
from mhim.mil import tasks
from mhim.mil.models import Bag

N, DIM, WIDTH = 200_000, 4, 16
# Exact attention takes time with the square of N (memory does not): part of the bag keeps the test short.
SIZE = {"transformer": N // 20, "abmilx": N // 40, "rrt": N // 4, "wikg": N // 20}
SMALL = {"width": WIDTH, "attention_width": 8, "query_width": 8, "heads": 2, "landmarks": 16}
CASES = [(n, "") for n in lookup.names("mhim.mil.models") if n != "mhim"]
CASES += [("mhim", s) for s in ("abmil", "dsmil", "transmil")]


def megabytes():
    """Most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize(("name", "student"), CASES, ids=[f"{n}-{s}".strip("-") for n, s in CASES])
def test_scoring_and_a_step(name, student):
    module = lookup.find("mhim.mil.models", student or name)
    raw = {k: v for k, v in SMALL.items() if k in module.Params.model_fields}
    if student:
        module = lookup.find("mhim.mil.models", name)
        raw = {"student": student, "student_params": raw}
    n = SIZE.get(name, N)
    torch.manual_seed(0)
    model = module.build(DIM, 2, lookup.params(module, raw))
    side = 450
    coords = 256.0 * torch.stack([torch.arange(n) % side, torch.arange(n) // side], dim=1)
    x, mask = torch.randn(1, n, DIM), torch.ones(1, n, dtype=torch.bool)
    bag = Bag(x, mask, coords[None], torch.tensor([256.0]), 0.5, (n,))
    before = megabytes()
    model.eval()
    with torch.inference_mode():
        out = model(bag)
    assert torch.isfinite(out.logits).all()
    assert torch.isfinite(out.scores).all()
    assert out.scores.shape == (1, n)
    model.train()
    model.set_progress(0.1)
    loss = sum(model.losses(bag, torch.tensor([1]), tasks.Classification(classes=("no", "yes"))).values())
    loss.backward()
    model.after_step()
    assert torch.isfinite(loss)
    # A matrix of N x N numbers would be 160 GB, one of N x 1024 attention logits 800 MB per head.
    assert megabytes() - before < 3000
