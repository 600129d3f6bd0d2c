"""The methods paragraph tells the run's own records, also of repetitions; a damaged neighbour stops no page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mhim.pipeline.pictures import methods
from mhim.pipeline.results import predictions
from mhim.pipeline.results.metrics_file import Metrics
from mhim.pipeline.store import layout
from mhim.pipeline.training import bundle
from mhim.pipeline.training.card import FormRecord, FusionRecord
from tests.pipeline.bags import make_features, sets, write_labels

Cli = Callable[..., tuple[int, str]]


def test_the_paragraph_is_of_the_records(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 16))
    small = [*sets("train.folds=2", "train.repeats=2", "train.epochs=2", "score.bootstrap=0"), "--workers", 1]
    given = ["--work", work.root, "--model", "abmil", "--labels", labels]
    assert cli("train", *given, *small, *sets('train.model_params={"width": 8}'))[0] == 0
    run = work.run("abmil")
    assert cli("score", "--work", work.root, *small, "--heatmaps", "none")[0] == 0
    (run / "config.yaml").write_text("train: {lr: 5.0, repeats: 9}\n")  # settings of today
    found, cards = Metrics.read(run), [bundle.card_of(f) for f in predictions.folds_of(run)]
    text = methods.paragraph(found, cards)
    assert "2-fold cross-validation over patients, repeated 2 times (" in text
    assert f"at most 2 epochs, learning rate {cards[0].train['lr']:g}," in text
    assert "bootstrap" not in text, "none was drawn"
    share = cards[0].split.val / (cards[0].split.val + cards[0].split.train)
    assert f"{100 * share:.0f} % of the patients not held out served for validation" in text

    other = cards[1].model_copy(update={"train": {**cards[1].train, "lr": 0.5}, "versions": {"torch": "9.9"}})
    text = methods.paragraph(found, [cards[0], other])
    assert "learning rate" not in text, "trainings have several"
    assert f"torch {' and '.join(sorted({cards[0].versions['torch'], '9.9'}))}" in text
    fusion = FusionRecord(kind="late", slide_task=cards[0].task, modalities=["slide", "clinical"])
    text = methods.paragraph(found, [one.model_copy(update={"fusion": fusion}) for one in cards])
    assert "The answers of slide, clinical were combined (late fusion)." in text

    forms = [
        one.model_copy(update={"form": FormRecord(kept=k)})
        for one, k in zip(cards[:2], ("published", "guarded"), strict=True)
    ]
    text = methods.paragraph(found, forms)
    assert "fitted its training patients: guarded in 1, published in 1 of 2 trainings." in text

    damaged = run / "new" / "elsewhere" / "metrics.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"numbers": ')
    code, told = cli("report", "--work", work.root)
    assert code == 1, told  # the rest is there
    page = (run / "report.html").read_text()
    assert "elsewhere/metrics.json is damaged" in page
    assert "its features came without them" in page
