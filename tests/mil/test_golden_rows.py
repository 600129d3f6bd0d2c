"""Newer models against recorded numbers: logits, attention, loss terms and gradients in float64, to 1e-9."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from mhim.mil import tasks
from mhim.mil.models import MIL, Bag
from mhim.mil.reference import NotReference, load_reference
from mhim.mil.reference_heads import ROWS
from tests.mil.recorded import HEADS, arrays

INDEX = json.loads((HEADS / "index.json").read_text())
RTOL = 1e-9
# case -> row, and what no weight tells of it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lse_c2_r1": ("lse", {"r": 1.0}),
    "lse_c2_r8": ("lse", {"r": 8.0}),
    "lse_c3_r0p25": ("lse", {"r": 0.25}),
    "lse_c2_embed_r4": ("lse", {"r": 4.0, "place": "embedding"}),
    "acmil_gated_c2_a": ("acmil", {}),
    "acmil_gated_c2_b": ("acmil", {"top_k": 0}),
    "acmil_gated_c2_k1": ("acmil", {}),
    "acmil_gated_c2_short": ("acmil", {}),
    "abmilx_c2_a": ("abmilx", {}),
    "abmilx_c2_b": ("abmilx", {"activation": "gelu"}),
    "abmilx_c2_noplus": ("abmilx", {}),
}
each = pytest.mark.parametrize("name", CASES)


class Case:
    """One recorded case: weights and instances drawn again from its seed, its numbers, and the model they fill."""

    def __init__(self, name: str) -> None:
        told, (row, options) = INDEX[name], CASES[name]
        self.told, self.stored = told, arrays(HEADS, name)
        rng = np.random.default_rng(told["seed"])
        self.state = {
            key: torch.from_numpy((offset + scale * rng.standard_normal(shape)).astype(np.float32)).double()
            for key, shape, scale, offset in told["keys"]
        }
        x = rng.standard_normal((1, told["instances"], told["in_dim"])).astype(np.float32)
        self.x, self.label = torch.from_numpy(x).double(), int(self.stored["label"])
        self.row, self.options = row, options
        self.model = load_reference(self.state, row, told["classes"], told["in_dim"], **options)
        for part in (self.model, getattr(self.model, "feature", None)):
            if hasattr(part, "dropout"):
                part.dropout = 0.0  # type: ignore[union-attr]

    def bag(self, order: np.ndarray[Any, Any] | None = None) -> Bag:
        x = self.x if order is None else self.x[:, torch.from_numpy(order)]
        n = x.shape[1]
        return Bag(x, torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, 2), torch.ones(1), 0.5, (n,))

    def losses(self, model: MIL) -> dict[str, torch.Tensor]:
        classes = tuple("abcd"[: self.told["classes"]])
        return model.losses(self.bag(), torch.tensor([self.label]), tasks.Classification(classes=classes))


def close(found: torch.Tensor, expected: np.ndarray[Any, Any], atol: float = 1e-12) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=RTOL, atol=atol)


@each
def test_the_answer(name: str) -> None:
    case = Case(name)
    out = case.model(case.bag())
    close(out.logits, case.stored["eval_logits"])
    shuffled = case.model(case.bag(np.asarray(case.stored["perm"])))
    close(shuffled.logits, case.stored["eval_logits_perm"])
    found = case.model.encode(case.model.instances(case.bag())[0], detail=True)
    recorded = case.stored["eval_attention"].reshape(-1, case.told["instances"])
    assert found.attention is not None
    assert found.share is not None
    if found.attention.shape == recorded.shape:
        close(found.attention, recorded)
    close(found.share, recorded.mean(0))
    assert found.contribution is not None
    if case.row != "lse":  # what the instances add, and the biases, are the logits
        few = case.bag(np.arange(5))
        part = case.model.encode(case.model.instances(few)[0], detail=True)
        assert part.contribution is not None
        rest = found.logits - found.contribution.sum(0)
        close(part.logits - part.contribution.sum(0), rest.detach().numpy(), 1e-10)  # of any bag the same


@each
def test_the_loss_terms_and_gradients(name: str) -> None:
    case = Case(name)
    before = case.losses(case.model)
    close(sum(before.values(), torch.zeros(())), case.stored["evalterm_total"])
    model = case.model.train()
    if case.row == "acmil":
        if "rand" in case.stored:
            model.draw = lambda rows, k, device: torch.from_numpy(case.stored["rand"])  # type: ignore[assignment]
        named = case.losses(model)
        close(named["task"], case.stored["train_bag_ce"])
        if case.told["branches"] > 1:
            close(named["branches"], case.stored["train_branch_ce"])
            close(named["diversity"], case.stored["train_diversity"])
    else:
        named = case.losses(model)
        close(named["task"], case.stored["train_ce"])
    total = sum(named.values(), torch.zeros(()))
    close(total, case.stored["train_total"])
    total.backward()
    names = ROWS[case.row](case.state).names
    own = dict(model.named_parameters())
    for theirs, recorded in case.told["grad"].items():
        if theirs not in names:
            assert recorded is None or case.told.get("branches") == 1, theirs
            continue
        gradient = own[names[theirs]].grad
        if recorded is None:
            assert gradient is None or not gradient.any(), theirs
            continue
        assert gradient is not None, theirs
        flat = gradient.flatten()
        size = recorded[1]
        np.testing.assert_allclose(flat.sum(), recorded[0], rtol=RTOL, atol=RTOL * size + 1e-15, err_msg=theirs)
        np.testing.assert_allclose([flat.abs().sum(), flat.norm()], recorded[1:], rtol=1e-8, atol=1e-12, err_msg=theirs)
        close(flat[:8], case.stored[f"gradhead__{theirs}"], atol=RTOL * recorded[2] + 1e-12)


def test_what_does_not_fit_is_refused_by_name() -> None:
    case = Case("abmilx_c2_a")
    state = dict(case.state)
    weight = state.pop("proj.bias")
    with pytest.raises(NotReference, match=r"missing proj\.bias"):
        load_reference(state, "abmilx", 2, 64)
    with pytest.raises(NotReference, match=r"unexpected head\.weight"):
        load_reference({**case.state, "head.weight": weight}, "abmilx", 2, 64)
    with pytest.raises(NotReference, match="of abmilx"):
        load_reference({"fc1.weight": weight}, "abmilx", 2, 64)
