"""Parity with the published program: its recorded numbers come out of our models, in float64 to a relative 1e-7.

The recorded weights are drawn again from their seeds and read by `mhim.mil.reference` (tests/golden/README.md).
"""

import numpy as np
import pytest
import torch

from mhim.mil import tasks
from mhim.mil.models import Bag, Instances
from mhim.mil.parts import masking
from mhim.mil.reference import NotReference, load_reference
from tests.mil import recorded

STUDENTS = {"attn": "abmil", "selfattn": "transmil", "dsmil": "dsmil"}
NAMES = [f"{b}_c2_{v}" for b in STUDENTS for v in "ab"]
RTOL = 1e-7
cases = pytest.mark.parametrize("name", NAMES)


def close(ours, theirs, floor=0.0):
    """Equal to a relative 1e-7 of the entry, or of the array's largest where entries cancel to almost nothing."""
    theirs = np.asarray(theirs).squeeze()
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    assert ours.squeeze().shape == theirs.shape
    np.testing.assert_allclose(ours.squeeze(), theirs, rtol=RTOL, atol=max(floor, RTOL * np.abs(theirs).max()))


def draw(rng, shapes, plus_one=()):
    """Weights as they were recorded: normal, 0.05, float32, in the order of the sorted names."""
    return {
        k: torch.from_numpy((rng.standard_normal(shapes[k]) * 0.05 + (k in plus_one)).astype(np.float32)).double()
        for k in sorted(shapes)
    }


class Recorded:
    """One recorded case with its inputs drawn again, and the models made of its weights."""

    def __init__(self, name):
        self.facts = recorded.facts(recorded.PUBLISHED, name)
        self.student = STUDENTS[self.facts["baseline"]]
        self.arrays = recorded.arrays(recorded.PUBLISHED, name)
        rng = np.random.default_rng(self.facts["seed"])
        self.state = draw(rng, *self._shapes())
        self.x = torch.from_numpy(rng.standard_normal((1, 300, 64)).astype(np.float32)).double()[0]
        self.label = int(rng.integers(2))
        self.noise = torch.from_numpy(rng.random(285).astype(np.float32))
        self.perm = torch.from_numpy(rng.permutation(300))
        self.teacher_state = draw(np.random.default_rng(self.facts["teacher_seed"]), *self._shapes())
        self.model = load_reference(self.state, self.student, 2, 64)
        teacher = load_reference(self.teacher_state, self.student, 2, 64).student
        self.model.params = self.model.params.model_copy(
            update={"mask_ratio_h": 0.05, "merge_dropout": 0.0, "teacher_mode": "eval"}
        )
        self.model.start_from(teacher.state_dict())
        for m in self.model.modules():  # the numbers were recorded without dropout
            for attribute in ("dropout", "drop"):
                if isinstance(getattr(m, attribute, None), float):
                    setattr(m, attribute, 0.0)

    def _shapes(self):
        shapes = {k: v for k, v in self.facts["keys"].items() if k != "merge.global_q"}
        return shapes, {k for k in shapes if self.facts["variant"] == "b" and k.endswith("norm.weight")}

    def __getitem__(self, key):
        return self.arrays[f"{key}_f64"]

    def encoded(self, model=None, order=None):
        model = self.model.student if model is None else model
        x = self.x if order is None else self.x[order]
        return model.encode(Instances(model.embed(x)), detail=True)

    def bag(self):
        xy = torch.zeros(1, 300, 2)
        return Bag(self.x[None], torch.ones(1, 300, dtype=torch.bool), xy, torch.ones(1), 0.5, (300,))


_made = {}


@pytest.fixture
def case(name):
    if name not in _made:
        _made[name] = Recorded(name)
    return _made[name]


@cases
def test_inputs_are_the_recorded_ones(case):
    for key, expected in case.facts["weight_check"].items():
        if key in case.state:
            w = case.state[key].flatten()
            np.testing.assert_allclose([w.sum(), w.abs().sum(), w[0], w[-1]], expected, rtol=1e-12)
    for key, expected in case.facts["teacher_weight_check"].items():
        if key in case.teacher_state:
            w = case.teacher_state[key].flatten()
            np.testing.assert_allclose([w.sum(), w[0]], expected, rtol=1e-12)
    assert recorded.sha256(case.x.float().numpy()) == case.facts["x_sha256"]
    assert case.label == case.facts["label"]
    np.testing.assert_array_equal(case.noise.numpy(), case.arrays["noise"])
    np.testing.assert_array_equal(case.perm.numpy(), case.arrays["merge_perm"])


@cases
def test_inference(case):
    found = case.encoded()
    close(case.model.embed(case.x)[:8], case["feature"])
    close(found.logits, case["test_logits"])
    close(found.embedding, case["test_bag_emb"])
    close(found.published_score, case["self_score"])
    close(case.encoded(order=case.perm).logits, case["test_logits_perm"])
    with torch.no_grad():
        close(case.model(case.bag()).logits, case["test_logits"])  # through the whole model, as it is scored


@cases
def test_attention(case):
    found, student = case.encoded(), case.model.student
    z = student.embed(case.x)
    if case.student == "abmil":
        close(found.attention, case["test_attn"])
        close(student.attention_logits(z), case["test_attn_raw"])
    elif case.student == "dsmil":
        c = student.instance(z)
        close(found.attention.T, case["test_attn"])
        close(c, case["test_inst_logits"])
        close(c.amax(0), case["test_logits_max"])
        close(student.bag(found.embedding.flatten()), case["test_logits_bag"])
        close(found.attention.amax(0), case["test_attn_max"])
        close(found.published_score, case["test_inst_score"])
        # before the softmax: its largest over classes
        q = student.query(z)
        raw = q @ q[c.argmax(0)].T / 128**0.5
        theirs = case["test_attn_max_raw"].squeeze()
        assert np.isclose(raw.detach().numpy(), theirs[:, None], rtol=RTOL).any(1).all()
    else:
        close(found.attention, case["test_attn_layer1"])
        x = torch.cat([student.token[None], z])
        x = x + student.layer1(student.norm1(x)).rows
        x = torch.cat([x[:1], student.position(x[1:])])
        close(student.layer2(student.norm2(x), detail=True).attention[:, 1:], case["test_attn_layer2"])


@cases
def test_teacher(case):
    found = case.encoded(case.model.teacher)
    close(found.embedding, case["teacher_emb"])
    close(found.published_score, case["teacher_score"])
    attention = found.attention.amax(0) if case.student == "dsmil" else found.attention
    close(attention, case["teacher_attn"])


@cases
def test_hard_mask(case):
    found = case.encoded(case.model.teacher)
    removed = masking.remove(found.published_score, found.share, 0.05)
    np.testing.assert_array_equal(removed.flags.nonzero()[:, 0].numpy(), case["mask_drop"])
    np.testing.assert_array_equal((~removed.flags).nonzero()[:, 0].numpy(), case["mask_keep"])
    assert bool(case["mask_keep_order_is_sorted"])
    if case.student == "transmil":  # votes tie: whatever is removed has at least the votes of what is not
        assert len(case["mask_drop_by_attn"]) == 15
        by_votes = masking.votes(found.attention, 15)
        counts = case["vote_counts"].squeeze()
        np.testing.assert_array_equal(by_votes.floor().numpy(), counts)
        ours = masking.remove(by_votes, found.share, 0.05).flags.numpy()
        assert ours.sum() == 15
        assert counts[ours].min() >= counts[~ours].max()
    else:
        attention = found.attention.amax(0)
        ours = masking.remove(attention, found.share, 0.05).flags.nonzero()[:, 0]
        np.testing.assert_array_equal(ours.numpy(), case["mask_drop_by_attn"])


@cases
def test_recycling(case):
    recycle = load_reference(case.state, case.student, 2, 64).recycle
    close(recycle.queries, case["merge_q_before"])
    merged = recycle(case.model.student.embed(case.x)[case.perm[240:]])
    close(merged.z, case["merge_z"])
    recycle.move(merged.z, 0.9999)
    close(recycle.queries, case["merge_q_after"])


def training_losses(case, model):
    """The recorded forward: which instances are shuffled where comes from the recorded noise."""
    kept = torch.from_numpy(case["mask_keep"])
    noise = torch.zeros(3, 300)
    noise[2, kept] = case.noise

    model.draw = lambda rows, n, device: noise
    model.train()
    task = tasks.Classification(classes=("no", "yes"))
    captured = []
    inner = model.student.encode
    model.student.encode = lambda i, detail=False: captured.append((len(i.z), inner(i, detail))) or captured[-1][1]
    named = model.losses(case.bag(), torch.tensor([case.label]), task)
    del model.student.encode
    return named, captured[0]


@cases
def test_training_forward_and_gradients(name):
    case = Recorded(name)
    named, (length, found) = training_losses(case, case.model)
    assert [300, length] == case["train_sizes"].tolist()
    close(found.logits, case["train_logits"])
    close(named["task"], case["train_ce"])
    close(named["consistency"], 0.5 * case["train_aux"])
    total = named["task"] + named["consistency"]
    close(total, case["train_total"])
    total.backward()
    case.model.params = case.model.params.model_copy(update={"teacher": "frozen"})
    case.model.after_step()
    close(case.model.recycle.queries, case["train_q_after"])
    check_gradients(case, case.facts["grad_clean_f64"], heads=True)


def theirs_to_ours(case):
    """Their names of the trained weights -> our parameters."""
    from mhim.mil.reference import _NAMES, _RECYCLE

    own = dict(case.model.named_parameters())
    names = {k: f"student.{v}" for k, v in _NAMES[case.student].items()}
    names |= {k: f"recycle.{v}" for k, v in _RECYCLE.items()}
    return {k: own.get(v) for k, v in names.items()}


def check_gradients(case, recorded, heads):
    own = theirs_to_ours(case)
    seen = 0
    for key, expected in recorded.items():
        parameter = own.get(key)
        if expected is None:  # unused there, or the queries, which no gradient moves
            assert parameter is None or parameter.grad is None or key.startswith("merge."), key
            continue
        g = parameter.grad.flatten()
        norm, total = expected
        np.testing.assert_allclose(g.norm().item(), norm, rtol=RTOL, err_msg=key)
        np.testing.assert_allclose(g.sum().item(), total, rtol=RTOL, atol=RTOL * norm * len(g) ** 0.5, err_msg=key)
        if heads:
            head = case.arrays[f"gradhead_f64__{key}"]
            np.testing.assert_allclose(g[:8].numpy(), head, rtol=RTOL, atol=RTOL * norm, err_msg=key)
        seen += 1
    assert seen >= 6


@cases
def test_gradients_in_the_order_of_the_published_program(name):
    """query_update=before_backward moves the queries under the backward pass, as the program does."""
    case = Recorded(name)
    case.model.params = case.model.params.model_copy(update={"query_update": "before_backward"})
    named, _ = training_losses(case, case.model)
    sum(named.values()).backward()
    close(case.model.recycle.queries, case["train_q_after"])
    check_gradients(case, case.facts["grad_f64"], heads=False)


@cases
def test_plain_student_in_training(name):
    case = Recorded(name)
    student = case.model.student.train()
    task = tasks.Classification(classes=("no", "yes"))
    close(student.encode(Instances(student.embed(case.x))).logits, case["pure_logits"])
    loss = sum(student.losses(case.bag(), torch.tensor([case.label]), task).values())
    close(loss, case["pure_ce"])
    loss.backward()
    check_gradients(case, case.facts["grad_pure_f64"], heads=False)


# -- the loader ------------------------------------------------------------------------------------------------------


@cases
def test_bare_student_is_read_without_the_recycle_network(case):
    bare = load_reference({k: v for k, v in case.state.items() if not k.startswith("merge.")}, case.student, 2, 64)
    assert type(bare) is type(case.model.student)
    close(case.encoded(bare).logits, case["test_logits"])


@cases
def test_wrong_weights_are_refused_by_name(case):
    state = dict(case.state)
    weight = state.pop("feature.0.bias")
    with pytest.raises(NotReference, match=r"missing feature\.0\.bias"):
        load_reference(state, case.student, 2, 64)
    with pytest.raises(NotReference, match=r"unexpected head\.weight"):
        load_reference({**case.state, "head.weight": weight}, case.student, 2, 64)
    with pytest.raises(NotReference, match=r"feature.0.weight is \(512, 64\), expected \(512, 65\)"):
        load_reference(case.state, case.student, 2, 65)
    with pytest.raises(NotReference, match="expected"):
        load_reference(case.state, case.student, 3, 64)


def test_an_unknown_student_is_refused():
    with pytest.raises(NotReference, match="there is: abmil, transmil, dsmil"):
        load_reference({}, "resnet", 2, 64)
