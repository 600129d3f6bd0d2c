"""The network segmenter: weights from a file, their hash as identity, messages where they are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mhim.configs.schema import Config, TileConfig
from mhim.extract.tiles.tiling import tile_slide, unpack_mask
from mhim.extract.tissue import network
from mhim.extract.weights import WeightsError
from tests.extract.slides import tissue_rgb, write_svs

ARCHITECTURE = "lraspp_mobilenet_v3_large"  # the smallest: 13 MB
SMALL = TileConfig(tile_px=64, min_piece_um2=500, blur_probe_um=0, overlay=False, close_um=0, min_hole_um2=0)


def save(path: Path, bias: tuple[float, float], seed: int = 0, prefix: str = "") -> Path:
    """Random weights whose last layers answer by `bias` alone, so that the mask is known."""
    import torch
    from safetensors.torch import save_file
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(seed)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    state = {prefix + k: v.contiguous() for k, v in model.state_dict().items()}
    for layer in ("low_classifier", "high_classifier"):
        state[f"{prefix}classifier.{layer}.weight"].zero_()
        state[f"{prefix}classifier.{layer}.bias"] = torch.tensor(bias)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("w") / "all.safetensors", (0.0, 1.0))


def params(weights: Path, **more: object) -> network.Params:
    return network.Params(weights=str(weights), architecture=ARCHITECTURE, mpp=8.0, window_px=192, **more)  # type: ignore[arg-type]


def test_the_classes_decide_and_the_shape_stays(everything: Path) -> None:
    rgb = tissue_rgb(90, 130)
    assert network.segment(rgb, 8.0, params(everything)).all()
    assert network.segment(rgb, 8.0, params(everything)).shape == (90, 130)
    assert not network.segment(rgb, 8.0, params(everything, tissue_classes=(0,))).any()
    assert network.segment(rgb[:7, :5], 4.0, params(everything)).shape == (7, 5)


def test_windows_join_to_the_answer_at_every_px(everything: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that takes what is dark for tissue shows whether windows are put back where they were cut."""
    import torch

    def dark(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        grey = batch.mean(dim=1, keepdim=True)
        return {"out": torch.cat([grey, -grey], dim=1)}

    monkeypatch.setattr(network, "_model", lambda *_: dark)
    rgb = np.random.default_rng(0).choice(np.array([20, 240], np.uint8), (211, 150, 1)).repeat(3, axis=2)
    assert np.array_equal(network.segment(rgb, 8.0, params(everything)), rgb[..., 0] == 20)


def test_a_checkpoint_of_a_training_program_is_unwrapped(tmp_path: Path, everything: Path) -> None:
    wrapped = save(tmp_path / "w.ckpt", (0.0, 1.0), prefix="model.")
    assert network.segment(tissue_rgb(40, 40), 8.0, params(wrapped)).all()
    with pytest.raises(WeightsError, match="deeplabv3_resnet50"):
        network.segment(tissue_rgb(40, 40), 8.0, network.Params(weights=str(wrapped), mpp=8.0))


def test_missing_weights_are_told_with_the_way_out(tmp_path: Path) -> None:
    for chosen, said in (
        (network.Params(), "segmenter_params.weights"),
        (network.Params(weights=str(tmp_path / "no.pt")), "no such file"),
        (network.Params(hub_id="nobody/nothing", offline=True), "offline"),
    ):
        with pytest.raises(WeightsError, match=said):
            network.identity(chosen)


def test_the_hash_of_the_weights_enters_the_fingerprint_and_their_path_does_not(
    tmp_path: Path, everything: Path
) -> None:
    from mhim.pipeline.stages.tile import Tile
    from mhim.pipeline.store.layout import Work

    def settings(weights: Path, **more: object) -> dict[str, object]:
        chosen = {"weights": str(weights), "architecture": ARCHITECTURE, **more}
        tile = TileConfig(segmenter="network", segmenter_params=chosen)
        return Tile(Work(tmp_path), Config(tile=tile), []).settings()

    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(everything.read_bytes())
    other = save(tmp_path / "other.safetensors", (1.0, 0.0))
    assert settings(everything) == settings(moved, device="cuda", licence="mine")
    assert settings(everything) != settings(other)
    assert settings(everything) != settings(everything, tissue_classes=[0])
    assert str(everything) not in str(settings(everything))


def test_a_slide_is_tiled_by_it_and_the_licence_is_shown(tmp_path: Path, everything: Path) -> None:
    path = write_svs(tmp_path / "a.svs", tissue_rgb(512, 640))
    chosen = {"weights": str(everything), "architecture": ARCHITECTURE, "mpp": 4.0, "licence": "CC-BY-4.0"}
    tiled = tile_slide(path, SMALL.model_copy(update={"segmenter": "network", "segmenter_params": chosen}))
    assert tiled.attrs["segmenter"] == "network"
    assert unpack_mask(tiled.arrays["mask"], tiled.attrs["mask_px"][0]).all()
    assert "CC-BY-4.0" in tiled.notes[0]
    assert "trained at 4" in tiled.notes[1]


def test_tiling_without_it_never_imports_torch(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", tissue_rgb(512, 640))
    code = (
        "import sys; from pathlib import Path; from mhim.configs.schema import TileConfig; "
        "from mhim.extract.tiles.tiling import tile_slide; "
        "tile_slide(Path(sys.argv[1]), TileConfig()); assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=root)
