"""What the baselines' papers say of them, beyond the contract that all models share."""

import math

import pytest
import torch
import torch.nn.functional as F

from mhim.configs import lookup
from mhim.mil import tasks
from mhim.mil.models import Bag, Instances
from mhim.mil.models.rrt import Attention, cut, layout, whole
from mhim.mil.models.transformer import position

THREE = tasks.Classification(classes=("a", "b", "c"))


def make(name, n_out=3, **raw):
    module = lookup.find("mhim.mil.models", name)
    torch.manual_seed(1)
    model = module.build(7, n_out, module.Params(width=16, **raw)).double()
    with torch.no_grad():  # fresh biases are zero and would hide a forgotten one
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def instances(model, n=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 7, generator=g, dtype=torch.float64)
    return Instances(model.embed(x), torch.randint(0, 9, (n, 2), generator=g).float())


def bag(n=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, 7, generator=g, dtype=torch.float64)
    return Bag(x, torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, 2), torch.ones(1), 0.5, (n,))


@pytest.mark.parametrize("name", ["abmil", "gated_abmil", "mean", "max", "clam_sb", "clam_mb", "dtfd", "rrt"])
def test_the_instances_add_up_to_the_answer(name):
    model = make(name).eval()
    found = model.encode(instances(model), detail=True)
    torch.testing.assert_close(found.contribution.sum(0) + model.classifier.bias, found.logits)


@pytest.mark.parametrize("name", ["abmil", "gated_abmil", "mean", "max", "clam_sb", "clam_mb", "transformer"])
def test_a_counted_instance_is_as_many_equal_ones_and_a_removed_one_none(name):
    model = make(name).eval()
    i = instances(model, 12)
    again = torch.cat([torch.arange(12), torch.tensor([3, 3, 7])])  # 3 three times, 7 twice
    many = model.encode(Instances(i.z[again], i.grid[again]))
    counts = torch.zeros(12).double()
    counts[3], counts[7] = math.log(3), math.log(2)
    torch.testing.assert_close(model.encode(Instances(i.z, i.grid, counts)).logits, many.logits)
    # the corner of the bag stays, since positions count from it
    stays = torch.arange(12) != 5
    grid = i.grid.clone()
    grid[0] = 0
    gone = torch.zeros(12).double().masked_fill(~stays, -torch.inf)
    less = model.encode(Instances(i.z[stays], grid[stays]))
    torch.testing.assert_close(model.encode(Instances(i.z, grid, gone)).logits, less.logits)


def test_max_is_the_largest_instance_logit():
    model = make("max").eval()
    i = instances(model)
    torch.testing.assert_close(model.encode(i).logits, model.classifier(i.z).amax(0))


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
@pytest.mark.parametrize("kind", ["svm", "ce"])
@pytest.mark.parametrize("exclusive", [True, False])
def test_clam_labels_the_ends_of_the_attention(name, kind, exclusive):
    """The instance loss, one class and one instance at a time."""
    model = make(name, clusters=4, instance_loss=kind, exclusive=exclusive).eval()
    i, y, k = instances(model), 1, 4
    s = model.attention_logits(i.z)
    total = []
    for c in range(3):
        order = s[c if name == "clam_mb" else 0].argsort(descending=True)
        w, b = model.clusterer.weight[2 * c : 2 * c + 2], model.clusterer.bias[2 * c : 2 * c + 2]
        chosen = [(n, int(c == y)) for n in order[:k]] + ([(n, 0) for n in order[-k:]] if c == y else [])
        if c != y and not exclusive:
            continue
        each = []
        for n, label in chosen:
            said = w @ i.z[n] + b
            margin = torch.tensor([float(j != label) for j in range(2)]) if kind == "svm" else torch.zeros(2)
            each.append(torch.logsumexp(said + margin, 0) - said[label])
        total.append(torch.stack(each).mean())
    expected = torch.stack(total).mean()
    torch.testing.assert_close(model._instance_loss(i.z, s, torch.tensor(y)), expected)
    named = model.losses(bag(), torch.tensor([y]), THREE)
    torch.testing.assert_close(named["instance"], 0.3 * expected)
    torch.testing.assert_close(named["task"], 0.7 * F.cross_entropy(model(bag()).logits, torch.tensor([y])))


def test_clam_without_classes_or_with_one_instance_trains_on_the_bag():
    model = make("clam_sb", n_out=4)
    survival = tasks.Nll(edges=(1.0, 2.0, 3.0))
    assert set(model.losses(bag(), torch.tensor([[1.5, 1.0]]).double(), survival)) == {"task"}
    assert float(model.losses(bag(1), torch.tensor([2]), THREE)["instance"]) == 0.0


@pytest.mark.parametrize("n", [1, 3, 4, 5, 30])
def test_dtfd_deals_every_instance_once(n):
    model = make("dtfd", groups=4)
    for training in (True, False):
        where, real = model.train(training)._deal(torch.randn(n))
        assert sorted(where[real].tolist()) == list(range(n))
        assert len(where) == min(4, n)
        assert real.any(1).all()
    sizes = real.sum(1)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("distill", "rows"), [("maxs", 1), ("maxmins", 2)])
def test_dtfd_distils_the_instances_that_speak_most_and_least(distill, rows):
    model = make("dtfd", distill=distill, groups=1).eval()
    i = instances(model)
    a = torch.softmax(model.tier1(i.z), 0)
    p = torch.softmax(a[:, None] * (i.z @ model.classifier1.weight.T), 1)[:, -1]
    picks = torch.stack([p.argmax(), p.argmin()])[:rows]
    b = torch.softmax(model.tier2(i.z[picks]), 0)
    torch.testing.assert_close(model.encode(i).logits, model.classifier(b @ i.z[picks]))


def test_dtfd_trains_the_pseudo_bags_with_the_bags_label():
    model = make("dtfd", groups=1).eval()
    i = instances(model)
    a = torch.softmax(model.tier1(i.z), 0)
    expected = F.cross_entropy(model.classifier1(a @ i.z)[None], torch.tensor([2]))
    torch.testing.assert_close(model.losses(bag(), torch.tensor([2]), THREE)["tier1"], expected)


def test_rrt_attention_equals_the_convolved_matrix():
    """The positional code as the paper writes it, on the matrix of logits."""
    torch.manual_seed(0)
    layer, t, real = Attention(32, 4, 15).double(), torch.randn(3, 40, 32).double(), torch.rand(3, 40) > 0.2
    q, k, v = layer.qkv(t).view(3, 40, 3, 4, 8).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT / math.sqrt(8)
    logits = logits + F.conv2d(logits, layer.code[:, None, :, None], padding=(7, 0), groups=4)
    a = torch.softmax(logits.masked_fill(~real[:, None, None], -torch.inf), -1)
    torch.testing.assert_close(layer(t, real), layer.out((a @ v).transpose(1, 2).reshape(3, 40, 32)))


@pytest.mark.parametrize("n", [1, 2, 16, 17, 63, 64, 65, 1000, 4097])
def test_rrt_cuts_and_joins_without_loss(n):
    regions, side = layout(n, 8)
    t = torch.arange(n, dtype=torch.float32)[:, None] + 1
    parts = cut(t, regions, side)
    assert parts.shape == (regions**2, side**2, 1)
    assert torch.equal(whole(parts, regions, side, n), t)
    assert regions <= 8
    edge = parts[0, :, 0].view(side, side)  # the first region is a square of neighbours, row below row
    below = edge[1:] - edge[:-1]
    assert (below[edge[1:] > 0] == regions * side).all()


def test_transformer_places_tiles_and_forgets_where_the_slide_lies():
    model = make("transformer", heads=2).eval()
    i = instances(model)
    here = model.encode(i).logits
    torch.testing.assert_close(model.encode(Instances(i.z, i.grid + 1000)).logits, here)
    order = torch.randperm(30)
    torch.testing.assert_close(model.encode(Instances(i.z[order], i.grid[order])).logits, here)
    moved = i.grid.clone()
    moved[4] += torch.tensor([3.0, 0.0])
    assert not torch.allclose(model.encode(Instances(i.z, moved)).logits, here, atol=1e-6)
    code = position(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 16, 512.0)
    assert code.shape == (3, 16)
    assert not torch.equal(code[1], code[2])
    assert code.abs().max() <= 1


def test_transformer_share_is_the_class_tokens_attention():
    model = make("transformer", heads=2, layers=1).eval()
    i = instances(model)
    t = torch.cat([model.token, i.z + position(i.grid, 16, 512.0).double()])
    layer = model.layers[0]
    n = layer.norm1(t)
    q = layer.query(n)[0].view(2, 8)
    k = layer.key_value(n)[:, :16].view(31, 2, 8)
    a = torch.softmax(torch.einsum("hd,nhd->hn", q, k) / math.sqrt(8), 1)[:, 1:].mean(0)
    torch.testing.assert_close(model.encode(i, detail=True).share, a / a.sum())
