"""The autoencoder of a model file as a VAE of the host."""

from __future__ import annotations

import comfy.sd
import torch

from ..zigma.checkpoint import CheckpointFile

__all__ = ["build_vae"]


def build_vae(file: CheckpointFile):
    """A host VAE with the autoencoder of a file, the host's own for models in pixel space, or None if there is none."""
    if file.latent.pixel_space:
        return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    if file.vae_state is None:
        return None
    # float32 like the command line's: the host picks the dtype it computes in.
    vae = comfy.sd.VAE(sd={key: value.float() for key, value in file.vae_state.items()})
    vae.throw_exception_if_invalid()
    return vae
