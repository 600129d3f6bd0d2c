"""Every file of mil/models keeps the contract: each test runs for each name, so a new file is tested as it lands."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mhim.configs import lookup
from mhim.configs.schema import TrainConfig
from mhim.mil import tasks
from mhim.mil.bags import collate
from mhim.mil.models import Bag

NAMES = lookup.names("mhim.mil.models")
DIM = 12
SMALL = {
    "width": 16,
    "attention_width": 8,
    "heads": 2,
    "landmarks": 8,
    "query_width": 8,
    "region": 2,
    "merge_k": 3,
}
TWO = tasks.Classification(classes=("no", "yes"))
CASES = [(n, {}) for n in NAMES] + [
    ("mhim", {"student": s, "merge": m, **more})
    for s in ("abmil", "dsmil", "transmil")
    for m, more in (
        ("mean", {}),
        ("mca", {"share_max": 1.0, "consistency": "embedding", "teacher": "ema"}),
        ("mca", {"merge_at_test": True}),
    )
    if s in NAMES
]
# every other model with attention, as a student
STUDENTS = ["acmil", "aem", "abmilx", "ilra", "dgrmil", "wikg", "camil", "smabmil", "asmil", "nnmil", "feather"]
STUDENTS += ["lse", "gated_abmil"]
CASES += [("mhim", {"student": s, "merge": m}) for s in STUDENTS for m in ("mca", "mean")]
CASES += [("mhim", {"student": "ibmil", "student_params": {"clusters": 0}})]
CASES += [
    ("acmil", {"form": "heads"}),
    ("aem", {"form": "query"}),
    ("abmilx", {"norm": True, "ffn": True, "joint": True}),
]
CASES += [("smabmil", {"place": "late", "mode": "exact", "learn_alpha": True}), ("camil", {"embed": False})]
IDS = ["-".join([n, *map(str, e.values())]) for n, e in CASES]
every = pytest.mark.parametrize(("name", "extra"), CASES, ids=IDS)


def make(name, extra, n_out=2, seed=0):
    module = lookup.find("mhim.mil.models", name)
    raw = {k: v for k, v in SMALL.items() if k in module.Params.model_fields} | extra
    if name == "mhim":
        student = lookup.find("mhim.mil.models", raw.get("student", "abmil"))
        small = {k: v for k, v in SMALL.items() if k in student.Params.model_fields}
        raw["student_params"] = small | extra.get("student_params", {})
        raw["heads"] = extra.get("heads", "mean")  # of this name, the students have a number
    params = lookup.params(module, raw)
    torch.manual_seed(seed)
    model = module.build(DIM, n_out, params)
    with torch.no_grad():  # fresh biases are zero and would hide a forgotten one
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    if hasattr(module, "baseline"):
        other, other_params = module.baseline(params)
        teacher = lookup.find("mhim.mil.models", other)
        model.start_from(teacher.build(DIM, n_out, lookup.params(teacher, other_params)).state_dict())
    return model


def arrays(n, seed=0):
    rng = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(max(n, 1))))
    coords = 256 * np.stack(np.divmod(np.arange(n), side)[::-1], axis=1)
    return rng.normal(size=(n, DIM)).astype(np.float32), coords.astype(np.int32), 256.0


def bag(*sizes, seed=0):
    return collate([arrays(n, seed + i) for i, n in enumerate(sizes)], 0.5)


def with_mask_only(b: Bag) -> Bag:
    return Bag(b.features, b.mask, b.coords, b.tile_l0, b.mpp)


def target(n, n_out=2):
    return torch.arange(n) % n_out


@every
def test_shapes_and_types(name, extra):
    model, b = make(name, extra, 3).eval(), bag(30, 7)
    out = model(b)
    assert out.logits.shape == (2, 3)
    assert out.logits.dtype == torch.float32
    assert out.scores.shape == (2, 30)
    assert out.embedding.shape[0] == 2
    assert torch.isfinite(out.logits).all()
    assert (out.scores[1, 7:] == 0).all()
    assert (out.scores >= 0).all()
    assert out.scores.sum(1).max() <= 1 + 1e-5
    assert out.scores[1, :7].max() > 0
    if out.evidence is not None:
        assert out.evidence.shape == (2, 30, 3)
        assert (out.evidence[1, 7:] == 0).all()


@every
def test_padding_changes_nothing(name, extra):
    model = make(name, extra).eval()
    alone = [model(bag(n, seed=i)) for i, n in enumerate((40, 3, 17))]
    packed = model(bag(40, 3, 17))
    poisoned = bag(40, 3, 17)
    poisoned.features[~poisoned.mask] = torch.nan
    poisoned.coords[~poisoned.mask] = torch.inf
    for out in (packed, model(with_mask_only(bag(40, 3, 17))), model(poisoned)):
        for i, one in enumerate(alone):
            torch.testing.assert_close(out.logits[i], one.logits[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out.scores[i, : one.scores.shape[1]], one.scores[0], atol=1e-6, rtol=1e-4)


@every
def test_same_input_same_bytes(name, extra):
    model, b = make(name, extra).eval(), bag(33)
    assert torch.equal(model(b).logits, model(b).logits)
    assert torch.equal(model(b).scores, model(b).scores)


@every
def test_order_changes_nothing_unless_declared(name, extra):
    if extra.get("student"):
        uses = getattr(lookup.find("mhim.mil.models", extra["student"]), "USES_POSITION", False)
    else:
        uses = getattr(lookup.find("mhim.mil.models", name), "USES_POSITION", False)
    model, (x, coords, tile) = make(name, extra).eval(), arrays(40)
    order = np.random.default_rng(1).permutation(40)
    whole = model(collate([(x, coords, tile)], 0.5))
    shuffled = model(collate([(x[order], coords, tile)], 0.5))
    same = torch.allclose(whole.logits, shuffled.logits, atol=1e-5)
    assert same != uses
    if not uses:
        torch.testing.assert_close(shuffled.scores[0], whole.scores[0, order], atol=1e-6, rtol=1e-4)


@every
def test_the_empty_bag_is_defined(name, extra):
    model = make(name, extra).eval()
    alone, packed = model(bag(0)), model(bag(9, 0))
    assert torch.isfinite(alone.logits).all()
    assert alone.scores.shape == (1, 0)
    torch.testing.assert_close(packed.logits[1], alone.logits[0])
    assert (packed.scores[1] == 0).all()
    model.train()
    loss = sum(model.losses(bag(9, 0), target(2), TWO).values())
    loss.backward()
    assert torch.isfinite(loss)


@every
@pytest.mark.parametrize("sizes", [(1,), (2,), (5, 1, 70)])
def test_a_step_moves_every_trained_weight_and_no_other(name, extra, sizes):
    model = make(name, extra).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.set_progress(0.3)
    named = model.losses(bag(*sizes), target(len(sizes)), TWO)
    assert all(v.ndim == 0 and torch.isfinite(v) for v in named.values())
    sum(named.values()).backward()
    for key, p in model.named_parameters():
        assert p.grad is None or torch.isfinite(p.grad).all(), key
    optimizer.step()
    model.after_step()
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert moved
    frozen = [k for k in moved if k.startswith("teacher.")]
    assert bool(frozen) == (name == "mhim" and model.params.teacher == "ema")


@every
def test_save_and_load_are_exact_and_a_wrong_key_is_refused(name, extra):
    model, other, b = make(name, extra).eval(), make(name, extra, seed=5).eval(), bag(21)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert not torch.equal(other(b).logits, model(b).logits)
    other.load_state_dict(state)
    assert torch.equal(other(b).logits, model(b).logits)
    state["not_a_key"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="not_a_key"):
        other.load_state_dict(state)


@every
def test_a_setting_that_does_not_exist_is_refused(name, extra):
    with pytest.raises(lookup.LookupFailed, match="no_such_setting: unknown key"):
        lookup.params(lookup.find("mhim.mil.models", name), {"no_such_setting": 1})


@every
def test_training_is_repeatable_and_learns(name, extra):
    """Bags whose instances are shifted along one feature are told apart after a few steps, twice in the same bytes."""

    def data(seed):
        x, coords, tile = arrays(24, seed)
        x[:, 0] += 4.0 * (seed % 2)
        return collate([(x, coords, tile)], 0.5)

    def trained():
        model = make(name, extra).eval()
        with torch.no_grad():
            model.prepare(((data(s), torch.tensor([s % 2])) for s in range(200, 230)), TWO)
        model.train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        torch.manual_seed(3)
        for step in range(80):
            optimizer.zero_grad()
            model.set_progress(step / 80)
            sum(model.losses(data(step), torch.tensor([step % 2]), TWO).values()).backward()
            optimizer.step()
            model.after_step()
        return model.eval()

    one, two = trained(), trained()
    with torch.inference_mode():
        found = torch.cat([one(data(s)).logits for s in range(100, 120)])
        assert torch.equal(one(data(100)).logits, two(data(100)).logits)
    margin = found[:, 1] - found[:, 0]
    assert (margin[1::2, None] > margin[None, 0::2]).float().mean() > 0.9  # the area under the curve


OUTCOMES = {
    "nll": (tasks.Nll((2.5,)), [(3.0, 1.0), (2.0, 1.0), (5.0, 0.0)]),
    "cox": (tasks.Cox(), [(3.0, 1.0), (2.0, 1.0), (5.0, 0.0)]),
    "corn": (tasks.Ordinal(("1", "2", "3")), [0, 2, 1]),
    "cumulative": (tasks.Ordinal(("1", "2", "3"), "cumulative"), [2, 0, 1]),
    "regression": (tasks.Regression(10.0, 5.0), [3.0, 12.0, 30.0]),
    "several": (
        tasks.several({"er": TWO, "grade": tasks.Ordinal(("1", "2", "3")), "ki67": tasks.Regression(10.0, 5.0)}),
        [tasks.Cells((1, None, 7.0)), tasks.Cells((None, 2, None)), tasks.Cells((0, 0, 12.0))],
    ),
}


@every
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_any_outcome_is_trained_on_unknown_to_the_model(name, extra, outcome):
    task, values = OUTCOMES[outcome]
    model = make(name, extra, n_out=task.n_out).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outcome == "several"):
        named = model.losses(bag(12, 30, 5), task.target(values), task)
    sum(v.float() for v in named.values()).backward()
    assert all(torch.isfinite(v) for v in named.values())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(g.abs().max() > 0 for g in grads)
    assert all(torch.isfinite(g).all() for g in grads)


@every
def test_autocast_trains(name, extra):
    model = make(name, extra).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        named = model.losses(bag(40, 13), target(2), TWO)
    sum(v.float() for v in named.values()).backward()
    assert all(torch.isfinite(v) for v in named.values())


PRESETS = sorted(p.name for p in Path(lookup.__file__).parent.glob("mhim*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("student", ["abmil", "dsmil", "transmil"])
def test_every_mhim_preset_takes_a_step_with_every_student(preset, student):
    text = (Path(lookup.__file__).parent / preset).read_text()
    config = TrainConfig(**yaml.safe_load(text)["train"])
    module = lookup.find("mhim.mil.models", "mhim")
    small = {"width": 64, "landmarks": 16} if student == "transmil" else {"width": 64}
    raw = config.model_params | {"student": student}
    raw["student_params"] = raw.get("student_params", {}) | small
    torch.manual_seed(0)
    model = module.build(DIM, 2, lookup.params(module, raw)).train()
    for size in (1, 2, 90):
        named = model.losses(bag(size), target(1), TWO)
        sum(named.values()).backward()
        model.after_step()
        assert all(torch.isfinite(v) for v in named.values())


def test_the_shipped_preset_is_the_default_and_names_no_other_value():
    module = lookup.find("mhim.mil.models", "mhim")
    raw = yaml.safe_load((Path(lookup.__file__).parent / "mhim.yaml").read_text())["train"]["model_params"]
    assert lookup.params(module, raw) == module.forms(module.Params())[-1].params, "the guarded form alone"


def test_mhim_refuses_a_baseline_that_does_not_fit():
    model = make("mhim", {})
    state = model.student.state_dict()
    broken = {k.replace("attend", "attention"): v for k, v in state.items()}
    with pytest.raises(ValueError, match=r"missing attend\.weight; unexpected attention\.weight"):
        model.start_from(broken)
    with pytest.raises(ValueError, match=r"attend\.weight is \(3, 16\), expected \(8, 16\)"):
        model.start_from(state | {"attend.weight": torch.zeros(3, 16)})
