"""The small autoencoder: shapes, its file layout, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from zigma.autoencoder import TinyAutoencoder


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
