"""Parity with the published program: its recorded numbers come out of our models, in float64 to a relative 1e-7.

The recorded weights are drawn again from their seeds and read by `mil.reference`. Skipped when the numbers are not
beside the project.
"""

import json

import numpy as np
import pytest
import torch

from mil import masking, tasks
from mil.models import Bag, Instances
from mil.models._nystrom import Nystrom, apply_pinv
from mil.models._ppeg import Ppeg
from mil.reference import NotReference, load_reference
from tests.mil.shared import GOLDEN, needs_golden

pytestmark = needs_golden
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
        self.facts = json.loads((GOLDEN / "index.json").read_text())[name]
        self.student = STUDENTS[self.facts["baseline"]]
        self.arrays = dict(np.load(GOLDEN / f"{name}.npz"))
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
            update={"mask_ratio_h": 0.05, "merge_dropout": 0.0, "teacher_mode": "eval"})
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
    np.testing.assert_array_equal(case.x.numpy(), case.arrays["x"][0])
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
    task = tasks.Task("classification", classes=("no", "yes"))
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
    from mil.reference import _NAMES, _RECYCLE

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
    task = tasks.Task("classification", classes=("no", "yes"))
    close(student.encode(Instances(student.embed(case.x))).logits, case["pure_logits"])
    loss = sum(student.losses(case.bag(), torch.tensor([case.label]), task).values())
    close(loss, case["pure_ce"])
    loss.backward()
    check_gradients(case, case.facts["grad_pure_f64"], heads=False)


# -- single layers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers():
    return dict(np.load(GOLDEN / "layers.npz")), json.loads((GOLDEN / "layers.json").read_text())


@pytest.mark.parametrize("n", [5, 200, 256, 257, 301, 600])
def test_nystrom(layers, n):
    arrays, facts = layers
    rng = np.random.default_rng(50000 + n)
    w = draw(rng, facts["nystrom_keys"])
    x = torch.from_numpy(rng.standard_normal((1, n, 512)).astype(np.float32)).double()[0]
    layer = Nystrom(512, 8, 256, 0.0).double()
    layer.load_state_dict({
        "to_qkv.weight": w["to_qkv.weight"], "to_out.weight": w["to_out.0.weight"], "to_out.bias": w["to_out.0.bias"],
        "conv": w["res_conv.weight"].reshape(8, 33)})
    found = layer(x, detail=True)
    close(found.rows[:4], arrays[f"nystrom_n{n}_out_head"])
    close(found.rows[-4:], arrays[f"nystrom_n{n}_out_tail"])
    close(torch.stack([found.rows.sum(), found.rows.abs().sum()]), arrays[f"nystrom_n{n}_out_sums"])
    close(found.attention[:, 1:], arrays[f"nystrom_n{n}_attn"])
    close(found.values[1:].sum(), arrays[f"nystrom_n{n}_v_sum"])
    close(layer(x, first_only=True).rows, found.rows[:1].detach())


@pytest.mark.parametrize("n", [2, 5, 10, 30, 48, 49, 50, 300])
def test_ppeg(layers, n):
    arrays, facts = layers
    rng = np.random.default_rng(60000 + n)
    w = draw(rng, facts["ppeg_keys"])
    x = torch.from_numpy(rng.standard_normal((1, n, 512)).astype(np.float32)).double()[0]
    layer = Ppeg(512).double()
    ours = {"proj": "conv7", "proj1": "conv5", "proj2": "conv3"}
    layer.load_state_dict({f"{ours[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in w.items()})
    y = layer(x)
    close(y[:2], arrays[f"ppeg_n{n}_out_head"])
    close(y[-2:], arrays[f"ppeg_n{n}_out_tail"])
    close(torch.stack([y.sum(), y.abs().sum()]), arrays[f"ppeg_n{n}_out_sums"])


def test_pseudo_inverse(layers):
    arrays, _ = layers
    a = torch.from_numpy(arrays["pinv_in"]).double()
    z = apply_pinv(a, torch.eye(a.shape[-1], dtype=torch.float64).expand_as(a))[0]
    if arrays["pinv_in"].dtype == np.float64:
        close(z, arrays["pinv_out"])
    else:
        torch.testing.assert_close(z, torch.from_numpy(arrays["pinv_out"]).double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [7, 100, 1000, 1001])
@pytest.mark.parametrize("ratio", [0.01, 0.03, 0.05])
def test_mask(layers, n, ratio):
    arrays, facts = layers
    scores = torch.from_numpy(arrays[f"mask_scores_n{n}"]).squeeze()
    removed = masking.remove(scores, scores, ratio)
    dropped = removed.flags.nonzero()[:, 0].numpy()
    np.testing.assert_array_equal(dropped, np.sort(arrays[f"mask_drop_n{n}_r{ratio}"]))
    assert n - len(dropped) == facts[f"mask_len_keep_n{n}_r{ratio}"]


@pytest.mark.parametrize("n", [7, 100, 1000, 1001])
def test_random_share_of_a_larger_top_set(layers, n):
    arrays, facts = layers
    scores = torch.from_numpy(arrays[f"mask_scores_n{n}"]).squeeze()
    noise = torch.from_numpy(np.random.default_rng(0).random((2, n)))
    removed = masking.remove(scores, scores, 0.05, random_share=0.5, noise=noise)
    assert masking.pool(n, 0.05, 0.5) == facts[f"mask_hr0.5_r0.05_n{n}_pool"]
    assert int(removed.flags.sum()) == facts[f"mask_hr0.5_r0.05_n{n}_dropped"]
    top = set(scores.topk(facts[f"mask_hr0.5_r0.05_n{n}_pool"]).indices.tolist())
    assert set(removed.flags.nonzero()[:, 0].tolist()) <= top


def test_consistency_loss(layers):
    arrays, _ = layers
    s, t = torch.from_numpy(arrays["cl_student"]).double(), torch.from_numpy(arrays["cl_teacher"]).double()
    model = Recorded("attn_c2_a").model
    for temperature, key in ((0.1, "cl_loss_t0.1"), (1.0, "cl_loss_t1")):
        model.params = model.params.model_copy(update={"temp_teacher": temperature})
        torch.testing.assert_close(model.embedding_consistency(t, s).item(), float(arrays[key]), rtol=1e-6, atol=0)
    model.params = model.params.model_copy(update={"temp_teacher": 0.1})
    each = torch.stack([model.embedding_consistency(t[k : k + 1], s[k : k + 1]) for k in range(3)])
    np.testing.assert_allclose(each.numpy(), arrays["cl_loss_t0.1_persample"], rtol=1e-6)


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schedules():
    return dict(np.load(GOLDEN / "schedules.npz"))


def test_cosines_and_momentum(schedules):
    ratio = [masking.cosine(0.03, 0.0, i / 12) for i in range(12)]
    np.testing.assert_allclose(ratio, schedules["cosine_mask_0.03_to_0_e3_it4"], rtol=RTOL, atol=1e-12)
    momentum = [masking.cosine(0.9997, 1.0, i / 12) for i in range(12)]
    np.testing.assert_allclose(momentum, schedules["cosine_mm_0.9997_to_1_e3_it4"], rtol=RTOL)


def test_the_teacher_follows_as_published(schedules):
    case = Recorded("attn_c2_a")
    teacher, student = case.model.teacher.classifier.bias, case.model.student.classifier.bias
    for k in range(0, 6, 2):
        with torch.no_grad():
            teacher.copy_(torch.from_numpy(schedules["ema_teacher_before"][k : k + 2]))
            student.copy_(torch.from_numpy(schedules["ema_student"][k : k + 2]))
        case.model.after_step()
        after = schedules["ema_teacher_after_mm0.9997"]
        np.testing.assert_allclose(teacher.numpy(), after[k : k + 2], rtol=RTOL if after.dtype == np.float64 else 1e-6)


def test_adam(schedules):
    """torch's Adam at the published settings, two steps with the same gradient. (Both recorded arrays hold the state
    after the second step: they shared one memory.)"""
    p = torch.nn.Parameter(torch.from_numpy(schedules["adam_p0"]).double())
    optimizer = torch.optim.Adam([p], lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-5)
    for _ in range(2):
        p.grad = torch.from_numpy(schedules["adam_g"]).double()
        optimizer.step()
    for key in ("adam_p1", "adam_p2_same_grad"):
        np.testing.assert_allclose(p.detach().numpy(), schedules[key], rtol=RTOL)


def test_learning_rates(schedules):
    from configs.schema import TrainConfig
    from mil.train import learning_rate

    for epochs, warmup, key in ((200, 0, "lr_200"), (40, 0, "lr_40"), (40, 5, "lr_40_warm5")):
        config = TrainConfig(epochs=epochs, warmup_epochs=warmup, lr=2e-4)
        ours = [learning_rate(config, e) for e in range(epochs)]
        np.testing.assert_allclose(ours, schedules[key], rtol=RTOL, err_msg=key)


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
