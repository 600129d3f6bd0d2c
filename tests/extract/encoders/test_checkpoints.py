"""Random weights under the names their authors publish them with, through `encoders.build`: every parameter is used,
the width is the table's, and the numbers are those of the authors' own computation, written out here or run by their
package where it is installed.
"""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from mhim.configs.schema import ExtractConfig
from mhim.extract import encoders
from mhim.extract.encoders import Encoder, EncoderError, _families, _foreign, _remap, _table
from mhim.extract.weights import WeightsError

State = dict[str, torch.Tensor]


def small(monkeypatch: pytest.MonkeyPatch, name: str, dim: int = 192) -> _table.Row:
    """The row of `name` with a network 192 wide and 2 deep: the true widths are checked on the meta device."""
    row = _table.rows()[name]
    sizes = {"depth": 2, "embed_dim": 192, "num_heads": 4}
    little = row.model_copy(update={"kwargs": {**row.kwargs, **sizes}, "dim": dim})
    monkeypatch.setitem(_table.rows(), name, little)
    return little


def randomised(module: nn.Module, seed: int = 3) -> State:
    """All of its parameters random: a fresh network's zeros and ones would hide an exchange."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in module.state_dict().items()}


def built(name: str, path: Path, **params: object) -> Encoder:
    return encoders.build(ExtractConfig(encoder=name, weights=str(path), offline=True, encoder_params=params))


def tiles_of(row: _table.Row, n: int = 2) -> np.ndarray:
    """Noise, each tile in another part of the grey levels: noise of one kind all looks alike to a network."""
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 128, (n, row.input_px, row.input_px, 3), np.uint8)
    return noise + (np.arange(n, dtype=np.uint8) * 120)[:, None, None, None]


def prepared(row: _table.Row, tiles: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(row.mean).view(1, 3, 1, 1)) / torch.tensor(row.std).view(1, 3, 1, 1)


def agrees(encoder: Encoder, row: _table.Row, want: torch.Tensor, tiles: np.ndarray) -> None:
    got = encoder.encode(tiles)
    assert got.shape == (len(tiles), row.dim) == tuple(want.shape)
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=2e-3, atol=2e-4)
    assert np.abs(got[0] - got[1]).max() > 1e-3, "different tiles differ"


def every_key_counts(name: str, state: State, path: Path, skip: str = "") -> None:
    """Without any one of its parameters, or with one more, the file is refused by name."""
    used = [k for k in state if not (skip and re.match(skip, k))]
    for key in (used[0], used[len(used) // 2], used[-1]):
        save_file({k: v for k, v in state.items() if k != key}, path)
        with pytest.raises((WeightsError, EncoderError)):
            built(name, path)
    save_file({**state, f"{used[1]}_more": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="unknown"):
        built(name, path)


# ------------------------------------------------------------------------------------------ CONCH


def conch_published(trunk: nn.Module, width: int, prefix: str) -> State:
    """State dict as mahmoodlab/CONCH's CoCa saves it: trunk, two poolers, projections, and a text side."""
    context = trunk.num_features
    own = {f"trunk.{k}": v for k, v in randomised(trunk).items()}
    for pooler, queries, wide in (("attn_pool_contrast", 1, width), ("attn_pool_caption", 256, 768)):
        attention = nn.MultiheadAttention(wide, 8, kdim=context, vdim=context)
        own |= {f"{pooler}.attn.{k}": v for k, v in randomised(attention, 4).items()}
        own[f"{pooler}.query"] = torch.randn(queries, wide, generator=torch.Generator().manual_seed(6))
        for norm, size in (("ln_q", wide), ("ln_k", context)):
            own |= {f"{pooler}.{norm}.{k}": v for k, v in randomised(nn.LayerNorm(size), 7).items()}
    own |= {f"ln_contrast.{k}": v + 1 for k, v in randomised(nn.LayerNorm(width), 8).items()}
    own |= {f"ln_caption.{k}": v for k, v in randomised(nn.LayerNorm(768), 9).items()}
    own["proj_contrast"] = torch.randn(width, width)
    state = {prefix + k: v for k, v in own.items()}
    if prefix:
        state |= {
            "logit_scale": torch.ones([]),
            "text.cls_emb": torch.ones(8),
            "text_decoder.ln_final.weight": torch.ones(8),
        }
    return state


def conch_by_hand(trunk: nn.Module, state: State, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """encode_image(proj_contrast=False, normalize=False): trunk, one query over all tokens, LayerNorm."""
    own = {k.removeprefix(prefix): v for k, v in state.items()}
    trunk.load_state_dict({k.removeprefix("trunk."): v for k, v in own.items() if k.startswith("trunk.")})
    tokens = trunk.eval().forward_features(x)
    p = {k.removeprefix("attn_pool_contrast."): v for k, v in own.items() if k.startswith("attn_pool_contrast.")}
    width, context = p["query"].shape[1], tokens.shape[2]
    keys = F.layer_norm(tokens, (context,), p["ln_k.weight"], p["ln_k.bias"])
    query = F.layer_norm(p["query"], (width,), p["ln_q.weight"], p["ln_q.bias"])
    bias = p["attn.in_proj_bias"].chunk(3)
    q = (query @ p["attn.q_proj_weight"].T + bias[0]).view(8, 1, width // 8)  # heads, 1, width of a head
    k = (keys @ p["attn.k_proj_weight"].T + bias[1]).unflatten(2, (8, -1)).transpose(1, 2)  # B, heads, N, width
    v = (keys @ p["attn.v_proj_weight"].T + bias[2]).unflatten(2, (8, -1)).transpose(1, 2)
    weights = torch.softmax(q @ k.transpose(2, 3) / (width // 8) ** 0.5, dim=-1)  # B, heads, 1, N
    out = (weights @ v).transpose(1, 2).flatten(2)[:, 0] @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
    return F.layer_norm(out, (width,), own["ln_contrast.weight"], own["ln_contrast.bias"])


@pytest.mark.parametrize(
    ("name", "prefix", "px"), [("conch", "visual.", 448), ("conch-v1.5", "", 448), ("conch-v1.5", "", 224)]
)
def test_conch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, prefix: str, px: int) -> None:
    """px: the grid of position embeddings in the file; another than the image's is interpolated as timm does it."""
    import timm

    row = small(monkeypatch, name, dim=128)  # as in the true ones, wider or narrower than the trunk
    file = tmp_path / "w.safetensors"
    trunk = timm.create_model(row.arch, **{**row.kwargs, "img_size": px})
    state = conch_published(trunk, row.dim, prefix)
    save_file(state, file)
    encoder = built(name, file)
    tiles = tiles_of(row)
    with torch.inference_mode():
        agrees(encoder, row, conch_by_hand(trunk, state, prefix, prepared(row, tiles)), tiles)
    assert "attention pooling" in encoder.info["pooling"]
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.bin")
    np.testing.assert_array_equal(encoder.encode(tiles), built(name, tmp_path / "w.bin").encode(tiles))
    for key in ("trunk.blocks.1.attn.qkv.weight", "attn_pool_contrast.query", "ln_contrast.bias"):
        save_file({k: v for k, v in state.items() if k != prefix + key}, file)
        with pytest.raises(WeightsError, match=re.escape(key)):
            built(name, file)
    save_file(state, file)
    with pytest.raises(EncoderError, match="head of its own"):
        built(name, file, pooling="cls")


# ------------------------------------------------------------------------------------------ KEEP


@pytest.mark.parametrize("scale", ["gamma", "weight"])
def test_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str) -> None:
    """Names of MAGIC-AI4Med/KEEP's KEEPModel; LayerScale is `gamma` in timm, `weight` as transformers saves it."""
    import timm

    row = small(monkeypatch, "keep", dim=768)
    vit = timm.create_model(row.arch, **row.kwargs)
    head = nn.Sequential(nn.Linear(192, 768), nn.GELU(), nn.Linear(768, 768))
    vit_state, head_state = randomised(vit), randomised(head, 4)
    vit.load_state_dict(vit_state)
    head.load_state_dict(head_state)
    state = {f"visual.{re.sub('gamma$', scale, k)}": v for k, v in vit_state.items()}
    state |= {f"visual_head.{k}": v for k, v in head_state.items()}
    text = {"text.embeddings.word_embeddings.weight": torch.zeros(4, 4), "logit_scale": torch.ones([])}
    save_file(state | text, tmp_path / "w.safetensors")
    tiles = tiles_of(row)
    with torch.inference_mode():
        want = F.normalize(head(vit.eval()(prepared(row, tiles))), dim=-1)
    agrees(built("keep", tmp_path / "w.safetensors"), row, want, tiles)
    every_key_counts("keep", state, tmp_path / "w.safetensors")


# ------------------------------------------------------------------------------------------ DINOv2 of transformers


def to_transformers(state: State, registers: bool, gated: bool) -> State:
    """A timm ViT's parameters under the names of transformers' Dinov2Model (with registers)."""
    names = [
        ("blocks.", "encoder.layer."), (".attn.proj.", ".attention.output.dense."), ("norm.", "layernorm."),
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."), (".ls1.gamma", ".layer_scale1.lambda1"),
        (".ls2.gamma", ".layer_scale2.lambda1"), ("cls_token", "embeddings.cls_token"),
        ("reg_token", "embeddings.register_tokens"), ("pos_embed", "embeddings.position_embeddings"),
    ]  # fmt: skip
    names += [(".mlp.fc1.", ".mlp.weights_in."), (".mlp.fc2.", ".mlp.weights_out.")] if gated else []
    out = {"embeddings.mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    for key, value in state.items():
        if ".attn.qkv." in key:
            block, kind = key.split(".attn.qkv.")
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[f"{block.replace('blocks', 'encoder.layer')}.attention.attention.{part}.{kind}"] = third.clone()
            continue
        new = key
        for ours, theirs in names:
            new = new.replace(ours, theirs) if ours != "norm." or key.startswith("norm.") else new
        out[new] = value
    return out


def test_midnight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under timm's names (kaiko-ai/Midnight's README) and transformers': class token and patch mean, 2 x width."""
    row = small(monkeypatch, "midnight-12k", dim=384)
    vit = _families.network(row)
    state = randomised(vit)
    vit.load_state_dict(state)
    tiles = tiles_of(row)
    with torch.inference_mode():
        tokens = vit.eval().forward_features(prepared(row, tiles))
        want = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    foreign = to_transformers(state, registers=False, gated=True)
    for published in (state, foreign, {f"dinov2.{k}": v for k, v in foreign.items()}):
        save_file(published, tmp_path / "w.safetensors")
        agrees(built("midnight-12k", tmp_path / "w.safetensors"), row, want, tiles)
    every_key_counts("midnight-12k", foreign, tmp_path / "w.safetensors", skip=".*mask_token")


@pytest.mark.parametrize("name", ["hibou-b", "hibou-l"])
def test_hibou(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Under the names of HistAI/hibou and of transformers: the class token has a position, the registers have none."""
    with torch.device("meta"):
        true = _families.network(_table.rows()[name])
    inner = true.blocks[0].mlp.fc2.in_features
    assert inner == (int(true.embed_dim * 4 * 2 / 3) + 7) // 8 * 8, "width of the authors' SwiGLUFFNFused"
    row = small(monkeypatch, name)
    vit = _families.network(row)
    state = randomised(vit)
    first = torch.randn(1, 1, row.dim, generator=torch.Generator().manual_seed(11)) * 0.05
    vit.load_state_dict({**state, "cls_token": state["cls_token"] + first})
    tiles = tiles_of(row)
    with torch.inference_mode():
        want = vit.eval().forward_features(prepared(row, tiles))[:, 0]
    full = {**state, "pos_embed": torch.cat([first, state["pos_embed"]], dim=1)}
    names = [("reg_token", "register_tokens"), (".mlp.fc1.", ".mlp.w12."), (".mlp.fc2.", ".mlp.w3.")]
    upstream = {"mask_token": torch.zeros(1, row.dim)}
    for key, value in full.items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        upstream[key] = value
    foreign = to_transformers(full, registers=True, gated=True)
    for published in (upstream, foreign):
        save_file(published, tmp_path / "w.safetensors")
        agrees(built(name, tmp_path / "w.safetensors"), row, want, tiles)
    every_key_counts(name, foreign, tmp_path / "w.safetensors", skip=".*mask_token")


# ------------------------------------------------------------------------------------------ other packages


def test_musk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' package stands in as a small network of the same call; the weights are read by us, strictly."""
    from timm.models import register_model

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beit3 = nn.Linear(3, 1024)
            self.vision_head = nn.Linear(1024, 1024, bias=False)

        def forward(
            self, image: torch.Tensor, with_head: bool, out_norm: bool, ms_aug: bool, return_global: bool
        ) -> object:
            assert (with_head, out_norm, ms_aug, return_global) == (False, False, False, True)
            return self.beit3(image.mean((2, 3))), None

    def musk_large_patch16_384(pretrained: bool = False, **kwargs: object) -> Small:
        return Small()

    musk_large_patch16_384.__module__ = __name__
    register_model(musk_large_patch16_384)
    package, modeling = types.ModuleType("musk"), types.ModuleType("musk.modeling")
    package.modeling = modeling  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "musk", package)
    monkeypatch.setitem(sys.modules, "musk.modeling", modeling)
    row = _table.rows()["musk"]
    model = Small()
    save_file({**model.state_dict(), "mim_head.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    tiles = tiles_of(row)
    with torch.inference_mode():
        want = model.beit3(prepared(row, tiles).mean((2, 3)))
    agrees(built("musk", tmp_path / "w.safetensors"), row, want, tiles)
    save_file({"beit3.weight": model.beit3.weight.detach()}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="2 missing"):
        built("musk", tmp_path / "w.safetensors")


def test_plip(tmp_path: Path) -> None:
    """A CLIP of transformers from its snapshot folder: projected class token, as get_image_features gives it."""
    transformers = pytest.importorskip("transformers")
    row = _table.rows()["plip"]
    vision = {
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 224,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config={**vision, "patch_size": 32}, text_config=text, projection_dim=row.dim
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "plip")
    tiles = tiles_of(row)
    with torch.inference_mode():
        want = model.get_image_features(pixel_values=prepared(row, tiles))
    want = want if isinstance(want, torch.Tensor) else want.pooler_output
    agrees(built("plip", tmp_path), row, want, tiles)
    state = {k: v for k, v in model.state_dict().items() if k != "visual_projection.weight"}
    save_file(state, tmp_path / "plip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="visual_projection"):
        built("plip", tmp_path)


def test_hibou_by_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With trust_remote_code the model of the snapshot folder itself is run: here transformers' own with registers."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Dinov2WithRegistersModel"):
        pytest.skip("this transformers is too old")
    row = small(monkeypatch, "hibou-b")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=224, patch_size=14,
        num_register_tokens=4, use_swiglu_ffn=True,
    )  # fmt: skip
    model = transformers.Dinov2WithRegistersModel(config).eval()
    model.load_state_dict(randomised(model))
    model.save_pretrained(tmp_path / "hibou-b")
    tiles = tiles_of(row)
    with torch.inference_mode():
        want = model(pixel_values=prepared(row, tiles)).pooler_output
    agrees(built("hibou-b", tmp_path, trust_remote_code=True), row, want, tiles)
    agrees(built("hibou-b", tmp_path), row, want, tiles)  # the same file through timm


@pytest.mark.parametrize(("name", "kind"), [("quiltnet-b32", "folder"), ("omiclip", "file")])
def test_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    row = _table.rows()[name]
    vision = {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32, "head_width": 32}
    sizes = {
        "embed_dim": row.dim, "vision_cfg": vision,
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "folder":
        model = open_clip.model.CLIP(**sizes)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        whole = {"model_cfg": sizes, "preprocess_cfg": {}}
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps(whole))
        torch.save(model.state_dict(), tmp_path / name / "open_clip_pytorch_model.bin")
    else:
        sizes["multimodal_cfg"] = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        sizes["vision_cfg"] = {**vision, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        sizes["text_cfg"] = {**sizes["text_cfg"], "embed_cls": True, "output_tokens": True}
        sizes["custom_text"] = True
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "small.json").write_text(json.dumps(sizes))
        open_clip.add_model_config(tmp_path / "configs")
        monkeypatch.setitem(_table.rows(), name, row.model_copy(update={"arch": "small"}))
        model = open_clip.create_model("small", pretrained=None)
        torch.save({"state_dict": model.state_dict()}, tmp_path / f"{name}.pt")
    tiles = tiles_of(row)
    with torch.inference_mode():
        want = model.eval().encode_image(prepared(row, tiles))
    if kind == "file":
        want = model.encode_image(prepared(row, tiles), normalize=False).detach()
    agrees(built(name, tmp_path), row, want, tiles)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for name in ("plip", "quiltnet-b32", "musk"):
        row = _table.rows()[name]
        with pytest.MonkeyPatch.context() as patch:
            for module in ("transformers", "open_clip", "musk"):
                patch.setitem(sys.modules, module, None)
            with pytest.raises(EncoderError, match=rf"'{name}' needs .*{row.needs.split()[0][:5]}"):
                _foreign.network(row, tmp_path, False)


def test_no_head_is_lost_in_silence() -> None:
    """Rows with a head of their own are exactly those whose networks carry one here."""
    for name in ("keep", "conch", "conch-v1.5"):
        with torch.device("meta"):
            model = _families.network(_table.rows()[name])
        assert isinstance(model, (_remap.KeepVision, _remap.AttentionPooled))
