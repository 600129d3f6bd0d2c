"""Outputs that are spread over a folder which others use too: what lies there afterwards is of the new ones alone."""

from __future__ import annotations

import json
from pathlib import Path

from mhim.pipeline.store import seals, writing

SEAL = "score.json"


def put(folder: Path, aside: Path, *names: str) -> set[str]:
    """Commit files of these names, with the content `new`; what lies in `folder` then."""
    for name in names:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_text("new")
    writing.seal(aside, {"of": list(names)}, SEAL)
    writing.commit_spread(aside, folder, SEAL)
    found = seals.look(folder, SEAL)
    assert found is not None
    assert not found.wrong
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def test_files_of_the_output_before_do_not_outlive_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "fold_0").mkdir(parents=True)
    (run / "fold_0" / "model.json").write_text("another's")
    several = put(run, tmp_path / "a", "metrics.json", "fusion.json", "targets/er/metrics.json", "targets/er/km.png")
    assert "targets/er/metrics.json" in several
    others = {"fold_0", "fold_0/model.json", SEAL, "metrics.json"}
    (run / "targets" / "own").mkdir()
    (run / "targets" / "own" / "notes.txt").write_text("a user's")
    assert put(run, tmp_path / "b", "metrics.json") == others | {"targets", "targets/own", "targets/own/notes.txt"}
    told = json.loads((run / SEAL).read_text())
    (tmp_path / "outside").write_text("x")
    told["files"] |= {"../outside": "1 0", str(tmp_path / "outside"): "1 0", "lost": "1 0"}
    told["seal_sum"] = seals.own_sum(told)
    (run / SEAL).write_text(json.dumps(told))
    put(run, tmp_path / "c", "metrics.json")
    assert (tmp_path / "outside").read_text() == "x", "a seal names nothing outside of its folder"
