"""Nystrom attention: the applied pseudo-inverse and its gradient, blocks of keys, counted and removed instances."""

import pytest
import torch

from mil.models import _nystrom
from mil.models._nystrom import Nystrom, Ppeg, apply_pinv


def softmax_rows(heads=2, m=6, seed=0):
    torch.manual_seed(seed)
    return torch.softmax(3 * torch.randn(heads, m, m, dtype=torch.float64), -1)


def iterated(a, steps=6):
    """The published iteration as it is written."""
    z = a.mT / (a.sum(-1).amax() * a.sum(-2).amax())
    eye = torch.eye(a.shape[1], dtype=a.dtype)
    for _ in range(steps):
        x = a @ z
        z = 0.25 * z @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x)))
    return z


@pytest.mark.parametrize("left", [False, True])
def test_the_applied_pseudo_inverse_is_the_iterated_one(left):
    a, r = softmax_rows(), torch.randn(2, 6, 3, dtype=torch.float64)
    want = iterated(a).mT @ r if left else iterated(a) @ r
    torch.testing.assert_close(apply_pinv(a, r, left=left), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("left", [False, True])
def test_its_gradient_is_that_of_the_iteration(left):
    a, r = softmax_rows().requires_grad_(), torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 6, 3, dtype=torch.float64)
    ours = torch.autograd.grad((apply_pinv(a, r, left=left) * weight).sum(), (a, r))
    z = iterated(a)
    theirs = torch.autograd.grad(((z.mT if left else z) @ r * weight).sum(), (a, r))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def layer():
    torch.manual_seed(1)
    return Nystrom(16, 2, 8, 0.0).double()


def test_blocks_of_keys_change_nothing(monkeypatch):
    net, x = layer(), torch.randn(45, 16, dtype=torch.float64)
    with torch.no_grad():
        whole = net(x, detail=True)
        monkeypatch.setattr(_nystrom, "CHUNK", 7)
        parts = net(x, detail=True)
    torch.testing.assert_close(parts.rows, whole.rows)
    torch.testing.assert_close(parts.attention, whole.attention)


@pytest.mark.parametrize("n", [3, 8, 9, 45])
def test_the_first_row_alone_is_the_first_row(n):
    net, x = layer(), torch.randn(n, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x, first_only=True).rows, net(x).rows[:1])


def test_a_removed_row_is_not_read():
    """Whatever a row with log_count -inf holds, the others' attention part stays; only the convolution sees it."""
    net, x = layer(), torch.randn(45, 16, dtype=torch.float64)
    net.conv.data.zero_()
    count = torch.zeros(45, dtype=torch.float64)
    count[[5, 20]] = -torch.inf
    other = x.clone()
    other[[5, 20]] = 9.0
    stay = ~count.isneginf()
    torch.testing.assert_close(net(other, count).rows[stay], net(x, count).rows[stay])
    assert not torch.allclose(net(other).rows[stay], net(x).rows[stay])


def test_one_convolution_is_the_sum_of_three():
    torch.manual_seed(2)
    net, x = Ppeg(4).double(), torch.randn(64, 4, dtype=torch.float64)
    image = x.T.view(1, 4, 8, 8)
    want = image + net.conv7(image) + net.conv5(image) + net.conv3(image)
    torch.testing.assert_close(net(x), want[0].flatten(1).T)
