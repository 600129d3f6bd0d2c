"""Weights in the authors' naming become a run that scores; what does not fit is refused by file and name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mhim.mil.models import Instances
from mhim.mil.reference import load_reference
from mhim.mil.tasks import Regression, Several
from mhim.pipeline.exchange.checkpoints import ImportRefused, import_models, weights_of
from mhim.pipeline.results import estimand, views
from mhim.pipeline.store import layout, reading
from mhim.pipeline.training import bundle

Cli = Callable[..., tuple[int, str]]
DIM, WIDTH = 6, 16


def weights(n_out: int = 2, seed: int = 0, recycle: bool = True) -> dict[str, torch.Tensor]:
    shapes = {
        "feature.0.weight": (WIDTH, DIM),
        "feature.0.bias": (WIDTH,),
        "predictor.weight": (n_out, WIDTH),
        "predictor.bias": (n_out,),
        "online_encoder.attention.attention.0.weight": (8, WIDTH),
        "online_encoder.attention.attention.2.weight": (1, 8),
    }
    if recycle:
        shapes |= {
            "merge.global_q_mm": (1, 3, WIDTH),
            "merge.global_q": (1, 3, WIDTH),
            "merge.norm.weight": (WIDTH,),
            "merge.norm.bias": (WIDTH,),
            "merge.attn.to_q.weight": (512, WIDTH),
            "merge.attn.to_kv.weight": (1024, WIDTH),
            "merge.attn.to_out.0.weight": (WIDTH, 512),
            "merge.attn.to_out.0.bias": (WIDTH,),
        }
    g = torch.Generator().manual_seed(seed)
    return {k: 0.3 * torch.randn(s, generator=g) for k, s in shapes.items()}


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def table(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [f"{i % 2},bag{i}," + ",".join(f"{v:.4f}" for v in rng.normal(size=DIM)) for i in range(6) for _ in range(5)]
    path = folder / "bags.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_two_folds_score_new_bags(cli: Cli, tmp_path: Path) -> None:
    """Table and weights in, predictions out: their mean is what the weights say, computed by hand."""
    work = tmp_path / "work"
    files = [saved(tmp_path / "a.pt", weights(seed=1)), saved(tmp_path / "b.pth", {"model": weights(seed=2)})]
    assert cli("import", table(tmp_path), "--work", work, "--encoder", "mine")[0] == 0
    code, text = cli("import-model", *files, "--encoder", "mine", "--mpp", 0, "--classes", "no, yes", "--work", work)
    assert code == 0, text
    assert "a.pt: mhim with student abmil" in text
    code, text = cli("score", "--name", "imported", "--features", work / "features" / "mine", "--work", work)
    assert code == 0, text
    found = reading.read_array(work / "runs" / "imported" / "new" / "mine" / "scores" / "bag3.zarr", "logits")
    x = torch.tensor(reading.read_array(work / "features" / "mine" / "bag3.zarr", "features"), dtype=torch.float32)
    for row, file in zip(found, files, strict=True):
        model = load_reference(weights_of(file), "abmil", 2, DIM)
        with torch.no_grad():
            np.testing.assert_allclose(row, model.encode(Instances(model.embed(x))).logits.numpy(), rtol=1e-5)


def test_the_bundle_says_where_it_comes_from(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pt", weights(4, recycle=False))
    told = import_models([file], tmp_path / "run", (), ("12", "24", "40"), {"encoder": "uni", "mpp": 0.5}, "relu")
    assert told == ["w.pt: abmil"]
    found = bundle.read(tmp_path / "run" / "fold_0")
    assert found.task.kind == "nll"
    assert found.card.model_params["activation"] == "relu"
    assert found.card.imported is not None
    assert found.card.imported.plain() == {"file": "w.pt", "sha256": layout.sha256(file)}
    assert found.model().training is False
    with pytest.raises(bundle.BundleError, match="encoder: trained on 'uni', given 'other'"):
        found.check({"encoder": "other", "mpp": 0.5, "dim": DIM})
    assert "path" not in found.card.text()


@pytest.mark.parametrize(
    ("state", "classes", "edges", "message"),
    [
        (weights(), ("a", "b", "c"), (), "answers with 2 numbers, but 3 classes are given"),
        (weights(), (), (), "give --classes"),
        (weights(), ("a", "b"), ("1",), "give --classes"),
        (weights(4), (), ("3", "2", "9"), "every edge must be larger"),
        (weights(4), (), ("3", "x", "9"), "--edges: could not convert"),
        ({"layer.weight": torch.zeros(3)}, ("a", "b"), (), "no student of the MHIM-MIL program"),
        ({**weights(), "extra": torch.zeros(3)}, ("a", "b"), (), "unexpected extra"),
        ({k: v for k, v in weights().items() if "norm" not in k}, ("a", "b"), (), r"missing merge\.norm\.weight"),
        ([1, 2], ("a", "b"), (), "holds no table of tensors"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    tmp_path: Path, state: object, classes: tuple[str, ...], edges: tuple[str, ...], message: str
) -> None:
    file = saved(tmp_path / "w.pt", state)
    with pytest.raises(ImportRefused, match=message):
        import_models([file], tmp_path / "runs" / "r", classes, edges, {"encoder": "uni", "mpp": 0.5})
    assert not any(p for p in tmp_path.rglob("*") if p.is_file() and p != file)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(
        ImportRefused, match=r"text\.pt is damaged or truncated, or no file of tensors .* save model\.state_dict\(\)"
    ):
        weights_of(tmp_path / "text.pt")
    with pytest.raises(ImportRefused, match="does not exist"):
        weights_of(tmp_path / "none.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ImportRefused, match="is damaged or not a safetensors file"):
        weights_of(tmp_path / "text.safetensors")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "object.pt")
    with pytest.raises(ImportRefused, match=r"is refused: .* save model\.state_dict\(\)"):
        weights_of(tmp_path / "object.pt")


def test_an_existing_run_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    file = saved(tmp_path / "w.pt", weights())
    with pytest.raises(ImportRefused, match="import under another --name"):
        import_models([file], tmp_path / "run", ("a", "b"), (), {"encoder": "uni", "mpp": 0.5})


TASKS = {
    "ordinal": ("{kind: ordinal, classes: [1, 2, 3], link: cumulative}", 2, "grade"),
    "regression": ("{kind: regression, mean: 20, sd: 12.5}", 1, "ki67"),
    "several": (
        """
        kind: several
        targets:
          er: {kind: classification, classes: [neg, pos]}
          grade: {kind: ordinal, classes: ["1", "2", "3"], link: corn}
          ki67: {kind: regression, mean: 20, sd: 12.5}
          survival: {kind: cox}
        """,
        6,
        "er,grade,ki67",
    ),
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_stated_task_makes_the_outputs_mean_what_they_mean(kind: str, cli: Cli, tmp_path: Path) -> None:
    """Weights and a task in; predictions and metrics of labelled bags out, and the numbers are those of the weights."""
    text, n_out, column = TASKS[kind]
    work, run = tmp_path / "work", tmp_path / "work" / "runs" / "imported"
    (tmp_path / "task.yaml").write_text(text)
    files = [saved(tmp_path / f"{seed}.pt", weights(n_out, seed=seed)) for seed in (1, 2)]
    assert cli("import", table(tmp_path), "--work", work, "--encoder", "mine")[0] == 0
    shared = ["--encoder", "mine", "--mpp", 0, "--work", work]
    code, text = cli("import-model", *files, *shared, "--task", tmp_path / "task.yaml")
    assert code == 0, text
    labels = tmp_path / "labels.csv"
    cells = [f"bag{i},{('neg', 'pos')[i % 2]},{1 + i % 3},{5 * i + 0.5},{i + 1},{i % 3 > 0:d}" for i in range(6)]
    labels.write_text("\n".join(["slide,er,grade,ki67,months,dead", *cells]) + "\n")
    given = ["--labels", labels, "--label-column", column, "--as", "new", "--set", "score.bootstrap=20"]
    given += ["--time-column", "months", "--event-column", "dead"] if kind == "several" else []
    code, text = cli(
        "score", "--name", "imported", "--features", work / "features" / "mine", "--work", work, "--workers", 1, *given
    )
    assert code == 0, text
    task = bundle.read(run / "fold_0").task
    every = views.of(run / "new" / "new")
    assert [v.target for v in every] == (["er", "grade", "ki67", "survival"] if kind == "several" else [""])
    logits = {
        f"bag{i}": torch.tensor(reading.read_array(run / "new" / "new" / "scores" / f"bag{i}.zarr", "logits")).double()
        for i in range(6)
    }
    for view in every:
        one = task.of(view.target) if isinstance(task, Several) else task
        own = task.slices[view.target] if isinstance(task, Several) else slice(None)
        found = estimand.read(view.folder / "predictions.csv")
        assert json.loads((view.folder / "metrics.json").read_text())["patients"] == 6
        for row in found:
            z = logits[row["slide"]][:, own]
            if isinstance(one, Regression):
                assert row["predicted"] == pytest.approx(20 + 12.5 * z[:, 0].mean().item(), rel=1e-5)
            elif one.classes:
                p = one.probabilities(z).mean(0)
                assert [row[f"p_{c}"] for c in one.classes] == pytest.approx(p.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "states no task"),
        ("{kind: guess}", "kind 'guess' is none of classification, ordinal"),
        ("{kind: ordinal, classes: [1, 2]}", "a task of kind ordinal needs link"),
        ("{kind: ordinal, classes: [no, yes], link: corn}", "class False is no name; write words such as yes and no"),
        ("{kind: ordinal, classes: [1, 1], link: corn}", "a name stands twice"),
        ("{kind: regression, mean: 0, sd: 0}", "sd 0 is not above 0"),
        ("{kind: regression, mean: .nan, sd: 1}", "mean nan is no finite number"),
        ("{kind: nll, edges: [3, 2]}", "every edge must be larger"),
        ("{kind: cox, edges: [3]}", "a task of kind cox has no 'edges'"),
        ("{kind: several, targets: {a: {kind: cox}, b: {kind: cox}}}", "target a: `survival` is the name"),
        ("{kind: several, targets: {a: {kind: regression, mean: 0, sd: 1}}}", "two or more names"),
        ("{kind: regression, mean: 0, sd: 1}", "w.pt answers with 2 numbers, but regression takes 1"),
    ],
)
def test_a_task_that_is_not_stated_is_refused(text: str, message: str, cli: Cli, tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pt", weights())
    (tmp_path / "task.yaml").write_text(text)
    given = [file, "--encoder", "uni", "--mpp", 0.5, "--work", tmp_path / "work", "--task", tmp_path / "task.yaml"]
    code, said = cli("import-model", *given)
    assert code == 2, said
    assert message in " ".join(said.split())
    assert not (tmp_path / "work" / "runs" / "imported").exists()
