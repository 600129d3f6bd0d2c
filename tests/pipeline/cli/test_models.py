"""What the command line tells before anything runs: models and their cost, allowed values, what a verb takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mhim.configs import lookup
from mhim.pipeline.store import layout
from mhim.pipeline.training import model_list
from tests.pipeline.bags import make_features, sets, write_labels

Cli = Callable[..., tuple[int, str]]


def test_cost_is_counted_as_by_hand() -> None:
    """Mean: an embedding and a classifier. ABMIL: attention, too, and the evidence of each tile."""
    mean = model_list.cost("mean", 16, {"width": 8})
    assert mean.weights == 16 * 8 + 8 + 8 * 2 + 2
    abmil = model_list.cost("abmil", 16, {"width": 8, "attention_width": 4})
    assert abmil.weights == 16 * 8 + 8 + 8 * 4 + 4 + 8 * 2 + 2
    per_tile = 16 * 8 + 8 * 4 + 4 + 8 + 8 * 2  # embedding, attention, sum, evidence
    assert abmil.multiply_adds == 1000 * per_tile + 8 * 2


def test_every_model_is_listed_with_its_paper_and_its_settings(cli: Cli) -> None:
    code, text = cli("models", "--dim", 32)
    assert code == 0
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert set(lookup.names("mhim.mil.models")) <= rows.keys()
    assert "arXiv 1802.04712" in rows["abmil"]
    assert not [name for name in lookup.names("mhim.mil.models") if rows[name].split()[1] == "-"]
    code, text = cli("models", "lse")
    assert code == 0
    assert "place = instance: what is pooled: logits, or embeddings [instance | embedding]" in text
    assert cli("models", "nosuch")[0] == 2


def test_config_tells_what_each_setting_may_be(cli: Cli) -> None:
    code, text = cli("config")
    assert code == 0
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["heatmap_scale"].endswith("[percentile | raw]")
    assert lines["tile_px"].endswith("[16 to 4096]")
    assert lines["gpu"].endswith("[true | false]")
    assert "| transmil" in lines["model"]


def test_train_and_score_say_what_they_take_and_why(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 10))
    make_features(work, 2, encoder="other")
    small = sets("train.folds=2", "train.epochs=1", 'train.model_params={"width": 8}', "score.bootstrap=0")
    command = ("train", "--work", work.root, "--labels", labels, "--model", "abmil", *small, "--workers", 1)
    text = " ".join(cli(*command)[1].split())
    assert f"features {work.features('texture')} (the default encoder; --encoder takes others: other)" in text
    assert f"labels {labels}" in text
    text = cli("score", "--work", work.root, "--set", "score.heatmaps=none")[1]
    assert f"run {work.run('abmil')} (the only one)" in text
    text = cli(*command, "--name", "two", "--encoder", "texture")[1]
    assert "(the settings or --encoder say so;" in text
    text = cli("score", "--work", work.root, "--name", "two", "--set", "score.heatmaps=none")[1]
    assert f"run {work.run('two')} (as --name two says)" in text
