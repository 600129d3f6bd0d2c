"""What a report says of runs that are not two classes and good folds: survival, three classes, failures, alarms."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mhim.mil import metrics
from mhim.mil.tasks import Cox
from mhim.pipeline.cohort.labels.rows import Row
from mhim.pipeline.pictures import figures, kinds
from mhim.pipeline.results import ensemble, risk_groups
from mhim.pipeline.store import layout
from tests.pipeline.bags import make_features, sets, write_labels
from tests.pipeline.browser import page

Cli = Callable[..., tuple[int, str]]
QUICK = [
    *sets("train.folds=3", "train.val_fraction=0.4", "train.epochs=4", "train.lr=0.01", "score.bootstrap=40"),
    "--workers",
    "1",
]


def reported(cli: Cli, work: layout.Work, labels: Path, *more: str, name: str = "run") -> str:
    """The text of the report of a run that was trained and scored just now."""
    shared = ["--work", work.root, "--name", name, *QUICK, *more]
    code, text = cli("train", *shared, "--labels", labels)
    assert code == 0, text
    code, text = cli("score", *shared, "--heatmaps", "none")
    assert code == 0, text
    code, text = cli("report", "--work", work.root, "--name", name)
    assert code == 0, text
    return (work.run(name) / "report.html").read_text()


def survivors(work: layout.Work, patients: int = 40) -> list[Row]:
    """Rows of patients, two slides each; odd ones have hotter tiles and shorter lives."""
    rng = np.random.default_rng(2)
    lives = {}
    rows = []
    for row in make_features(work, patients, 2):
        odd = int(row.patient[1:]) % 2
        lives.setdefault(row.patient, (float(rng.exponential(6 if odd else 60)) + 0.5, int(rng.random() < 0.7)))
        rows.append(replace(row, label=None, time=lives[row.patient][0], event=lives[row.patient][1]))
    return rows


def write_survival(path: Path, rows: list[Row]) -> Path:
    path.write_text("slide,patient,time,event\n" + "".join(f"{r.slide},{r.patient},{r.time},{r.event}\n" for r in rows))
    return path


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_survival(cli: Cli, tmp_path: Path, loss: str) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_survival(tmp_path / "labels.csv", survivors(work))
    text = reported(cli, work, labels, "--set", "train.model=abmil", "--set", f"train.survival_loss={loss}")
    run = work.run("run")
    assert {p.stem for p in (run / "report").glob("*.svg")} == {"kaplan_meier", "loss", "validation"}
    assert "c index" in text
    assert "high risk" in text
    for word in ("ROC", "confusion", "Calibration", "balanced"):
        assert word not in text
    found = json.loads((run / "metrics.json").read_text())
    with open(run / "predictions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    time, event, told = (np.array([float(r[k]) for r in rows]) for k in ("time", "event", "risk"))
    fold = np.array([r["fold"] for r in rows])
    pairs = (time[:, None] < time) & (event[:, None] > 0) & (fold[:, None] == fold)  # nobody shares a time here
    right = pairs & (told[:, None] > told)
    assert found["test"]["c_index"]["value"] == pytest.approx(right.sum() / pairs.sum(), abs=1e-9)
    cuts = [json.loads((run / f"fold_{r['fold']}" / "model.json").read_text())["risk_threshold"] for r in rows]
    assert found["log_rank_p"] == pytest.approx(metrics.log_rank(time, event, told > np.array(cuts)))
    assert f"p = {found['log_rank_p']:.3g}" in (run / "report" / "kaplan_meier.svg").read_text()
    assert "confusion" not in found
    with page() as p:
        p.goto((run / "report.html").resolve().as_uri())
        shares = [float(t.split()[0]) for t in p.locator("table.sortable tbody tr td:last-child").all_inner_texts()]
        assert shares == sorted(shares, reverse=True)  # who stands most out of order comes first
        assert p.locator("table.sortable tbody tr").count() == 40  # patients, not slides
        p.select_option("select", "wrong")
        assert p.locator("table.sortable tbody tr:visible").count() == sum(s > 50 for s in shares)
        assert p.evaluate("Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")
        p.screenshot(path=str(tmp_path / "survival.png"), full_page=True)
        assert p.faults == []


def test_the_survival_figure_draws_steps_censored_patients_and_those_at_risk() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    time = np.array([2.0, 3.0, 5.0, 8.0, 9.0, 4.0, 12.0, 19.0])
    event = np.array([1, 1, 0, 1, 1, 1, 0, 1])
    high = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    figure, axes = plt.subplots()
    figures.kaplan_meier(time, event, high, 0.03)(axes)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"low risk (4, 3 events)", "high risk (4, 3 events)"} <= set(lines)
    steps = lines["high risk (4, 3 events)"]
    np.testing.assert_allclose(steps.get_ydata()[:3], [1, 0.75, 0.5])  # 4 at risk at time 2, 3 at time 3
    marks = [line for line in axes.get_lines() if line.get_marker() == "|"]
    (x,), (y,) = marks[1].get_data()
    assert (x, y) == (5.0, 0.5)  # on the step, not between two
    texts = [t.get_text() for t in axes.texts]
    ticks = figures.nice_ticks(19.0)
    for own in (~high, high):
        assert [str((time[own] >= t).sum()) for t in ticks] in [texts[i : i + len(ticks)] for i in range(len(texts))]
    assert "p = 0.03" in axes.get_xlabel()
    plt.close(figure)


@pytest.mark.parametrize("most", [0.3, 1.0, 7.3, 19.0, 60.0, 100.1, 4321.0])
def test_ticks_are_round_few_and_reach_the_end(most: float) -> None:
    ticks = figures.nice_ticks(most)
    assert ticks[0] == 0
    assert ticks[-2] < most <= ticks[-1] * (1 + 1e-9)
    assert 4 <= len(ticks) <= 7


def test_out_of_order_counts_comparable_pairs_only() -> None:
    rows = [{"time": t, "event": e, "risk": r} for t, e, r in ((1, 1, 0.1), (2, 0, 0.9), (3, 1, 0.5), (4, 0, 0.2))]
    found = kinds.of(Cox()).mistakes(rows)
    # pairs: 1 before 2, 3 and 4 (all wrong), 3 before 4 (right); nobody is known to have come after the censored 2
    assert found == pytest.approx([1, 1, 1 / 2, 1 / 2])


def test_several_trainings_of_a_patient_are_one_group() -> None:
    each = {"a": ((1.0, 0.0), (0.0, 2.0), (-7.0, -6.0)), "b": ((0.1, 0.0), (3.0, 2.0), (-90.0, -6.0))}
    rows = [
        {"patient": p, "repeat": 0, "fold": 0, "seed": s, "risk": r, "risk_threshold": t, "time": 1.0, "event": 1}
        for p, answers in each.items()
        for s, (r, t) in enumerate(answers)
    ]
    found = risk_groups.groups(ensemble.ensemble(rows, Cox()))
    assert found is not None
    assert found[2].tolist() == [False, True]  # one of three thresholds is passed, two of three, whatever the scales


def test_three_classes(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    rows = make_features(work, 30)
    rows = [replace(r, label="<i>third</i>" if int(r.patient[1:]) % 3 == 0 else r.label) for r in rows]
    text = reported(cli, work, write_labels(tmp_path / "labels.csv", rows), "--set", "train.model=abmil")
    assert "&lt;i&gt;third" in text
    assert "<i>third" not in text
    found = json.loads((work.run("run") / "metrics.json").read_text())
    assert np.array(found["confusion"]).shape == (3, 3)
    assert not found["decisions"]  # no threshold divides three classes
    assert "undecided" not in text
    roc = (work.run("run") / "report" / "roc.svg").read_text()
    assert roc.count("<!-- ") > 0
    with page() as p:
        p.goto((work.run("run") / "report.html").resolve().as_uri())
        assert p.locator("table.sortable tbody tr").first.locator("td").count() == 5 + 3
        assert p.evaluate("Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")
        assert p.faults == []


def test_a_missing_fold_is_told_before_any_number(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 18))
    whole = reported(cli, work, labels, "--set", "train.model=abmil")
    assert "trainings are missing" not in whole
    shutil.rmtree(work.run("run") / "fold_1")
    assert cli("score", "--work", work.root, "--name", "run", "--heatmaps", "none", *QUICK)[0] == 0
    assert cli("report", "--work", work.root, "--name", "run")[0] == 0
    text = (work.run("run") / "report.html").read_text()
    note = re.search(r'<p class="note">(1 of 3 trainings are missing[^<]*)', text)
    assert note is not None
    assert "fold 1 with seed" in note[1]
    assert note.start() < text.index('<h2 id="results">')
    assert "12 held-out patients, 2 folds" in text


def test_an_alarm_is_told_per_training(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 18))
    params = '{"student": "abmil", "student_params": {"width": 8, "attention_width": 8}, "student_start": "fresh"}'
    text = reported(
        cli,
        work,
        labels,
        "--set",
        "train.model=mhim",
        "--set",
        f"train.model_params={params}",
        "--set",
        "train.fallback=0.0",
        "--set",
        "train.choice=margin",
        "--set",
        "train.choice_margin=50",
    )
    found = json.loads((work.run("run") / "metrics.json").read_text())
    fallen = [f for f in found["per_fold"] if "fallback" in f]
    assert fallen, "with no tolerance at all some fold must fall back"
    assert f"{len(fallen)} of 3 trainings fell back to the plain model" in text
    table = text[text.index('<h2 id="trainings">') :]
    table = html.unescape(table[: table.index("</table>")])
    for one in fallen:  # and beside each that did, why
        assert one["fallback"]["why"] in table
    weighed = [f["choice"] for f in found["per_fold"] if "choice" in f]  # the alarm came first in the others
    assert len(fallen) == 3
    assert ("evidence for the student" in table) == bool(weighed)
    assert [f"(paired, {w['patients']} validation patients)" in table for w in weighed] == [True] * len(weighed)
    assert (f"too little to tell in {len(weighed)} of {len(weighed)} trainings" in html.unescape(text)) == bool(weighed)
