"""The way back: the noise that a picture comes from, and the picture from that noise again."""

from __future__ import annotations

import pytest
import torch

from zigma.assets import available_models
from zigma.checkpoint import load_bundle
from zigma.guidance import classifier_free
from zigma.sampling import SamplingSettings, sample
from zigma.solvers import solve_ode


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of pictures in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(available_models()["demo"])


@torch.no_grad()
def test_pictures_survive_inversion_at_fifty_heun_steps(bundle):
    """Drawn pictures are encoded, carried to noise and back; the VAE stands on both sides."""
    prompts = ["fox face", "sunflower"]
    drawn = sample(bundle, prompts, settings=SamplingSettings(steps=20, guidance=2.0))
    latents = bundle.latent.to_model(bundle.autoencoder.encode(drawn))
    velocity = classifier_free(bundle.model, bundle.text_encoder.encode(prompts), None, 1.0)
    noise = solve_ode(velocity, latents, 50, "heun", t0=1.0, t1=0.0)
    again = solve_ode(velocity, noise, 50, "heun")
    pictures, expected = (bundle.autoencoder.decode(bundle.latent.to_vae(z)) for z in (again, latents))
    assert psnr(pictures, expected) >= 40
    assert 0.5 < noise.std() < 1.5  # it is noise, not the picture
