"""Nystrom attention: the applied pseudo-inverse and its gradient, blocks of keys, counted and removed instances."""

import pytest
import torch

from mhim.mil.parts import nystrom
from mhim.mil.parts.nystrom import Nystrom, apply_pinv
from mhim.mil.parts.ppeg import Ppeg


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


def applied(a, r, left):
    return apply_pinv(a, left=r)[1] if left else apply_pinv(a, r)[0]


@pytest.mark.parametrize("left", [False, True])
def test_the_applied_pseudo_inverse_is_the_iterated_one(left):
    a, r = softmax_rows(), torch.randn(2, 6, 3, dtype=torch.float64)
    want = iterated(a).mT @ r if left else iterated(a) @ r
    torch.testing.assert_close(applied(a, r, left), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("left", [False, True])
def test_its_gradient_is_that_of_the_iteration(left):
    a, r = softmax_rows().requires_grad_(), torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 6, 3, dtype=torch.float64)
    ours = torch.autograd.grad((applied(a, r, left) * weight).sum(), (a, r))
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
        monkeypatch.setattr(nystrom, "CHUNK", 7)  # more blocks than are kept
        parts, first = net(x, detail=True), net(x, first_only=True)
    torch.testing.assert_close(parts.rows, whole.rows)
    torch.testing.assert_close(parts.attention, whole.attention)
    torch.testing.assert_close(first.rows, whole.rows[:1])


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


def plain_grid(net, x, places):
    """x (n, E) plus the three convolutions at whole places (n, 2), taken one neighbour at a time."""
    out = []
    for me, (a, b) in zip(x, places, strict=True):
        total = me + sum(c.bias for c in (net.conv7, net.conv5, net.conv3))
        for other, (c, d) in zip(x, places, strict=True):
            for conv in (net.conv7, net.conv5, net.conv3):
                half = conv.kernel_size[0] // 2
                if abs(c - a) <= half and abs(d - b) <= half:
                    total = total + conv.weight[:, 0, d - b + half, c - a + half] * other
        out.append(total)
    return torch.stack(out)


def test_ppeg_on_the_grid_convolves_where_the_tiles_lie():
    """Two pieces far apart, in any order; the cut between them must not bring them together."""
    torch.manual_seed(3)
    net, x = Ppeg(4).double(), torch.randn(24, 4, dtype=torch.float64)
    places = [(i % 5, i // 5) for i in range(12)] + [(1000 + i % 3, 7 + i // 3) for i in range(12)]
    order = torch.randperm(24)
    places = [places[i] for i in order]
    grid = torch.tensor(places, dtype=torch.float32) + 0.2
    torch.testing.assert_close(net.on_grid(x, grid), plain_grid(net, x, places))


def test_what_is_removed_or_shares_a_cell_on_the_grid():
    torch.manual_seed(4)
    net, x = Ppeg(4).double(), torch.randn(10, 4, dtype=torch.float64)
    grid = torch.tensor([(i % 4, i // 4) for i in range(10)], dtype=torch.float32)
    weight = torch.ones(10, dtype=torch.float64)
    weight[[2, 7]] = 0.0
    stay = weight > 0
    torch.testing.assert_close(net.on_grid(x, grid, weight)[stay], net.on_grid(x[stay], grid[stay]))
    twice = net.on_grid(torch.cat([x, x]), torch.cat([grid, grid]))  # equal instances in one cell are one
    torch.testing.assert_close(twice, net.on_grid(x, grid).repeat(2, 1))


def test_transmil_uses_the_grid_if_asked_to():
    from mhim.mil.models import Bag, transmil

    x, mask = torch.randn(1, 30, 6), torch.ones(1, 30, dtype=torch.bool)
    places = torch.stack([torch.arange(30) % 6, torch.arange(30) // 6], 1)[None].float() * 256
    bags = [Bag(x, mask, c, torch.tensor([256.0]), 0.5) for c in (places, places + 2560, 3 * places)]
    for ppeg, same in (("grid", False), ("sequence", True)):
        torch.manual_seed(0)
        net = transmil.build(6, 2, transmil.Params(width=16, landmarks=4, heads=2, ppeg=ppeg)).eval()
        found = [net(bag).logits for bag in bags]
        torch.testing.assert_close(found[0], found[1])  # a shifted slide is the same slide
        assert torch.equal(found[0], found[2]) == same
