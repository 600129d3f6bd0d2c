"""The table of encoders against timm, renamed checkpoints, weights that must be refused, and the texture baseline."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mhim.configs import lookup, trust
from mhim.configs.schema import ExtractConfig
from mhim.extract import encoders, weights
from mhim.extract.encoders import EncoderError, GpuFailed, NoGpu, _families, _remap, _table, _torch
from mhim.extract.weights import WeightsError

REQUIRED = """
resnet50-trunc uni uni2-h virchow virchow2 h-optimus-0 h-optimus-1 h0-mini gigapath phikon phikon-v2 hibou-b
hibou-l kaiko-vits8 kaiko-vits16 kaiko-vitb8 kaiko-vitb16 kaiko-vitl14 lunit-vits8 lunit-vits16 gpfm ctranspath
chief conch conch-v1.5 plip midnight-12k keep
""".split()  # noqa: SIM905
TIMM = [row.name for row in _table.rows().values() if row.loader == "timm"]
SWIGLU = {"uni2-h", "virchow", "virchow2", "h-optimus-0", "h-optimus-1", "h0-mini", "gigapath", "midnight-12k"}
SWIGLU |= {"hibou-b", "hibou-l"}


def test_the_table_names_what_people_use() -> None:
    assert set(REQUIRED) <= set(_table.rows())
    assert all(row.sources and row.licence and row.doubt for row in _table.rows().values())


@pytest.mark.parametrize("name", TIMM)
def test_every_timm_row_builds(name: str) -> None:
    """On the meta device: width, prefix tokens, gate of the feed-forward layers, names of parameters."""
    row = _table.rows()[name]
    with torch.device("meta"):
        model = _families.network(row)
        with torch.inference_mode():
            out = _families._Pool(row.pooling, row.prefix_tokens)(model, torch.empty(2, 3, row.input_px, row.input_px))
    assert out.shape == (2, row.dim)
    trunk = getattr(model, "visual", getattr(model, "trunk", model))
    assert getattr(trunk, "num_prefix_tokens", 0) == row.prefix_tokens
    keys = model.state_dict().keys()
    assert not any(k.startswith(("head.", "fc.")) for k in keys), "no classifier"
    if name in SWIGLU:
        from timm.layers import GluMlp

        gates = {(type(b.mlp), type(b.mlp.act), b.mlp.gate_last) for b in trunk.blocks}
        assert gates == {(GluMlp, torch.nn.SiLU, False)}, "another gate loads strictly and computes something else"


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_renamed_transformers_checkpoints(name: str) -> None:
    """A ViT's parameters under the names transformers gives them come back as timm's, each tensor at its place."""
    row = _table.rows()["phikon" if name == "vit" else "phikon-v2"]
    small = row.model_copy(update={"kwargs": {**row.kwargs, "embed_dim": 24, "depth": 2, "num_heads": 3}})
    torch.manual_seed(1)
    model = _families.network(small)
    state = model.state_dict()
    back = [
        ("blocks.", "encoder.layer."),
        (".attn.proj.", ".attention.output.dense."),
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ]
    if name == "vit":
        back += [
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
        ]
    foreign = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                foreign[
                    key.replace("blocks.", "encoder.layer.").replace(".attn.qkv.", f".attention.attention.{part}.")
                ] = third
            continue
        new = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}.get(key, key)
        new = f"layernorm.{key.split('.')[1]}" if key.startswith("norm.") else new
        for ours, theirs in back:
            new = new.replace(ours, theirs)
        foreign[new.replace(".ls1.gamma", ".layer_scale1.lambda1").replace(".ls2.gamma", ".layer_scale2.lambda1")] = (
            value
        )
    foreign["embeddings.mask_token"] = torch.zeros(1, 24)
    renamed = _remap.to_timm(foreign, model, row.name)
    assert renamed.keys() == state.keys()
    assert all(torch.equal(renamed[k], state[k]) for k in state)


def test_old_swin_checkpoint_of_ctranspath() -> None:
    """timm 0.5 kept the down-sampling in the stage before; its computed tables are dropped."""
    row = _table.rows()["ctranspath"]
    model = _families.network(row)
    state = model.state_dict()
    old = {
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
    }
    for key, value in state.items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        old[key] = value
    renamed = _remap.to_timm(old, model, "ctranspath")
    assert {k for k in renamed if "relative_position_index" not in k} == {
        k for k in state if "relative_position_index" not in k
    }
    assert all(torch.equal(renamed[k], state[k]) for k in renamed)


def test_truncated_resnet50(folder: Path) -> None:
    """The 1024 numbers are the average of the third block's map, of the tile resized to 224."""
    import timm

    config = ExtractConfig(encoder="resnet50-trunc", weights=str(folder), offline=True)
    encoder = encoders.build(config)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    torch.manual_seed(0)
    whole = timm.create_model("resnet50", features_only=True, out_indices=(3,)).eval()
    state = weights.load_state(folder / "resnet50-trunc.safetensors")
    whole.load_state_dict({k: v for k, v in state.items() if not k.startswith(("layer4", "fc"))})
    x = (
        torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    ) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        want = whole(x)[0].mean((2, 3)).numpy()
    np.testing.assert_allclose(encoder.encode(tiles), want, rtol=1e-3, atol=1e-4)
    assert encoder.dim == 1024


def test_weights_that_are_refused(folder: Path, tmp_path: Path) -> None:
    good = folder / "timm-test_vit.safetensors"
    state = weights.load_state(good)

    def build(path: Path) -> None:
        encoders.build(ExtractConfig(encoder="timm:test_vit", weights=str(path), offline=True))

    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="damaged"):
        build(truncated)
    torch.save(state, tmp_path / "whole.pth")
    build(tmp_path / "whole.pth")
    torch.save({"teacher": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pth")
    build(tmp_path / "wrapped.pth")
    half = tmp_path / "half.pth"
    half.write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="damaged or truncated"):
        build(half)
    save_file({**state, "pos_embed": torch.zeros(1, 3, 5)}, tmp_path / "shape.safetensors")
    with pytest.raises(WeightsError, match=r"of another shape \(pos_embed is \(1, 3, 5\)"):
        build(tmp_path / "shape.safetensors")
    save_file({k: v for k, v in state.items() if "blocks.0.norm1" not in k}, tmp_path / "less.safetensors")
    with pytest.raises(WeightsError, match=r"2 missing \(blocks\.0\.norm1\.weight"):
        build(tmp_path / "less.safetensors")
    with pytest.raises(WeightsError, match="no such file"):
        build(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"pipeline weights fetch timm:test_vit2? --to|get the file"):
        encoders.build(ExtractConfig(encoder="timm:test_vit2", weights=str(folder), offline=True))


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"a": _Trap(str(sprung))}, tmp_path / "trap.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"a": _Trap(str(sprung))}))
    for name in ("trap.pth", "bare.pth"):
        with pytest.raises(WeightsError, match=r"refused|damaged"):
            weights.load_state(tmp_path / name)
    assert not sprung.exists()


def test_offline_opens_no_socket(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights given, and with weights that are nowhere: only a message."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    config = ExtractConfig(encoder="timm:test_vit", weights=str(folder), offline=True)
    encoders.identity(config)
    encoders.build(config)
    for name in ("uni", "timm:resnet18", "hibou-b"):
        with pytest.raises(WeightsError, match=r"offline.*pipeline weights fetch"):
            encoders.build(ExtractConfig(encoder=name, offline=True))


def test_without_weights_and_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HTTPS_PROXY", "")
    monkeypatch.setattr(weights, "cached", lambda *a: None)
    with pytest.raises(WeightsError, match=r"cannot be reached.*pipeline weights fetch uni --to DIR"):
        encoders.identity(ExtractConfig(encoder="uni"))


def test_tiles_the_encoder_was_not_made_for(folder: Path) -> None:
    known = {"encoder": "virchow", "tile_px": [224], "mpp": [0.5]}
    assert encoders.check_tiles(known, 224, 0.499, allow_mismatch=False) == ""
    with pytest.raises(EncoderError, match=r"224 px tiles, not 256 and for 0\.5 µm/px, not 1.*--allow-mismatch"):
        encoders.check_tiles(known, 256, 1.0, allow_mismatch=False)
    assert "not 256" in encoders.check_tiles(known, 256, 0.5, allow_mismatch=True)


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_resnet"])  # norms over layers, and over batches
def test_weights_cast_once_give_autocast_s_numbers(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExtractConfig(encoder=name, weights=str(folder), offline=True, precision="bfloat16")
    tiles = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    encoder = encoders.build(config)
    kinds = {p.dtype for p in encoder.encode.__self__.module.parameters()}  # type: ignore[attr-defined]
    assert kinds == {torch.bfloat16, torch.float32}  # norms stay
    monkeypatch.setattr(_torch, "cast_once", lambda module, kind: None)
    np.testing.assert_array_equal(encoder.encode(tiles), encoders.build(config).encode(tiles))


def test_gpu_without_one_stops(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(NoGpu, match="no usable GPU"):
        encoders.build(ExtractConfig(encoder="timm:test_vit", weights=str(folder), gpu=True, offline=True))


def test_out_of_memory_halves_the_batch_and_goes_on(folder: Path) -> None:
    """The same features in smaller batches, no tile twice, and the smaller batch stays."""
    runner = _families.build(ExtractConfig(encoder="timm:test_vit", weights=str(folder), offline=True)).encode.__self__  # type: ignore[attr-defined]
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (37, 96, 96, 3), np.uint8))
    forward, sizes = runner.forward, []

    def short_of_memory(module: object, x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        if len(x) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(module, x)

    with torch.inference_mode():
        runner.batch = 64
        want = torch.cat([part for _, part in runner._parts(tiles)])
        runner.forward = short_of_memory
        parts = list(runner._parts(tiles))
    assert [row for row, _ in parts] == list(range(0, 37, 4))
    torch.testing.assert_close(torch.cat([part for _, part in parts]), want, rtol=1e-4, atol=1e-5)
    assert (runner.batch, runner.halvings) == (4, 4)
    assert sizes[:5] == [37, 32, 16, 8, 4]
    runner.forward = lambda module, x: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(NoGpu, match="no memory for even one tile"):
        list(runner._parts(tiles))


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (RuntimeError("CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA`"), GpuFailed),
        (torch.AcceleratorError("CUDA error: device lost"), GpuFailed),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), GpuFailed),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), RuntimeError),
    ],
)
def test_what_is_the_device_and_what_is_the_model(folder: Path, error: Exception, becomes: type) -> None:
    runner = _families.build(ExtractConfig(encoder="timm:test_vit", weights=str(folder), offline=True)).encode.__self__  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as caught, runner._watched():
        raise error
    assert type(caught.value) is becomes
    if becomes is GpuFailed:
        assert "nvidia-smi" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_identity_imports_no_torch_and_nothing_else_does_that_needs_none(folder: Path) -> None:
    code = (
        "import sys; from mhim.configs.schema import ExtractConfig; from mhim.extract.encoders import identity;"
        f"identity(ExtractConfig(encoder='resnet50-trunc', weights={str(folder)!r}, offline=True));"
        "identity(ExtractConfig()); from mhim.extract.features import Extractor; from mhim.configs import trust;"
        "trust.adopt(trust.Trust(frozenset({'tests'})));"
        "own = Extractor(ExtractConfig(encoder='tests.pipeline.failing_encoders.wide')).encoder;"
        "print(own.name, 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["wide", "False", "False"]


def test_own_encoder_that_lies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "liar_module.py").write_text("def nothing():\n    return 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    trust.allow("liar_module", "no_such_module_x")
    with pytest.raises(EncoderError, match=r"must return an? .*Encoder"):
        encoders.build(ExtractConfig(encoder="liar_module.nothing"))
    with pytest.raises(lookup.LookupFailed, match="no object 'missing'"):
        encoders.build(ExtractConfig(encoder="liar_module.missing"))
    with pytest.raises((EncoderError, lookup.LookupFailed), match="PYTHONPATH"):
        encoders.identity(ExtractConfig(encoder="no_such_module_x.f"))


def test_texture_tells_dense_dark_nuclei_from_stroma() -> None:
    """Tiles of the same colours that differ in number, size and darkness of nuclei lie apart; noise does not matter."""
    import cv2

    rng = np.random.default_rng(3)

    def tile(count: int, radius: float, dark: float) -> np.ndarray:
        image = np.full((256, 256, 3), (225, 170, 200), np.float32) + rng.normal(0, 4, (256, 256, 1)).astype(np.float32)
        for _ in range(count):
            centre = tuple(int(v) for v in rng.integers(0, 256, 2))
            cv2.circle(
                image, centre, max(2, int(rng.normal(radius, 1))), (90 * dark, 60 * dark, 130 * dark), -1, cv2.LINE_AA
            )
        return np.clip(cv2.GaussianBlur(image, (0, 0), 1), 0, 255).astype(np.uint8)

    encode = encoders.build(ExtractConfig()).encode
    stroma = encode(np.stack([tile(18, 5, 1.2) for _ in range(24)]))
    tumour = encode(np.stack([tile(50, 9, 0.9) for _ in range(24)]))
    both = np.concatenate([stroma, tumour])
    scaled = (both - both.mean(0)) / (both.std(0) + 1e-6)
    centre_s, centre_t = scaled[:12].mean(0), scaled[24:36].mean(0)  # half to learn from, half to test
    test = np.concatenate([scaled[12:24], scaled[36:]])
    nearer = np.linalg.norm(test - centre_t, axis=1) < np.linalg.norm(test - centre_s, axis=1)
    assert (nearer == np.repeat([False, True], 12)).mean() == 1.0
    assert np.abs(both).max() <= 8
