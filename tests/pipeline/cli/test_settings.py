"""Flags that stand for settings: each is the schema's, says so, and stays; the command line around them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from mhim.configs import load
from mhim.configs.schema import BenchmarkConfig, Config, TileConfig
from mhim.pipeline.backends import dask, slurm
from mhim.pipeline.cli.main import _main
from mhim.pipeline.cli.options import app
from mhim.pipeline.cli.read import parsed
from mhim.pipeline.cli.settings import SettingsCommand, shown

Cli = Callable[..., tuple[int, str]]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OFFERING = sorted(name for name, command in COMMANDS.items() if isinstance(command, SettingsCommand))

# what scripts written for 0.1.0 may type, by command, and the settings that each flag stands for
CLUSTER = {
    "--workers": "cluster.workers",
    "--backend": "cluster.backend",
    "--scheduler": "cluster.backend_params.scheduler",
    "--wait": "cluster.backend_params.wait",
}
TABLE = {
    f"--{name.replace('_', '-')}": f"labels.{name}"
    for name in (
        *("slide_column", "patient_column", "label_column", "time_column", "event_column"),
        *("encoding", "tcga_patients"),
    )
}
PATIENTS = {"--table": "train.tables"}
TRAIN = {
    "--task": "train.task",
    "--encoder": "extract.encoder",
    "--folds": "train.folds",
    "--epochs": "train.epochs",
    "--seeds": "train.seeds",
    "--grid": "train.grid",
    "--draws": "train.draws",
    "--protocol": "train.protocol",
    "--gpu": "train.gpu",
}
ALWAYS: dict[str, dict[str, str]] = {
    "tile": {
        "--mpp": "tile.mpp",
        "--tile-px": "tile.tile_px",
        "--segmenter": "tile.segmenter",
        "--min-tissue": "tile.min_tissue",
        "--overlap-um": "tile.overlap_um",
        "--max-pen": "tile.max_pen",
        "--max-blur": "tile.max_blur",
        "--save-tiles": "tile.save_tiles",
        "--mpp-of-slides": "tile.mpp_of_slides",
        "--assume-mpp-from-power": "tile.assume_mpp_from_power",
        **TABLE,
        **CLUSTER,
    },
    "extract": {
        "--encoder": "extract.encoder",
        "--weights": "extract.weights",
        "--gpu": "extract.gpu",
        "--gpus": "extract.gpus",
        "--offline": "extract.offline",
        "--allow-mismatch": "extract.allow_mismatch",
        "--batch": "extract.batch",
        "--cache": "extract.cache_dir",
        **CLUSTER,
    },
    "train": {"--model": "train.model", **TRAIN, **PATIENTS, "--fusion": "train.fusion", **TABLE, **CLUSTER},
    "score": {
        "--heatmaps": "score.heatmaps",
        "--tiff": "score.tiff",
        "--geojson": "score.geojson",
        "--top-tiles": "score.top_tiles",
        "--allow-known": "score.allow_known",
        "--gpu": "train.gpu",
        **PATIENTS,
        **TABLE,
        **CLUSTER,
    },
    "run": {
        "--mpp": "tile.mpp",
        "--tile-px": "tile.tile_px",
        "--mpp-of-slides": "tile.mpp_of_slides",
        "--encoder": "extract.encoder",
        "--weights": "extract.weights",
        "--gpu": "extract.gpu",
        "--model": "train.model",
        "--task": "train.task",
        **PATIENTS,
        "--fusion": "train.fusion",
        **TABLE,
        **CLUSTER,
    },
    "benchmark": {**TRAIN, **TABLE, **CLUSTER},
    "check": {
        "--mpp": "tile.mpp",
        "--mpp-of-slides": "tile.mpp_of_slides",
        "--workers": "cluster.workers",
        **PATIENTS,
        **TABLE,
    },
    "map": {
        "--encoder": "extract.encoder",
        "--tiles": "map.tiles",
        "--method": "map.method",
        "--clusters": "map.clusters",
        "--gallery": "map.gallery",
        **TABLE,
        **CLUSTER,
    },
    "demo": {"--workers": "cluster.workers"},
    "export": {"--encoder": "extract.encoder"},
}
OTHERS: dict[str, str] = {  # flags that stand for no setting
    "tile": "--labels --work --config -c --set --shard --items --replace --dry-run --list",
    "extract": "--work --config -c --set --shard --items --replace --dry-run --list",
    "train": "--labels --name --work --config -c --set --shard --items --replace --dry-run --list",
    "score": "--labels --name --model --features --as --work --config -c --set --shard --items --replace --dry-run "
    "--list",
    "run": "--labels --name --work --config -c --set --replace",
    "benchmark": "--labels --models --name --work --config -c --set --replace --dry-run --list",
    "check": "--labels --out --config -c --set",
    "map": "--labels --name --run --work --config -c --set --shard --items --replace --dry-run --list",
    "demo": "--to --quick --config -c --set",
    "export": "--work --format",
}


def default_of(setting: str) -> Any:
    """The default as the settings themselves hold it."""
    if setting.startswith("cluster.backend_params."):
        key = setting.rpartition(".")[2]
        return getattr(dask.Params() if key == "scheduler" else slurm.Params(), key)
    section, key = setting.split(".")
    return getattr(getattr(Config(), section), key)


def options(command: str) -> dict[str, Any]:
    """Flag -> option, as the parser knows them."""
    with typer.Context(COMMANDS[command], info_name=command) as context:
        return {flag: option for option in COMMANDS[command].get_params(context) for flag in option.opts}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal on which no line of a help wraps."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 2000)


def test_the_commands_that_offer_settings_are_all_known_here() -> None:
    assert set(OFFERING) == set(ALWAYS) == set(OTHERS)


@pytest.mark.parametrize("command", OFFERING)
def test_every_flag_of_a_setting_shows_its_default(
    command: str, capsys: pytest.CaptureFixture[str], wide: None
) -> None:
    assert _main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    flags = {flag.flag: flag for flag in COMMANDS[command].offered}
    assert flags.keys() == ALWAYS[command].keys()
    for name, flag in flags.items():
        (line,) = [text for text in lines if re.match(rf"│ +{name} ", text)]
        assert flag.settings[0] == ALWAYS[command][name]
        assert f"(default: {shown(default_of(flag.settings[0]))})" in line


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), ((0.5, 1.0), "0.5,1.0"), (0, "0"), ("auto", "auto"), (True, "yes"), (False, "no")]
    + [(value, "none") for value in (None, (), {})]
    + [("", "empty")],
)
def test_a_default_is_shown_as_a_person_reads_it(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.fixture
def other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema whose tiles have 300 px by default."""
    field = TileConfig.model_fields["tile_px"]
    monkeypatch.setattr(field, "default", 300)
    monkeypatch.setattr(field, "description", "edge of another schema")


def test_the_help_follows_the_schema(other_defaults: None, capsys: pytest.CaptureFixture[str], wide: None) -> None:
    assert _main(["tile", "--help"]) == 0
    assert re.search(r"--tile-px .*edge of another schema; 16 to 4096 \(default: 300\)", capsys.readouterr().out)


@pytest.mark.parametrize("command", OFFERING)
def test_every_flag_of_version_0_1_is_there(command: str) -> None:
    assert set(OTHERS[command].split()) | ALWAYS[command].keys() <= options(command).keys()


@pytest.mark.parametrize("command", OFFERING)
def test_no_flag_means_two_things(command: str) -> None:
    with typer.Context(COMMANDS[command], info_name=command) as context:
        flags = [
            flag for option in COMMANDS[command].get_params(context) for flag in (*option.opts, *option.secondary_opts)
        ]
    assert len(flags) == len(set(flags))


GIVEN = {  # for each kind of setting: what is typed, and what arrives
    "tile.mpp": (["0.5,1,2"], (0.5, 1.0, 2.0)),
    "tile.tile_px": (["300"], 300),
    "tile.save_tiles": (["jpg"], "jpg"),
    "tile.min_tissue": (["0.7"], 0.7),
    "tile.mpp_of_slides": (["0.3"], 0.3),
    "extract.gpus": (["0,2"], (0, 2)),
    "extract.offline": ([], True),
    "extract.cache_dir": (["/scratch"], "/scratch"),
    "train.grid": (["lr=0.1,0.2 epochs=3"], {"lr": (0.1, 0.2), "epochs": (3,)}),
    "labels.tcga_patients": ([], True),
    "cluster.backend_params.wait": ([], True),
}


@pytest.mark.parametrize("setting", GIVEN)
def test_a_flag_is_its_setting(setting: str) -> None:
    command = next(c for c, flags in ALWAYS.items() if c in ("tile", "extract", "train") and setting in flags.values())
    flag = next(f for f, s in ALWAYS[command].items() if s == setting)
    typed, value = GIVEN[setting]
    line = parsed([command, *(["slides"] if command == "tile" else []), flag, *typed])
    settings = load.validate(load.merged(line.config, line.sets, line.flags)).model_dump()
    for key in setting.split("."):
        settings = settings[key]
    assert settings == value


def test_one_gpu_flag_of_run_is_for_both_stages() -> None:
    given = parsed(["run", "slides", "--gpu"]).flags
    assert given["extract.gpu"] is given["train.gpu"] is True
    assert parsed(["run", "slides", "--no-gpu"]).flags["train.gpu"] is False
    assert parsed(["run", "slides"]).flags["train.gpu"] is None


def test_what_the_table_does_not_name_is_no_flag() -> None:
    """Nothing of a benchmark's own settings is a flag: its rows are no value to type."""
    settings = {f"benchmark.{name}" for name in BenchmarkConfig.model_fields}
    assert not settings & set(ALWAYS["benchmark"].values())


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["tile", "x", "--mpp", "a"], "--mpp 'a': write numbers, for example 0.5 or 0.5,1,2"),
        (["extract", "--gpus", "a"], "--gpus 'a': write numbers, for example 0 or 0,1,2"),
        (["train", "--grid", "lr"], "--grid 'lr': write setting=value,value"),
        (["tile", "x", "--tile-px", "3"], "tile.tile_px: Input should be greater than or equal to 16"),
        (["tile", "x", "--save-tiles", "gif"], "tile.save_tiles: Input should be 'none', 'jpg' or 'png'"),
        (["tile", "x", "--tile-px", "many"], "--tile-px"),
    ],
)
def test_a_wrong_value_is_one_line_and_code_2(cli: Cli, typed: list[str], told: str) -> None:
    code, text = cli(*typed)
    assert code == 2
    assert told in text
    assert "Traceback" not in text


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["weights", "fetch"]], ids=" ".join)
def test_h_is_help_everywhere(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for flag in ("-h", "--help"):
        assert _main([*command, flag]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "Usage: " in texts[0]


def test_the_version_is_that_of_the_project(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: f"9.9 of {name}")
    assert cli("--version") == (0, "9.9 of mhim-pipeline\n")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("pipeline ti", ["tile"]),
        ("pipeline tile --seg", ["--segmenter"]),
        ("pipeline tile --save-tiles ", ["none", "jpg", "png"]),
        ("pipeline train --model mh", ["mhim"]),
    ],
)
def test_a_shell_completes_commands_flags_and_values(words: str, offered: list[str]) -> None:
    asked = {
        "_PIPELINE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    call = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'pipeline'; from mhim.pipeline.cli.main import main; main()",
    ]
    said = subprocess.run(call, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert said.stdout.split() == offered


def test_the_overview_needs_no_schema() -> None:
    code = (
        "import sys\nfrom mhim.pipeline.cli.main import _main\n_main(['--help'])\n"
        "print([m for m in ('pydantic', 'yaml', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stderr.strip() == "[]"


def test_a_dry_run_of_all_four_verbs_changes_nothing(cli: Cli, demo_cohort: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    labels = demo_cohort / "labels.csv"
    code, text = cli("run", demo_cohort / "slides", "--labels", labels, "--work", work, "--dry-run")
    assert code == 0
    assert re.search(r"tile: \d+ items", text)
    for verb in ("extract", "train", "score"):
        assert re.search(rf"{verb}: \d+ items?, once `[a-z]+` is done", text)
    assert not work.exists()
