"""Whatever can change a result changes the fingerprint: every setting and every input in turn."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import ValidationError

from mhim.configs import trust
from mhim.configs.base import Settings, added, fingerprint_fields
from mhim.configs.schema import Config, TrainConfig, marked
from mhim.extract import encoders
from mhim.extract.encoders import _table
from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.cohort.patients import Dataset, Patient
from mhim.pipeline.resume import fingerprints, stage
from mhim.pipeline.stages.extract import Extract
from mhim.pipeline.stages.score import Score
from mhim.pipeline.stages.tile import Tile
from mhim.pipeline.stages.train import Train
from mhim.pipeline.store import layout, writing
from mhim.pipeline.training.fold import whole_params

Cli = Callable[..., tuple[int, str]]

# Settings that are in no fingerprint, each with the reason. A new one must be put here, or into the fingerprint.
OUTSIDE = {
    "tile.overlay": "a picture beside the output, made when it is missing (tested below)",
    "tile.regions_frame": "of slides with regions only: among their inputs",
    "extract.weights": "where the weights lie; their SHA-256 is in",
    "extract.offline": "whether they may be fetched; their SHA-256 is in",
    "extract.gpu": "what `auto` becomes by it is in (tested below); last bits are promised on one kind of device only",
    "extract.gpus": "as gpu",
    "extract.batch": "on a CPU the bytes do not depend on it; on a GPU last bits may, which README says",
    "extract.readers": "threads",
    "extract.queue_mb": "memory",
    "extract.cache_dir": "copies of slides",
    "extract.cache_gb": "copies of slides",
    "train.tables": "where the tables lie; their rows of the run's patients are inputs",
    "train.fusion": "of fused trainings, which have a fingerprint of their own (tests/pipeline/training/test_fused.py)",
    "train.fusion_folds": "as fusion",
    "train.fusion_params": "as fusion",
    "train.fusion_groups": "as fusion",
    "train.pretrained": "where the weights lie; their SHA-256 is an input",
    "train.gpu": "last bits are promised on one kind of device only",
    "train.cache_gb": "memory",
    "train.checkpoint_s": "when checkpoints are written; a training that goes on ends in the same bytes",
    "train.log": "a further log",
    "train.grid": "which trainings there are; each value is in the fingerprint of its own training",
    "train.draws": "which trainings there are; those of a search are inputs of its opened folds",
    "train.choice": "of students alone, among whose inputs it is (tests/pipeline/training/test_kept.py)",
    "train.choice_margin": "as choice",
    "train.choice_patients": "decides which trainings give evidence, and those are inputs",
    "train.choice_folds": "as choice_patients",
    "train.seeds": "which trainings there are",
    "train.repeats": "which trainings there are",
    "train.seed": "each training's own seed is an input",
    "train.folds": "",
    "train.split_by": "",
    "train.val_fraction": "",  # in the settings, and in the splits
    "score.heatmaps": "pictures, drawn again when it changes",
    "score.heatmap_scale": "as heatmaps",
    "score.palette": "as heatmaps",
    "score.evidence": "stores of their own beside the scores",
    "score.heatmap_limit": "which pictures there are",
    "score.top_tiles": "as heatmaps",
    "score.geojson": "as heatmaps",
    "score.tiff": "as heatmaps",
    "score.allow_known": "whose slides are taken; which models score them is an input",
    "score.several_slides": "of new slides: it decides what a bag is, and the bag is an input",
}
# a value that is valid where the generic ones are not
OTHER: dict[str, Any] = {
    "tile.mpp": (1.0,),
    "tile.segmenter": "otsu",
    "tile.fallback_segmenter": "entropy",
    "tile.segment_mpp": 4.0,
    "extract.encoder": "tests.extract.own_encoder.mean_colour",
    "extract.gpus": (0, 1),
    "extract.encoder_params": {"spread": False},
    "train.model": "mean",
    "train.model_params": {"dropout": 0.5},
    "tile.segmenter_params": {"dark_od": 0.3},
    "train.grid": {"lr": (1.0,)},
    "train.fusion_params": {"width": 32},
    "train.task": "ordinal",
    "train.levels": {"grade": ("1", "2")},
    "train.tables": {"blood": "blood.csv"},
    "train.pretrained": "weights.safetensors",
    "train.pretrained_encoder": "uni",
    "score.confidence": 0.9,
}


def others(section: str, name: str, value: Any, kind: Any) -> Iterator[Any]:
    """Values that differ from `value`, the valid ones among them."""
    if f"{section}.{name}" in OTHER:
        yield OTHER[f"{section}.{name}"]
    for one in (kind, *typing.get_args(kind)):
        if typing.get_origin(one) is Literal:
            yield from typing.get_args(one)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (value + 1, value / 2, value + 0.1)
    elif isinstance(value, tuple):
        yield ("a", "b")
    elif value is None:
        yield from (0.5, "x")


def changed(section: str, name: str, base: dict[str, Any]) -> Config:
    before = Config.model_validate(base)
    value = getattr(getattr(before, section), name)
    kind = type(getattr(before, section)).model_fields[name].annotation
    for option in others(section, name, value, kind):
        try:
            made = Config.model_validate({**base, section: {**base.get(section, {}), name: option}})
        except ValidationError:
            continue
        if getattr(getattr(made, section), name) != value:
            return made
    raise AssertionError(f"{section}.{name}: no other valid value of {value!r} is known here; add one to OTHER")


def settings_of(section: str, config: Config, work: layout.Work, slide: Path) -> dict[str, Any]:
    """What the stage of a section puts into the fingerprint of one of its items."""
    entry = SlideEntry("a.svs", slide, 0.5)
    if section == "tile":
        tile = Tile(work, config, [entry])
        return tile.fields(tile.items()[0])
    if section == "extract":
        return Extract(work, config, [entry]).settings()
    if section == "score":
        scored = Score(work, config, work.run("r"), Dataset((), ("a", "b"), {}), {}, [work.root])
        return scored.fields(stage.Item("metrics", work.root, {}, None, "score.json"))
    return fingerprints.training(config.train)


def base_of(section: str) -> dict[str, Any]:
    own = {"encoder": "tests.extract.own_encoder.mean_colour"}
    return {"train": {"model": "abmil", "epochs": 20}, "extract": own if section == "extract_own" else {}}


@pytest.mark.parametrize(
    ("section", "name"),
    [(s, n) for s in ("tile", "extract", "train", "score") for n in type(getattr(Config(), s)).model_fields],
)
def test_every_setting_is_in_or_has_a_reason(section: str, name: str, tmp_path: Path) -> None:
    slide = tmp_path / "a.svs"
    slide.write_bytes(b"content")
    work = layout.Work(tmp_path)
    base = base_of("extract_own" if name == "encoder_params" else section)
    before = settings_of(section, Config.model_validate(base), work, slide)
    after = settings_of(section, changed(section, name, base), work, slide)
    if f"{section}.{name}" in OUTSIDE:
        if name not in ("folds", "split_by", "val_fraction"):
            assert before == after, "it is in the fingerprint: take it off the list"
    else:
        assert layout.fingerprint(before) != layout.fingerprint(after)


def test_all_that_is_marked_as_speed_has_a_reason() -> None:
    for section in ("tile", "extract", "train", "score"):
        fast = marked(type(getattr(Config(), section)), "speed")
        assert {f"{section}.{name}" for name in fast} <= OUTSIDE.keys()


def test_every_input_of_a_tiling_is_in(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"content")
    (tmp_path / "b.svs").write_bytes(b"tnetnoc")  # of the same length
    (tmp_path / "r.geojson").write_text("{}")
    work = layout.Work(tmp_path / "w")

    def fields(entry: SlideEntry) -> str:
        tile = Tile(work, Config(), [entry])
        return layout.fingerprint(tile.fields(tile.items()[0]))

    made = [
        SlideEntry("a.svs", tmp_path / "a.svs"), SlideEntry("a.svs", tmp_path / "b.svs"),
        SlideEntry("a.svs", tmp_path / "a.svs", 0.25),
        SlideEntry("a.svs", tmp_path / "a.svs", None, tmp_path / "r.geojson"),
    ]  # fmt: skip
    found = [fields(e) for e in made]
    (tmp_path / "r.geojson").write_text("{} ")
    found.append(fields(made[-1]))
    assert len(set(found)) == len(found)


def test_what_auto_became_is_in_for_every_encoder_with_half_precision() -> None:
    from mhim.configs.schema import ExtractConfig

    half = [row for row in _table.rows().values() if row.precision != "float32"]
    assert half
    for row in half:
        asked = [ExtractConfig(encoder=row.name, gpu=gpu) for gpu in (False, True)]
        resolved = [encoders.resolved_precision(config, row.precision) for config in asked]
        assert resolved == ["float32", row.precision]
    assert encoders.resolved_precision(ExtractConfig(precision="bfloat16"), "float16") == "bfloat16"


def own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own modules of every kind in `folder`, made importable and allowed."""
    (folder / "fp_seg.py").write_text("from mhim.extract.tissue.otsu import Params, segment\n")
    (folder / "fp_mil.py").write_text("from mhim.mil.models.mean import Params, build\n")
    (folder / "fp_enc.py").write_text("def make():\n    pass\n")
    monkeypatch.syspath_prepend(str(folder))
    trust.allow("fp_seg", "fp_mil", "fp_enc")


def test_the_code_of_an_own_plug_in_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, monkeypatch)
    slide = tmp_path / "a.svs"
    slide.touch()
    cases_of = {
        "tile": ({"tile": {"segmenter": "fp_seg"}}, "fp_seg.py"),
        "train": ({"train": {"model": "fp_mil"}}, "fp_mil.py"),
        "extract": ({"extract": {"encoder": "fp_enc.make"}}, "fp_enc.py"),
    }
    cases_of["fallback"] = ({"tile": {"fallback_segmenter": "fp_seg"}}, "fp_seg.py")
    cases_of["student"] = ({"train": {"model": "mhim", "model_params": {"student": "fp_mil"}}}, "fp_mil.py")
    sections = {"fallback": "tile", "student": "train"}
    for kind, (raw, file) in cases_of.items():
        section = sections.get(kind, kind)
        before = settings_of(section, Config.model_validate(raw), layout.Work(tmp_path), slide)
        with open(tmp_path / file, "a") as f:
            f.write("# another\n")
        after = settings_of(section, Config.model_validate(raw), layout.Work(tmp_path), slide)
        assert layout.fingerprint(before) != layout.fingerprint(after), kind


def patients(order: int = 1, names: tuple[str, str] = ("neg", "pos")) -> Dataset:
    made = [Patient(f"p{k}", (f"s{k}",), (Path(f"s{k}"),), k % 2, f"d{k}") for k in range(8)][::order]
    return Dataset(tuple(made), names, {"encoder": "e", "dim": 3})


def training(data: Dataset, work: layout.Work) -> stage.Item:
    config = Config.model_validate({"train": {"model": "mean", "folds": 2}})
    return Train(work, config, "r", data, cases.make_folds(data, config.train)).items()[0]


def test_class_names_are_in(tmp_path: Path) -> None:
    work = layout.Work(tmp_path)
    assert training(patients(), work).inputs != training(patients(names=("benign", "pos")), work).inputs
    assert training(patients(), work).inputs["classes"] == ["neg", "pos"]


def test_the_order_of_rows_is_not(tmp_path: Path) -> None:
    from mhim.pipeline.cohort.labels.rows import Row

    features = tmp_path / "f"
    for k in range(8):
        writer = writing.StoreWriter(features / f"s{k}.zarr", {"encoder": "e", "fingerprint": str(k), "dim": 1})
        writer.write("features", np.zeros((1, 1), np.float32))
    rows = [Row(k, f"s{k}", f"p{k // 2}", "ab"[k // 2 % 2]) for k in range(8)]
    there = cases.labelled(rows, features, Config().train)
    back = cases.labelled(rows[::-1], features, Config().train)
    assert there.patients == back.patients
    assert there.patients[0].slides == ("s0", "s1")


def judged(made: stage.Stage, item: stage.Item, old: dict[str, Any], **seal: Any) -> stage.Plan:
    writing.StoreWriter(item.output, seal)
    writing.seal(item.output, old)
    return stage.plan(made, [item])


LATER = {
    "tile.segmenter_defaults",
    "tile.fallback_defaults",
    "tile.segmenter_code",
    "input.content",
    "encoder.precision",
}


def test_outputs_of_0_1_are_taken_where_it_meant_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, monkeypatch)
    slide = tmp_path / "a.svs"
    slide.write_bytes(b"content")

    def old_tiles(name: str, **tile: Any) -> stage.Plan:
        made = Tile(
            layout.Work(tmp_path / name),
            Config.model_validate({"tile": {"overlay": False, **tile}}),
            [SlideEntry("a.svs", slide)],
        )
        item = made.items()[0]
        return judged(made, item, {k: v for k, v in made.fields(item).items() if k not in LATER})

    assert old_tiles("plain").done
    (differ,) = old_tiles("own", segmenter="fp_seg").differ  # nobody knows with which code that was made
    assert differ[1].keys() == {"tile.segmenter_code"}

    class Known(Extract):
        def __post_init__(self) -> None:
            self.identity = {"encoder": "uni", "weights_id": "w", "precision": self.precision}

    for now, then, kept in (
        ("float32", "float32", True),
        ("float16", "float32", False),
        ("float16", "float16", True),
        ("own", "float32", True),
    ):  # `texture`, and a user's own
        Known.precision = now  # type: ignore[attr-defined]
        made = Known(layout.Work(tmp_path / f"{now}{then}"), Config(), [])
        item = stage.Item("a.svs", made.work.feature_store("texture", "a.svs"), {"tiles": "t"})
        plan = judged(made, item, {k: v for k, v in made.fields(item).items() if k not in LATER}, precision=then)
        assert bool(plan.done) is kept
        assert [list(d) for _, d in plan.differ] == ([] if kept else [["encoder.precision"]])


def test_an_overlay_that_is_wanted_later_is_drawn_and_the_tiles_stay(
    cli: Cli, tmp_path: Path, demo_cohort: Path
) -> None:
    import shutil

    slides = tmp_path / "slides"
    slides.mkdir()
    shutil.copy(sorted((demo_cohort / "slides").glob("case_*.svs"))[0], slides / "a.svs")
    one, two = layout.Work(tmp_path / "one"), layout.Work(tmp_path / "two")
    assert cli("tile", slides, "--work", one.root, "--workers", "1")[0] == 0
    assert cli("tile", slides, "--work", two.root, "--workers", "1", "--set", "tile.overlay=false")[0] == 0
    assert not two.overlay("a.svs").exists()
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in two.tiles.rglob("*") if p.is_file()}
    assert cli("tile", slides, "--work", two.root, "--workers", "1")[0] == 0
    assert two.overlay("a.svs").read_bytes() == one.overlay("a.svs").read_bytes()
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in two.tiles.rglob("*") if p.is_file()} == before


def test_a_setting_that_was_added_leaves_old_fingerprints_alone_until_it_is_used() -> None:
    class Newer(Settings):
        old: int = 1
        new: int = added(2, "came later")

    assert fingerprint_fields(Newer()) == {"old": 1}
    assert fingerprint_fields(Newer(new=3)) == {"old": 1, "new": 3}
    written = whole_params(TrainConfig(model="acmil")).model_params
    assert set(written) == {"width", "dropout", "attention_width", "branches", "top_k", "mask_rate"}
    assert whole_params(TrainConfig(model="acmil", model_params={"form": "heads"})).model_params["form"] == "heads"
