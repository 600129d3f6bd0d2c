"""Settings: their order, their errors, the presets and the template."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mhim.configs import load, lookup, trust
from mhim.configs.schema import Config, ExtractConfig, TileConfig, fingerprint_fields, marked


@pytest.mark.parametrize("name", load.presets())
def test_every_preset_is_valid_and_changes_something(name: str) -> None:
    assert load.resolve([name]) != Config()


def test_later_sources_win_and_flags_win_over_all(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("tile: {min_tissue: 0.1, tile_px: 512}\n")
    config = load.resolve([str(file)], ["tile.min_tissue=0.2"], {"tile.min_tissue": 0.4, "tile.mpp": None})
    assert (config.tile.min_tissue, config.tile.tile_px, config.tile.mpp) == (0.4, 512, (0.5,))


def test_another_plugin_drops_the_settings_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train: {model: mhim, model_params: {mask_ratio_h: 0.05}}\n")
    assert load.resolve([str(file)], flags={"train.model": "abmil"}).train.model_params == {}


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["tile.mppp=1"], ["tile.mppp", "unknown key"]),
        (["tile.min_tissue=2"], ["tile.min_tissue", "less than or equal to 1"]),
        (["tile.mpp"], ["key=value"]),
        (["tiles.mpp=1"], ["tiles", "unknown key"]),
    ],
)
def test_wrong_settings_are_named(sets: list[str], words: list[str]) -> None:
    with pytest.raises(load.ConfigError) as caught:
        load.resolve([], sets)
    assert all(word in str(caught.value) for word in words)


def test_a_folder_does_not_hide_the_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load.resolve(["demo"]).train.standardize


def test_unknown_preset_lists_the_others() -> None:
    with pytest.raises(load.ConfigError, match="there is"):
        load.resolve(["nonesuch"])


def test_the_template_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    sets = ["tile.mpp=[0.5, 1.0]", "train.grid={mask_ratio_h: [0.01, 0.03]}", "extract.weights=x.pt"]
    config = load.resolve([], sets)
    file = tmp_path / "all.yaml"
    file.write_text(load.template(config))
    assert load.resolve([str(file)]) == config
    assert set(yaml.safe_load(file.read_text())) == set(Config.model_fields)


def test_every_setting_is_explained() -> None:
    for section in Config.model_fields:
        for name, field in type(getattr(Config(), section)).model_fields.items():
            assert field.description, f"{section}.{name}"


def test_speed_fields_stay_out_of_the_fingerprint() -> None:
    fields = fingerprint_fields(ExtractConfig())
    assert "encoder" in fields
    assert not {"gpu", "batch", "readers", "weights"} & fields.keys()
    assert marked(TileConfig, "later") == {"max_pen", "max_blur", "max_fold", "max_haze"}


def test_lookup_lists_without_importing_and_names_the_file_to_add() -> None:
    assert "otsu" in lookup.names("mhim.extract.tissue")
    with pytest.raises(lookup.LookupFailed, match=r"extract/tissue/nonesuch\.py"):
        lookup.find("mhim.extract.tissue", "nonesuch")
    with pytest.raises(lookup.NotTrusted, match=r"--allow-plugin no\.such\.module"):
        lookup.find("mhim.extract.tissue", "no.such.module")
    trust.allow("no.such.module")
    with pytest.raises(lookup.LookupFailed, match="PYTHONPATH"):
        lookup.find("mhim.extract.tissue", "no.such.module")


@pytest.mark.parametrize(
    "setting",
    ["tile.mpp=.inf", "tile.mpp=[0.5,-1]", "tile.mpp=0", "train.lr=.nan", "cluster.lease_s=.inf", "score.abstain=.nan"],
)
def test_numbers_are_finite_and_sizes_positive(setting: str) -> None:
    with pytest.raises(load.ConfigError, match=setting.partition("=")[0]):
        load.resolve([], [setting])
