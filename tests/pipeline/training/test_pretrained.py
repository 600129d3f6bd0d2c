"""A start from a user's pretrained weights: names, widths and encoder are checked, the file is in the fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mhim.mil import tasks
from mhim.mil.reference import NotReference
from mhim.pipeline.store import layout
from mhim.pipeline.training import bundle, fold, pretrained
from mhim.pipeline.training.pretrained import PretrainedRefused
from tests.pipeline.bags import WIDTH, make_features
from tests.pipeline.trained import settings, trained


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


PARAMS = {"width": 16, "attention_width": 8, "attention_dropout": 0.0}


def weights(in_dim: int = WIDTH, prefix: str = "model.") -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.0": (16, in_dim)}
    shapes |= {f"global_attn.attention_{x}.0": (8, 16) for x in "ab"} | {"global_attn.attention_c": (1, 8)}
    made = {f"{prefix}{k}.weight": torch.randn(v) for k, v in shapes.items()}
    return made | {f"{prefix}{k}.bias": torch.randn(v[0]) for k, v in shapes.items()}


def config(path: Path, **more: Any) -> Any:
    own = {"model": "feather", "model_params": PARAMS, "epochs": 1, "lr": 1e-9}
    return settings(**own | {"pretrained": str(path), "pretrained_encoder": "texture"} | more)


def built(path: Path, state: dict[str, torch.Tensor], **more: Any) -> Any:
    save_file(state, path)
    train = config(path, **more).train
    model = fold.build_model(train, WIDTH, tasks.Classification(classes=("a", "b")), 1, None)
    return model, pretrained.begin(model, train, {"encoder": "texture"})


def test_the_training_starts_from_the_file_and_says_so(work: layout.Work, tmp_path: Path) -> None:
    path, state = tmp_path / "w.safetensors", weights()
    save_file(state, path)
    rows = make_features(work)
    report = trained(work, rows, config(path))
    assert not report.failures, report.failures
    found = bundle.read(work.run("run") / "fold_0")
    torch.testing.assert_close(
        found.weights["embedding.0.weight"], state["model.patch_embed.0.weight"], atol=1e-5, rtol=1e-5
    )
    told = found.card.pretrained
    assert told is not None
    assert told["encoder"] == "texture"
    assert told["pretrained"] == layout.sha256(path)
    assert len(told["loaded"]) == 8
    save_file({**state, "model.patch_embed.0.bias": torch.zeros(16)}, path)
    with pytest.raises(Exception, match="pretrained"):
        trained(work, rows, config(path))


def test_a_classifier_of_the_same_size_comes_along_and_another_does_not(tmp_path: Path) -> None:
    own = {"classifier.weight": torch.ones(2, 16), "classifier.bias": torch.ones(2)}
    model, told = built(tmp_path / "a.safetensors", weights(prefix="") | own)
    assert "classifier.weight" in told["loaded"]
    assert torch.equal(model.classifier.weight, torch.ones(2, 16))
    assert model.training
    other = {"classifier.weight": torch.ones(5, 16), "classifier.bias": torch.ones(5)}
    model, told = built(tmp_path / "b.safetensors", weights(prefix="") | other)
    assert "classifier.weight" not in told["loaded"]
    assert model.classifier.weight.shape == (2, 16)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    path, state = tmp_path / "w.safetensors", weights()
    with pytest.raises(NotReference, match=r"patch_embed\.0\.weight is \(16, 9\), expected"):
        built(path, weights(in_dim=9))
    with pytest.raises(NotReference, match=r"missing global_attn\.attention_c\.bias"):
        built(path, {k: v for k, v in state.items() if k != "model.global_attn.attention_c.bias"})
    with pytest.raises(NotReference, match=r"unexpected extra"):
        built(path, {**state, "extra": torch.ones(1)})
    with pytest.raises(NotReference, match=r"attention_width 8, the model 12"):
        built(path, state, model_params={**PARAMS, "attention_width": 12})
    with pytest.raises(NotReference, match=r"train\.model=feather"):
        built(path, state, model="abmil", model_params={"width": 16})
    with pytest.raises(PretrainedRefused, match=r"weights are of uni .*features of texture"):
        built(path, state, pretrained_encoder="uni")
    with pytest.raises(PretrainedRefused, match=r"pretrained_encoder is empty"):
        built(path, state, pretrained_encoder="")
    path.write_bytes(b"no weights")
    train = config(path).train
    model = fold.build_model(train, WIDTH, tasks.Classification(classes=("a", "b")), 1, None)
    with pytest.raises(PretrainedRefused, match=r"train\.pretrained: .* is damaged or not a safetensors file"):
        pretrained.begin(model, train, {"encoder": "texture"})


def test_a_refusal_comes_before_any_training(work: layout.Work, tmp_path: Path) -> None:
    path, rows = tmp_path / "w.safetensors", make_features(work)
    save_file(weights(in_dim=9), path)
    with pytest.raises(NotReference, match=r"patch_embed\.0\.weight is \(16, 9\), expected"):
        trained(work, rows, config(path))
    save_file(weights(), path)
    with pytest.raises(PretrainedRefused, match=r"weights are of uni"):
        trained(work, rows, config(path, pretrained_encoder="uni"))
    other = {"student": "abmil", "student_params": {"width": 16}}
    with pytest.raises(NotReference, match=r"train\.model=feather"):
        trained(work, rows, config(path, model="mhim", model_params=other))
    assert not work.runs.exists()


def test_another_file_than_the_planned_one_is_refused(work: layout.Work, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model, told = built(path, weights())
    train = config(path).train
    assert pretrained.begin(model, train, {"encoder": "texture"}, told["pretrained"]) == told
    save_file({**weights(), "model.patch_embed.0.bias": torch.zeros(16)}, path)
    with pytest.raises(PretrainedRefused, match="another file than when this training was planned"):
        pretrained.begin(model, train, {"encoder": "texture"}, told["pretrained"])
