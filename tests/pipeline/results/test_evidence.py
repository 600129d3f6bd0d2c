"""`score.evidence`: maps tested beside the scores, resumable, and shown where people look."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.mil import evidence as tested
from mhim.pipeline.results import evidence
from mhim.pipeline.store import layout, reading, seals, tables
from tests.pipeline.bags import make_features, sets, tree, write_labels

Cli = Callable[..., tuple[int, str]]


def test_maps_are_tested_beside_the_scores(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 12, slides_each=2))
    small = sets("train.folds=2", "train.epochs=8", 'train.model_params={"width": 8}', "score.bootstrap=0")
    assert cli("train", "--work", work.root, "--labels", labels, "--model", "abmil", *small, "--workers", 1)[0] == 0
    run = work.run("abmil")
    score = ("score", "--work", work.root, *sets("score.bootstrap=0", "score.heatmaps=none"), "--workers", 1)
    assert cli(*score)[0] == 0
    before = tree(run)
    code, text = cli(*score, *sets("score.evidence=all"))
    assert code == 0, text
    after = tree(run)
    assert {k: after[k] for k in before} == before, "nothing that was there has changed"
    found = json.loads((run / "evidence.json").read_text())
    assert {"attention", "contribution_yes", "probability_yes"} <= found["maps"].keys()
    assert found["maps"]["attention"]["patients"] == 12
    gains = [found["maps"][name]["gain"]["mean"] for name in found["best_first"]]
    assert gains == sorted(gains, reverse=True)
    store = run / "evidence" / "s01_0.svs.zarr"
    attrs = reading.read_attrs(store)
    both = [np.asarray(reading.read_array(run / "evidence" / f"s01_{k}.svs.zarr", "needed_attention")) for k in (0, 1)]
    told = attrs["maps"]["attention"]
    assert sum(part.sum() for part in both) == told["numbers"]["smallest_tiles"], "one bag: the set spans its slides"
    assert told["k"][-1] == sum(map(len, both))
    scores = reading.read_attrs(run / "scores" / "s01_0.svs.zarr")["fingerprint"]
    layers = evidence.needed(run, "s01_0.svs", scores)
    assert np.array_equal(layers["needed_attention"], both[0])
    assert evidence.needed(run, "s01_0.svs", "of other scores") == {}
    code, text = cli(*score, *sets("score.evidence=all"))
    assert code == 0
    assert tree(run).keys() - {k for k in tree(run) if k.endswith(".jsonl")} == after.keys()
    assert "evidence abmil: 24 to do" not in text
    (store / "zarr.json").unlink()  # made again alone, to the same bytes
    assert cli(*score, *sets("score.evidence=all"))[0] == 0
    assert tree(run)["evidence/s01_0.svs.zarr/zarr.json"] == after["evidence/s01_0.svs.zarr/zarr.json"]

    with pytest.MonkeyPatch.context() as patch:  # measured otherwise: what is old is not told, and made anew
        other = {**tested.method(), "version": tested.VERSION + 1, "steps": 5}  # a setting that is none any more
        patch.setattr(tested, "method", lambda: other)
        assert evidence.means(run)["maps"] == {}
        code, text = cli(*score, *sets("score.evidence=all"))
        assert code == 0, text
        assert "evidence abmil: 0 to do, 0 done before, 24 to derive" in text
        assert evidence.means(run)["maps"]["attention"]["patients"] == 12
    assert cli(*score, *sets("score.evidence=all"))[0] == 0
    moved = run / "scores" / "s01_0.svs.zarr"
    moved.rename(tmp_path / "away")  # a map of scores that are not there
    moved_too = run / "scores" / "s01_1.svs.zarr"
    moved_too.rename(tmp_path / "away too")
    assert evidence.means(run)["maps"]["attention"]["patients"] == 11
    (tmp_path / "away").rename(moved)
    (tmp_path / "away too").rename(moved_too)
    own = run / "fold_0" / seals.SEAL
    kept = own.read_text()
    seal = json.loads(kept) | {"fingerprint": "0" * 16}  # trained again since, without some of its patients
    own.write_text(json.dumps(seal | {"seal_sum": seals.own_sum(seal)}))
    others = sum(row["fold"] != "0" for row in tables.read(run / "predictions.csv"))
    assert evidence.means(run)["maps"]["attention"]["patients"] == others < 12
    own.write_text(kept)
    assert cli("report", "--work", work.root)[0] == 0
    assert "Do the maps say what the model uses?" in (run / "report.html").read_text()
