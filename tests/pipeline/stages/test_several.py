"""Several targets at once, survival among them, through grid, benchmark, compare, report and new patients."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from mhim.configs.schema import ScoreConfig
from mhim.mil import resampling
from mhim.pipeline.cli.main import _main
from mhim.pipeline.pictures import layers
from mhim.pipeline.results import compare, estimand, operating_point, predictions, views
from mhim.pipeline.store import layout, writing
from mhim.pipeline.training import bundle, fold
from tests.pipeline.bags import make_features, sets

Cli = Callable[..., tuple[int, str]]
TARGETS = ["er", "grade", "ki67", "survival"]
QUICK = [
    *sets("train.epochs=2", "train.min_epochs=1", "train.folds=2", "train.lr=0.02", "score.bootstrap=20"),
    *sets("score.heatmaps=none", "train.val_fraction=0.4", "train.survival_bins=2"),
    *sets("benchmark.params={width: 8, attention_width: 8}"),
    "--workers",
    "1",
]
ALL = [
    *("--label-column", "er,grade,ki67", "--time-column", "months", "--event-column", "dead"),
    *("--task", "grade=ordinal,ki67=regression"),
]


def table(path: Path, work: layout.Work, patients: int, **more: object) -> Path:
    """Features, and their targets: a fifth of the cells is empty, of survival both."""
    rng, lines = np.random.default_rng(3), ["slide,patient,er,grade,ki67,months,dead"]
    for i, row in enumerate(make_features(work, patients, **more)):  # type: ignore[arg-type]
        odd = i % 2
        cells = [("neg", "pos")[odd], str(1 + odd + (i % 4 == 3)), f"{10 + 40 * odd + rng.normal(0, 4):.2f}"]
        cells.append(f"{30 - 15 * odd + rng.uniform(0, 8):.2f},{int(i % 3 > 0)}")
        cells = [("," if j == 3 else "") if (i + j) % 5 == 0 else cell for j, cell in enumerate(cells)]
        lines.append(",".join([row.slide, row.patient, *cells]))
    path.write_text("\n".join(lines) + "\n")
    return path


def call(*words: object) -> None:
    assert _main([str(w) for w in words]) == 0, words


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> layout.Work:
    """A work folder with the runs `abmil` and `mhim_abmil` of a benchmark with a grid, each of four targets."""
    folder = tmp_path_factory.mktemp("several")
    work = layout.Work(folder / "work")
    own = table(folder / "own.csv", work, 30)
    models = ["--models", "abmil,mhim_abmil", *sets("train.grid={lr: [0.02, 0.005]}")]
    call("benchmark", "--work", work.root, "--labels", own, *ALL, *QUICK, *models)
    return work


def test_a_benchmark_tells_the_paired_difference_of_every_target_and_of_their_mean(benched: layout.Work) -> None:
    with open(benched.runs / "benchmark.csv", newline="") as file:
        plain, taught = csv.DictReader(file)
    assert (plain["model"], taught["model"], taught["plain"]) == ("abmil", "mhim_abmil", "abmil")
    config = ScoreConfig(bootstrap=20)
    runs = benched.run("abmil"), benched.run("mhim_abmil")
    assert [v.target for v in views.of(runs[0])] == TARGETS
    each = {}
    for name in TARGETS:
        found = compare.compare(views.View(runs[0], name), views.View(runs[1], name), config)
        headline = json.loads((views.View(runs[0], name).folder / "metrics.json").read_text())["headline"]
        each[f"{name}.{headline}"] = found[headline]["difference"].value
    for name, value in each.items():
        assert float(taught[f"{name}_difference"]) == pytest.approx(value)
        assert taught[f"{name}_verdict"] in ("better", "worse", "no difference")
    assert float(taught["against_abmil"]) == pytest.approx(float(taught["difference"]))
    assert {float(plain["rank"]), float(taught["rank"])} == {1.0, 2.0}
    wholes = [json.loads((run / "metrics.json").read_text())["test"]["headline"]["value"] for run in runs]
    assert float(taught["difference"]) == pytest.approx(wholes[1] - wholes[0])
    page = (benched.runs / "benchmark.md").read_text()
    assert "mhim_abmil: survival.c_index against abmil: " in page
    assert "mhim_abmil: grid of lr, cell chosen on validation per fold; lr-0.005: validation headline" in page


def test_the_table_of_all_targets_has_no_number_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of columns may have points."""
    one = resampling.verdict(0.1, np.array([0.05, 0.15]), 0.95)
    found = {"headline": one, "macro_auc": one, "er.status.auc": one, "grade.quadratic_kappa": one}
    monkeypatch.setattr(compare, "compare_together", lambda *_: found)
    monkeypatch.setattr(compare, "in_common", lambda *_: ["er.status", "grade"])
    monkeypatch.setattr(compare.Metrics, "read", lambda _: SimpleNamespace(drawn="inside their folds"))
    out = Console(file=io.StringIO(), width=200)
    compare.tell_together(Path("one"), Path("two"), ScoreConfig(), out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "headline" in text
    assert "macro_auc" in text
    assert "er.status" not in text
    assert "grade" not in text


def test_survival_among_several_is_drawn_and_compared(benched: layout.Work, cli: Cli) -> None:
    folder = views.View(benched.run("mhim_abmil"), "survival").folder
    found = json.loads((folder / "metrics.json").read_text())
    assert found["test"]["c_index"]["value"] is not None
    assert {"kaplan_meier.csv", "kaplan_meier.svg"} <= {p.name for p in folder.iterdir()}
    rows = estimand.read(folder / "predictions.csv")
    assert len({r["patient"] for r in rows}) == 24
    assert {"time", "event", "risk", "risk_threshold"} <= rows[0].keys()
    code, text = cli("compare", "abmil", "mhim_abmil", "--work", benched.root, *sets("score.bootstrap=20"))
    assert code == 0, text
    flat = " ".join(text.split())
    assert "mhim_abmil, all targets minus abmil, all targets: same patients" in flat
    assert "mhim_abmil, survival minus abmil, survival: same patients" in flat


def test_the_report_of_several_has_every_target_in_contents_patients_slides_and_other_runs(
    benched: layout.Work, cli: Cli, tmp_path: Path
) -> None:
    run, other = benched.run("mhim_abmil"), layout.Work(tmp_path / "other")
    new = table(tmp_path / "new.csv", other, 12, seed=5, prefix="x")
    shared = ["--work", benched.root, *QUICK, "--name", "mhim_abmil", "--features", other.features("texture")]
    code, text = cli("score", *shared, "--labels", new, *ALL[:-2], "--as", "elsewhere")
    assert code == 0, text
    for view in views.of(run / "new" / "elsewhere"):
        told = json.loads((view.folder / "metrics.json").read_text())
        assert told["patients"] in (9, 10)
        assert told["external"].keys() == told["internal"].keys()
    wide = estimand.read(run / "predictions.csv")
    slide = wide[0]["slide"]
    drawn = run / "heatmaps" / slide
    drawn.mkdir(parents=True, exist_ok=True)
    for name in ("attention", "contribution_value_of_ki67", "risk_of_survival"):
        layers.save_png(drawn / f"{name}.png", np.full((70, 160, 3), 200, np.uint8))
    (drawn / layout.SEAL).write_text(json.dumps({"fingerprint": "drawn", "settings": {}}))
    scores = writing.StoreWriter(run / "scores" / f"{slide}.zarr", {"fingerprint": "scored", "settings": {}})
    scores.write("attention", np.ones(3, np.float32))
    code, text = cli("report", "--work", benched.root, "--name", "mhim_abmil")
    assert code == 0, text
    page = (run / "report.html").read_text()
    for name in TARGETS:
        assert f'<a href="#target-{name}">{name}</a>' in page
        assert f'<h2 id="target-{name}">{name}</h2>' in page
        assert f"<button>{name}, said</button>" in page
        assert f"Of {name}, 24 patients were known" in page
        assert f"<td>elsewhere, {name}</td>" in page
    assert all(f'id="{part}"' in page for part in re.findall(r'href="#([\w-]+)"', page))
    assert page.count("<tr><td>abmil</td><td>") == 5  # the headline, and that of each target
    (figure,) = re.findall(r"<figure[^>]*><div class=.layers.>.*?</figure>", page, re.DOTALL)
    assert figure.index("contribution value of ki67") < figure.index("attention") < figure.index("risk of survival")
    known = [name for name in TARGETS if wide[0].get(f"label.{name}") or wide[0].get(f"time.{name}")]
    assert known
    assert all(f"{name}: " in figure for name in known)
    body = page[page.index('<h2 id="patients"') :]
    assert body.count("<tr>", 0, body.index("</tbody>")) == 1 + len({r["patient"] for r in wide})


def test_decisions_of_each_target_are_frozen_on_its_own_validation_cells_with_a_band_where_asked(
    benched: layout.Work, cli: Cli
) -> None:
    run = benched.run("mhim_abmil")
    before = {p: p.read_bytes() for p in [run / "metrics.json", *sorted(run.glob("targets/*/*.[cj]s*"))]}
    shared = ["--work", benched.root, *QUICK, "--name", "mhim_abmil"]
    code, text = cli("score", *shared, *sets("score.abstain=0.5"), "--replace")
    assert code == 0, text
    rows = estimand.read(views.View(run, "er").folder / "predictions.csv")
    assert {r["decision"] for r in rows} >= {"undecided"}
    for folder in predictions.folds_of(run):
        card = bundle.card_of(folder)
        validation = fold.read_side(folder, "val", "er")
        known = [r for r in fold.read_predictions(folder) if r["side"] == "val" and r["target.er"] != ""]
        assert [r["patient"] for r in validation] == [r["patient"] for r in known]
        er = card.seen_as("er")
        at = operating_point.point(partial(list, validation), er, er.task.value, ScoreConfig(abstain=0.5))
        assert at is not None
        own = [r for r in rows if (r["repeat"], r["fold"], r["seed"]) == card.place]
        assert {(r["threshold"], r["undecided_from"], r["undecided_to"]) for r in own} == {
            (at.threshold, at.low, at.high)
        }
        risk = card.seen_as("survival").risk_threshold
        of_risk = estimand.read(views.View(run, "survival").folder / "predictions.csv")
        assert {r["risk_threshold"] for r in of_risk if r["fold"] == card.place[1]} == {risk}
    found = json.loads((views.View(run, "er").folder / "metrics.json").read_text())
    assert found["decisions"]["undecided"] == pytest.approx(np.mean([r["decision"] == "undecided" for r in rows]))
    whole = json.loads((run / "metrics.json").read_text())["choices"]
    assert whole["watched"] == 2
    assert found["choices"] == whole, "a training falls back as a whole"
    code, text = cli("score", *shared, "--replace")
    assert code == 0, text
    assert {p: p.read_bytes() for p in before} == before


def test_targets_that_a_fold_does_not_vary_in_are_told_by_name(cli: Cli, tmp_path: Path) -> None:
    """Fold 0 holds out nobody whose `pr` is known, fold 1 one level of `grade` and one number only. A target that is
    constant in a training part stops that training by its name."""
    work = layout.Work(tmp_path / "work")
    lines = ["slide,patient,fold,er,pr,grade,ki67"]
    for i, row in enumerate(make_features(work, 32)):
        k, odd = i // 8 % 4, i % 2
        cells = [("neg", "pos")[odd], "" if k == 0 else ("neg", "pos")[odd], "1" if k == 1 else str(1 + odd)]
        lines.append(",".join([row.slide, row.patient, str(k), *cells, "20" if k == 1 else f"{10 + 5 * odd + i / 8}"]))
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(lines) + "\n")
    shared = ["--work", work.root, *QUICK, *sets("train.model=mean", "train.model_params={width: 8}"), "--name", "one"]
    given = ["--labels", labels, "--label-column", "er,pr,grade,ki67", "--task", "grade=ordinal,ki67=regression"]
    code, text = cli("train", *shared, *given)
    assert code == 0, text
    code, text = cli("score", *shared)
    assert code == 0, text
    run = work.run("one")
    told = {v.target: json.loads((v.folder / "metrics.json").read_text()) for v in views.of(run)}
    assert told["pr"]["trainings"] == 3
    assert "1 of 4 trainings held out no patient whose pr is known" in "\n".join(told["pr"]["warnings"])
    of = {f["fold"]: f["metrics"] for f in told["grade"]["per_fold"]}
    assert of[1]["quadratic_kappa"] is None or of[1]["quadratic_kappa"] == 0
    assert {f["fold"]: f["metrics"]["r2"] for f in told["ki67"]["per_fold"]}[1] is None
    whole = json.loads((run / "metrics.json").read_text())
    per = {f["fold"]: f["metrics"] for f in whole["per_fold"]}
    assert per[0]["pr.auc"] is None
    assert per[0]["headline"] is not None
    assert all(v["value"] is not None for v in whole["test"].values())
    cells = [line.split(",") for line in lines]
    same = [c if c[2] == "0" or k == 0 else [*c[:5], c[5], "20"] for k, c in enumerate(cells)]
    labels.write_text("\n".join(map(",".join, same)) + "\n")
    code, text = cli("train", *shared, *given, "--replace")
    assert code == 1, text
    assert "target ki67: all 14 training targets of this fold are 20" in " ".join(text.split()), text
