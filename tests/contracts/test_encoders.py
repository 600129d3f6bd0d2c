"""What every encoder promises: width and type as declared, same input same bytes, rows that ignore their neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mhim.configs import lookup
from mhim.configs.schema import ExtractConfig
from mhim.extract import encoders
from mhim.extract.encoders import Encoder, EncoderError

NAMES = [*lookup.names("mhim.extract.encoders"), "timm:test_vit", "tests.extract.own_encoder.mean_colour"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with random weights of timm's tiny test model."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "timm-test_vit.safetensors")
    return folder


@pytest.fixture(params=NAMES)
def encoder(request: pytest.FixtureRequest, weights: Path) -> Encoder:
    return encoders.build(ExtractConfig(encoder=request.param, weights=str(weights), offline=True))


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (11, 96, 96, 3), np.uint8)


def test_width_type_and_repeatability(encoder: Encoder, tiles: np.ndarray) -> None:
    first = encoder.encode(tiles)
    assert first.shape == (11, encoder.dim)
    assert first.dtype == np.float32
    assert first.tobytes() == encoder.encode(tiles.copy()).tobytes()


def test_a_row_ignores_its_neighbours(encoder: Encoder, tiles: np.ndarray) -> None:
    """Alone, or at another place of the batch, a tile has the same vector, to the rounding of float32."""
    together = encoder.encode(tiles)
    np.testing.assert_allclose(encoder.encode(tiles[4:5])[0], together[4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(tiles[::-1]), together[::-1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(together[0], together[1]), "different tiles have different vectors"


def test_white_and_black_are_finite_in_float16(encoder: Encoder) -> None:
    flat = np.stack([np.full((96, 96, 3), v, np.uint8) for v in (0, 255, 128)])
    assert np.isfinite(encoder.encode(flat).astype(np.float16)).all()


def test_empty_batch(encoder: Encoder) -> None:
    assert encoder.encode(np.empty((0, 96, 96, 3), np.uint8)).shape == (0, encoder.dim)


@pytest.mark.parametrize("name", NAMES)
def test_identity_agrees_with_the_built_encoder(name: str, weights: Path) -> None:
    config = ExtractConfig(encoder=name, weights=str(weights), offline=True)
    known = encoders.identity(config)
    assert known["encoder"]
    if not name.startswith("tests."):  # the identity of one's own encoder is its code
        assert known["weights_id"] == encoders.build(config).weights_id
    assert encoders.check_tiles(known, 256, 0.5, allow_mismatch=False) == ""


def test_a_wrong_key_is_refused_by_name() -> None:
    for name in NAMES:
        config = ExtractConfig(encoder=name, encoder_params={"poolling": "cls"}, offline=True)
        with pytest.raises((lookup.LookupFailed, EncoderError), match="poolling"):
            encoders.build(config)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(EncoderError, match=r"unknown encoder 'textur' .did you mean texture.*texture.*uni2-h"):
        encoders.identity(ExtractConfig(encoder="textur"))
