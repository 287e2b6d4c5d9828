"""The small autoencoder: shapes, its file layout, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from zigma.autoencoder import TinyAutoencoder, load_autoencoder
from zigma.autoencoder_kl import AutoencoderKL


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return TinyAutoencoder(5).eval()


def test_pictures_become_latents_an_eighth_as_large_and_come_back(autoencoder):
    latents = autoencoder.encode(torch.rand(2, 3, 16, 24) * 2 - 1)
    assert latents.shape == (2, 5, 2, 3)
    images = autoencoder.decode(latents * 100)
    assert images.shape == (2, 3, 16, 24) and images.abs().max() <= 1


def test_the_layout_is_that_of_stock_files(autoencoder):
    shapes = {key: tuple(value.shape) for key, value in autoencoder.state_dict().items()}
    assert shapes["vae_scale"] == shapes["vae_shift"] == ()
    assert shapes["taesd_encoder.0.weight"] == (64, 3, 3, 3) and shapes["taesd_encoder.14.weight"] == (5, 64, 3, 3)
    assert shapes["taesd_decoder.1.weight"] == (64, 5, 3, 3) and shapes["taesd_decoder.19.weight"] == (3, 64, 3, 3)
    assert "taesd_encoder.2.bias" not in shapes and shapes["taesd_encoder.1.conv.4.weight"] == (64, 64, 3, 3)


def test_scale_and_shift_apply_outside_the_network(autoencoder):
    state = dict(autoencoder.state_dict())
    moved = TinyAutoencoder.from_state_dict({**state, "vae_scale": torch.tensor(2.0), "vae_shift": torch.tensor(0.5)})
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(moved.encode(images), autoencoder.encode(images) / 2 + 0.5)
    torch.testing.assert_close(moved.decode(moved.encode(images)), autoencoder.decode(autoencoder.encode(images)))
    bare = {key: value for key, value in state.items() if not key.startswith("vae_")}
    latents = torch.randn(1, 5, 1, 1)
    assert torch.equal(TinyAutoencoder.from_state_dict(bare).decode(latents), autoencoder.decode(latents))


def test_wrong_inputs_and_files_are_named(autoencoder):
    with pytest.raises(ValueError, match="sides divisible by 8"):
        autoencoder.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match=r"expected \(b, 5, height, width\)"):
        autoencoder.decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"without 'taesd_decoder\.1\.weight'"):
        TinyAutoencoder.from_state_dict({})
    state = dict(autoencoder.state_dict())
    with pytest.raises(ValueError, match=r"differs from the TAESD layout in 1 tensors \(extra"):
        TinyAutoencoder.from_state_dict({**state, "extra": torch.zeros(1)})


# --- the autoencoder of Stable Diffusion


@pytest.fixture(scope="module")
def recorded(root):
    return load_file(root / "tests/data/autoencoder_kl.safetensors")


def original_names(state):
    """The recorded layout (that of diffusers) under the original names, written down for these sizes."""
    names = {
        "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.",
        "mid_block.attentions.0.": "mid.attn_1.", "down_blocks.0.resnets.0.": "down.0.block.0.",
        "down_blocks.1.resnets.0.": "down.1.block.0.", "down_blocks.0.downsamplers.0.": "down.0.downsample.",
        "up_blocks.0.resnets.0.": "up.1.block.0.", "up_blocks.0.resnets.1.": "up.1.block.1.",
        "up_blocks.1.resnets.0.": "up.0.block.0.", "up_blocks.1.resnets.1.": "up.0.block.1.",
        "up_blocks.0.upsamplers.0.": "up.1.upsample.", "group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.",
        "to_v.": "v.", "to_out.0.": "proj_out.", "conv_shortcut.": "nin_shortcut.", "conv_norm_out.": "norm_out.",
    }  # fmt: skip
    renamed = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = value[:, :, None, None] if "attn_1" in key and value.dim() == 2 else value
    return renamed


@pytest.mark.parametrize("layout", ["diffusers", "original", "whole model"])
def test_stable_diffusions_autoencoder_gives_its_recorded_output(recorded, layout, tmp_path):
    state = {key.removeprefix("model."): value for key, value in recorded.items() if key.startswith("model.")}
    if layout != "diffusers":
        state = original_names(state)
    path = tmp_path / "vae.safetensors"
    if layout == "whole model":
        state = {f"first_stage_model.{key}": value for key, value in state.items()}
        state["model.diffusion_model.x"] = torch.zeros(1)
        path = tmp_path / "whole.ckpt"
        torch.save({"state_dict": state, "global_step": 3}, path)
    else:
        save_file(state, path)
    model = load_autoencoder(path)
    assert isinstance(model, AutoencoderKL) and model.downscale == 2 and not next(model.parameters()).requires_grad
    mean = model.encode(recorded["images"])
    torch.testing.assert_close(mean, recorded["mean"], atol=1e-4, rtol=1e-4)
    expected = recorded["decoded"].clamp(-1, 1)
    torch.testing.assert_close(model.decode(recorded["latents"]), expected, atol=1e-4, rtol=1e-4)
    draws = torch.stack([model.encode(recorded["images"], torch.Generator().manual_seed(i)) for i in range(200)])
    torch.testing.assert_close(draws.std(0).mean(), recorded["std"].mean(), rtol=0.02, atol=0)


def test_the_default_sizes_are_stable_diffusions():
    model = AutoencoderKL(device="meta")
    assert sum(p.numel() for p in model.parameters()) == 83_653_863 and len(model.state_dict()) == 248
    shortcut = model.state_dict()["decoder.up.0.block.0.nin_shortcut.weight"]
    assert model.downscale == 8 and shortcut.shape == (128, 256, 1, 1)


def test_files_that_are_no_autoencoder_are_named(recorded, tmp_path, autoencoder):
    state = {key.removeprefix("model."): value for key, value in recorded.items() if key.startswith("model.")}
    with pytest.raises(ValueError, match=r"differs from Stable Diffusion's in 1 tensors \(quant_conv\.bias"):
        AutoencoderKL.from_state_dict({key: value for key, value in state.items() if key != "quant_conv.bias"})
    with pytest.raises(ValueError, match=r"without encoder\.down and decoder\.conv_in"):
        AutoencoderKL.from_state_dict({"decoder.conv_in.weight": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match="no autoencoder at"):
        load_autoencoder(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors is unusable as an autoencoder: .*taesd_decoder"):
        load_autoencoder(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="unusable"):
        load_autoencoder(tmp_path / "b.safetensors")
    model = AutoencoderKL.from_state_dict(state)
    with pytest.raises(ValueError, match="sides divisible by 2"):
        model.encode(torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match=r"expected \(b, 4, height, width\)"):
        model.decode(torch.zeros(1, 3, 4, 4))
    save_file(autoencoder.state_dict(), tmp_path / "tiny.safetensors")
    assert isinstance(load_autoencoder(tmp_path / "tiny.safetensors"), TinyAutoencoder)
