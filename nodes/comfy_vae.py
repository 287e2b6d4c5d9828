"""Autoencoders as VAEs of the host, from model files and from files of their own."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import torch
from torch import Tensor

from ..zigma.autoencoder import Autoencoder, autoencoder_from_state_dict, load_autoencoder
from ..zigma.autoencoder_kl import AutoencoderKL
from ..zigma.checkpoint import CheckpointFile

__all__ = ["build_vae", "load_vae", "pixel_space_vae"]

# What the host builds by itself, whatever the channels of the latent.
STOCK_WIDTHS = ((128, 256, 512, 512), (128, 256, 512))


def build_vae(file: CheckpointFile):
    """A host VAE with the autoencoder of a file, the host's own for models in pixel space, or None if there is none."""
    if file.latent.pixel_space:
        return pixel_space_vae()
    if file.vae_state is None:
        return None
    # float32 like the command line's: the host picks the dtype it computes in.
    return _host_vae(autoencoder_from_state_dict({key: value.float() for key, value in file.vae_state.items()}))


def pixel_space_vae():
    """The host VAE of models without an autoencoder: a picture in [0, 1] is a latent in [-1, 1], and back."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


def load_vae(path: Path):
    """A host VAE from a file: an autoencoder alone or inside a model, in TAESD's layout or AutoencoderKL's two.

    Raises:
        ValueError: it holds none of these. FileNotFoundError: there is no such file.
    """
    return _host_vae(load_autoencoder(path))


def _host_vae(autoencoder: Autoencoder):
    state = dict(autoencoder.state_dict())
    vae = _host_kl(autoencoder, state) if isinstance(autoencoder, AutoencoderKL) else comfy.sd.VAE(sd=state)
    vae.throw_exception_if_invalid()
    return vae


def _host_kl(autoencoder: AutoencoderKL, state: dict[str, Tensor]):
    """The host knows the sizes of Stable Diffusion's alone: others are described to it, from the tensors."""
    levels = autoencoder.encoder.down
    widths = tuple(level.block[0].conv1.out_channels for level in levels)
    blocks, channels = len(levels[0].block), autoencoder.latent_channels
    if widths in STOCK_WIDTHS and blocks == 2 and channels <= 16:
        return comfy.sd.VAE(sd=state)
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"use another VAE: the channels of this one, {widths}, are no multiples of the first, and the host builds "
            "no such AutoencoderKL"
        )
    config = {
        "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths], "num_res_blocks": blocks,
        "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if f"{name}.weight" not in state:  # the host's class has these always
            state |= {f"{name}.weight": torch.eye(size)[:, :, None, None], f"{name}.bias": torch.zeros(size)}
    vae = comfy.sd.VAE(sd=state, config={"params": {"ddconfig": config, "embed_dim": channels}})
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = channels, autoencoder.downscale, autoencoder.downscale
    return vae
