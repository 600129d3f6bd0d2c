"""Parity with the published program, layer by layer: attention, position, masks, losses, schedules, optimiser."""

import numpy as np
import pytest
import torch

from mhim.mil.parts import masking
from mhim.mil.parts.nystrom import Nystrom, apply_pinv
from mhim.mil.parts.ppeg import Ppeg
from tests.mil import recorded
from tests.mil.test_golden import RTOL, Recorded, close, draw


@pytest.fixture(scope="module")
def layers():
    return recorded.arrays(recorded.PUBLISHED, "layers"), recorded.facts(recorded.PUBLISHED, "layers")


@pytest.mark.parametrize("n", [5, 200, 256, 257, 301, 600])
def test_nystrom(layers, n):
    arrays, facts = layers
    rng = np.random.default_rng(50000 + n)
    w = draw(rng, facts["nystrom_keys"])
    x = torch.from_numpy(rng.standard_normal((1, n, 512)).astype(np.float32)).double()[0]
    layer = Nystrom(512, 8, 256, 0.0).double()
    layer.load_state_dict(
        {
            "to_qkv.weight": w["to_qkv.weight"],
            "to_out.weight": w["to_out.0.weight"],
            "to_out.bias": w["to_out.0.bias"],
            "conv": w["res_conv.weight"].reshape(8, 33),
        }
    )
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
    return recorded.arrays(recorded.PUBLISHED, "schedules")


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
    from mhim.configs.schema import TrainConfig
    from mhim.mil.train import learning_rate

    for epochs, warmup, key in ((200, 0, "lr_200"), (40, 0, "lr_40"), (40, 5, "lr_40_warm5")):
        config = TrainConfig(epochs=epochs, warmup_epochs=warmup, lr=2e-4)
        ours = [learning_rate(config, e) for e in range(epochs)]
        np.testing.assert_allclose(ours, schedules[key], rtol=RTOL, err_msg=key)
