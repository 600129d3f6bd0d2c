"""From features to the printed table, where the truth is known: a hazard is found again, permuted labels are not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.mil.tasks import Cox
from mhim.pipeline.results import estimand
from mhim.pipeline.store import layout, writing

Cli = Callable[..., tuple[int, str]]
COX = Cox()


def bags(work: layout.Work, signal: np.ndarray, seed: int = 0) -> list[str]:
    """One slide of five tiles per patient, whose first feature tells the patient's value; slide ids."""
    rng = np.random.default_rng(seed)
    made = []
    for i, value in enumerate(signal):
        x = rng.normal(size=(5, 4)).astype(np.float16)
        x[:, 0] = value + 0.05 * rng.normal(size=5)
        facts = {
            "encoder": "texture",
            "weights_id": "w",
            "mpp": 0.5,
            "tile_px": 256,
            "stain_norm": "none",
            "dim": 4,
            "tile_l0": [256.0, 256.0],
            "fingerprint": f"{seed}-{i}",
        }
        writer = writing.StoreWriter(work.feature_store("texture", f"s{i:03d}"), facts)
        writer.write("features", x)
        writer.write("coords", (np.arange(10).reshape(5, 2) * 256).astype(np.int32))
        made.append(f"s{i:03d}")
    return made


def lives(hazard: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Exponential times of rate exp(1.2 hazard), a third of them censored."""
    rng = np.random.default_rng(seed)
    death, lost = rng.exponential(np.exp(-1.2 * hazard)), rng.exponential(2.5, len(hazard))
    return np.minimum(death, lost) + 0.001, (death <= lost).astype(int)


def printed(cli: Cli, work: layout.Work, table: list[str], folder: Path, *more: str) -> dict[str, tuple[float, ...]]:
    """metric -> (value inside trainings, low, high) as `score` prints them."""
    labels = folder / "labels.csv"
    labels.write_text("\n".join(table) + "\n")
    train = [
        "--model",
        "mean",
        "--set",
        "train.folds=3",
        "--set",
        "train.epochs=6",
        "--set",
        "train.lr=0.01",
        "--set",
        "train.model_params={width: 8}",
        *more,
    ]
    code, text = cli("train", "--work", work.root, "--labels", labels, *train, "--workers", "1")
    assert code == 0, text
    code, text = cli(
        "score",
        "--work",
        work.root,
        "--model",
        "mean",
        "--heatmaps",
        "none",
        "--workers",
        "1",
        "--set",
        "score.bootstrap=200",
    )
    assert code == 0, text
    found = {}
    for line in text.splitlines():
        cells = [c.strip() for c in re.split("[│┃|]", line)]
        hit = len(cells) > 3 and re.fullmatch(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]", cells[3])
        if hit:
            found[cells[1].split(" (")[0]] = tuple(float(v) for v in hit.groups())
    return found


@pytest.mark.parametrize("loss", ["cox", "nll"])
def test_a_known_hazard_s_c_index_stands_in_the_printed_table(cli: Cli, tmp_path: Path, loss: str) -> None:
    work = layout.Work(tmp_path / "work")
    hazard = np.random.default_rng(5).normal(size=100)
    time, event = lives(hazard)
    slides = bags(work, hazard)
    rows = [f"{s},{t!r},{e}" for s, t, e in zip(slides, time.tolist(), event, strict=True)]
    found = printed(cli, work, ["slide,time,event", *rows], tmp_path, "--set", f"train.survival_loss={loss}")
    of = dict(zip(slides, hazard, strict=True))
    told = estimand.read(work.run("mean") / "predictions.csv")
    oracle = estimand.point(estimand.answers([{**r, "risk": of[r["patient"]]} for r in told], COX))["c_index"]
    assert 0.7 < oracle < 0.9
    value, low, high = found["c_index"]
    assert value == pytest.approx(oracle, abs=0.03 if loss == "cox" else 0.05)  # four bins know less of a time
    assert low < oracle < high
    assert {"time_auc_1", "time_auc_2", "time_auc_3"} < set(found)


@pytest.mark.parametrize("kind", ["two classes", "three classes", "cox", "nll"])
def test_permuted_labels_give_a_half_within_noise(cli: Cli, tmp_path: Path, kind: str) -> None:
    work = layout.Work(tmp_path / "work")
    n = 120
    rng = np.random.default_rng(3)
    hazard = rng.normal(size=n)
    slides = bags(work, hazard)
    if kind in ("cox", "nll"):
        time, event = lives(hazard)
        order = rng.permutation(n)
        rows = ["slide,time,event", *(f"{s},{time[k]!s},{event[k]}" for s, k in zip(slides, order, strict=True))]
        more = ["--set", f"train.survival_loss={kind}"]
    else:
        classes = ["a", "b"] if kind == "two classes" else ["a", "b", "c"]
        label = rng.permutation(np.argsort(np.argsort(hazard)) * len(classes) // n)
        rows, more = ["slide,label", *(f"{s},{classes[k]}" for s, k in zip(slides, label, strict=True))], []
    found = printed(cli, work, rows, tmp_path, *more)
    headline = "c_index" if kind in ("cox", "nll") else "auc"
    assert found[headline][0] == pytest.approx(0.5, abs=0.15)  # one standard deviation is .055
    assert found[headline][1] < 0.5 < found[headline][2]
    if headline == "auc":
        assert found["balanced_accuracy"][0] == pytest.approx(1 / len(classes), abs=0.15)
