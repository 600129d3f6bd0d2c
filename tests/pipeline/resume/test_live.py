"""What a person sees while items are made: epochs of every training, time left, and causes of failures told once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mhim.mil import train as loop
from mhim.pipeline.resume import causes, console, live
from mhim.pipeline.resume.claims import Claims
from mhim.pipeline.resume.live import Live, Teller
from mhim.pipeline.resume.runlog import events
from mhim.pipeline.store import layout
from tests.pipeline.bags import make_features, sets, tree, write_labels
from tests.pipeline.toys import Toy
from tests.pipeline.toys import run as run_toy
from tests.pipeline.trained import settings, trained

Cli = Callable[..., tuple[int, str]]


def test_history_grows_by_the_epoch_beside_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it goes on from an older checkpoint: rows of epochs that were lost are made again."""
    work = layout.Work(tmp_path / "work")
    rows = make_features(work, 8)
    config = settings(folds=2, epochs=5)
    fit, seen, told = loop.fit, [], []

    def watched(*args: Any) -> Iterator[Any]:
        for n, state in enumerate(fit(*args), start=1):
            found = list((work.run("run") / ".partial").glob("*/*/history.csv"))
            seen.append(found[0].read_text() if found else "")
            told.append(live.read(found[0].with_name(live.NAME)) if found else None)
            yield state
            if n == 3 and len(seen) == 3:
                raise SystemExit(143)

    monkeypatch.setattr(loop, "fit", watched)
    with pytest.raises(SystemExit):
        trained(work, rows, config)
    assert [text.count("\n") for text in seen] == [0, 2, 3], "header and one row per finished epoch"
    assert told[1] is not None
    assert (told[1].unit, told[1].done, told[1].of) == ("epoch", 0, 5), "at most twice a second"
    assert not trained(work, rows, config).failures
    final = (work.run("run") / "fold_0" / "history.csv").read_text()
    assert final.count("\n") == 6
    assert all(final.startswith(text) for text in seen[:5]), "the same bytes as in the end"
    assert len(seen) == 3 + 2 + 5
    assert not (work.run("run") / ".partial").exists()


def test_a_training_tells_losses_best_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mhim.pipeline.training import progress as module

    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    made = module.Progress(tmp_path, settings(epochs=10, accumulate=2).train, 8, "auc")
    made.begin(None)
    row = {"epoch": 0, "lr": 0.1, "bag": 0.5, "loss": 0.5, "val_loss": 0.4, "val_auc": 0.75}
    clock[0] += 6
    made.epoch({"history": [row], "within": None, "best": {"row": row, "epoch": 0}})
    clock[0] += 2
    second = row | {"epoch": 1, "loss": 0.25, "val_auc": 0.5}
    made.epoch({"history": [row, second], "within": None, "best": {"row": row, "epoch": 0}})
    clock[0] += 1
    made.step()
    found = live.under_way(tmp_path, [])
    assert found == {}, "nobody has a claim on it"
    one = live.read(tmp_path / live.NAME)
    assert one is not None
    assert (one.done, one.of, one.part, one.each_s) == (2, 10, 0.25, 4.0)
    assert one.now == {"loss": 0.25, "val_loss": 0.4, "val_auc": 0.5}, "its only loss is told once"
    assert one.told() == (
        "epoch 2/10, loss 0.250, val_loss 0.400, val_auc 0.500, best 0.750 (epoch 1), 4.0 s each, at most 31 s left"
    )
    again = module.Progress(tmp_path, settings(epochs=10).train, 8, "auc")
    again.begin({"history": [row], "within": {"step": 4}, "best": {"row": row, "epoch": 0}})
    one = live.read(tmp_path / live.NAME)
    assert one is not None
    assert (one.done, one.part, one.begun, one.worked) == (1, 0.5, 1.5, 0.0)
    assert (tmp_path / "history.csv").read_text().count("\n") == 2, "the lost epoch's row is gone"


def test_remaining_counts_what_was_done_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    left = live.Remaining(4)
    assert left.seconds({}) is None
    clock[0] = 10.0
    # taken up at epoch 5 of 10: a tenth of an item in 10 s, and 3 + 0.4 items are left
    assert left.seconds({"a": Live("epoch", 6, 10, begun=5)}) == pytest.approx(340.0)
    clock[0] = 50.0
    left.finished("a", worked=True)
    assert left.seconds({}) == pytest.approx(3 * 50 / 0.5)
    left.finished("b", worked=False)  # there already: says nothing of the rate
    assert left.seconds({}) == pytest.approx(2 * 50 / 0.5)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.03, "0.03 s"), (3.24, "3.2 s"), (45, "45 s"), (720, "12 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert live.duration(seconds) == words


def test_trainings_side_by_side_are_seen_from_the_command(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes train, this one prints and logs; the results are those of a silent training."""
    work = layout.Work(tmp_path / "work")
    rows = make_features(work, 10)
    labels = write_labels(tmp_path / "labels.csv", rows)
    given = sets("train.folds=2", "train.epochs=250", "train.patience=0", 'train.model_params={"width": 8}')
    command = ("train", "--work", work.root, "--labels", labels, "--encoder", "texture", "--model", "abmil", *given)
    monkeypatch.setattr(console, "LINE_S", 0.2)
    console.err.file = sys.stderr
    try:
        code, text = cli(*command, "--workers", "2", "--name", "seen")
    finally:
        console.err.file = None  # type: ignore[assignment]
    assert code == 0, text
    both = [line for line in text.splitlines() if re.search(r"fold_0: epoch \d+/250.*; fold_1: epoch \d+/250", line)]
    assert both, text
    assert re.search(r"loss \d\.\d+, val_loss \d\.\d+, val_auc \d\.\d+, best \d\.\d+ \(epoch \d+\)", both[-1])
    assert re.search(r"about .+ left", both[-1])
    (log,) = work.runs.glob("*-train-seen-*.jsonl")
    noted = [event for event in events(log) if event["event"] == "under_way"]
    assert noted
    assert all(event["items"].keys() <= {"fold_0", "fold_1"} for event in noted)
    monkeypatch.setattr(console, "LINE_S", 3600)
    assert cli(*command, "--workers", "1", "--name", "silent")[0] == 0
    results = [{k: v for k, v in tree(work.run(name)).items() if k.startswith("fold_")} for name in ("seen", "silent")]
    assert results[0].keys() == results[1].keys()
    assert results[0] == results[1]


def test_status_tells_how_far_what_is_running_has_come(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    make_features(work, 2, weights_id="imported")
    run = work.run("mine")
    partial = run / ".partial" / "fold_0" / ("f" * 16)
    Teller(partial).tell(Live("epoch", 3, 40, now={"loss": 0.4}, headline="auc", best=(2, 0.8), each_s=30.0))
    line = "train mine: running fold_0: epoch 3/40, loss 0.400, best 0.800 (epoch 2), 30 s each, at most 18 min left"
    with Claims(run / ".claims", 60) as claims:
        claims.take("fold_0")
        assert line in cli("status", "--work", work.root)[1]
    assert "epoch" not in cli("status", "--work", work.root)[1], "killed: its file is left, its claim is not"
    (partial / live.NAME).write_text('{"unit": "epoch", "done": 3, "more": 1}')
    assert live.read(partial / live.NAME) is None


def test_failures_of_one_cause_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures = [
        (f"site/case_{i:02d}.svs", f"case_{i:02d}.svs opens, but its mpp is unknown; say it") for i in range(58)
    ]
    failures += [
        ("a.svs", "a.svs is truncated: 10 bytes are missing"),
        ("b.svs", "/x/b.svs is truncated: 2,5 bytes are missing"),
    ]
    failures += [("c.svs", "no such file")]
    mpp, cut, alone = causes.grouped(failures)
    assert mpp.message == "... opens, but its mpp is unknown; say it"
    assert len(mpp.keys) == 58
    assert mpp.names().endswith("site/case_09.svs and 48 more")
    assert mpp.names(None).count(",") == 57
    assert cut.keys == ["a.svs", "b.svs"]
    assert cut.message == "... is truncated: 10 bytes are missing (with other numbers for others)"
    assert (alone.keys, alone.message) == (["c.svs"], "no such file")


def test_a_stage_names_ten_and_a_file_names_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tuple(f"item_{i:03d}" for i in range(12))
    console.err.file = sys.stderr
    try:
        with console.Progressing("toy") as progress:
            report = run_toy(Toy(tmp_path / "toy", n=13, bad=bad), watch=progress.watch, planned=progress.planned)
        console.finish(report, tmp_path / "all.md")
    finally:
        console.err.file = None  # type: ignore[assignment]
    text = capsys.readouterr().err
    assert len(re.findall(r"failed item_\d+: ValueError", text)) == 1, text
    flat = " ".join(re.sub(r"[│┃]", " ", text).split())
    assert "12 items: item_000, item_001" in flat
    assert "item_009 and 2 more" in flat
    assert "all.md" in text
    assert json.dumps(report.exit_code) == "1"
