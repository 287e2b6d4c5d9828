"""Latents to pictures."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..zigma.sheet import enlarge
from .pictures import as_image, as_pictures
from .schema import schema
from .vae import missing_vae

OVERLAP = 64  # pixels that neighbouring tiles share, as in the stock node's default


class ZigMaVAEDecode(io.ComfyNode):
    """The host's VAE decoding, with a size that one can see."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaVAEDecode",
            display_name="ZigMa VAE Decode",
            description="Decodes a latent to pictures, that of a video to its frames, and enlarges small ones for "
            "looking at. With enlarge 1 and tile_size 0 it equals the stock VAE Decode.",
            inputs=[
                io.Latent.Input("samples", tooltip="From ZigMa Sampler or KSampler."),
                io.Vae.Input("vae", tooltip="The VAE of the ZigMa Model Loader, or the one that the model was "
                "trained on."),
                io.Int.Input(
                    "enlarge", default=1, min=1, max=16,
                    tooltip="How many times to enlarge the picture, by Lanczos resampling; 1 leaves it as it is.",
                ),
                io.Int.Input(
                    "tile_size", default=0, min=0, max=4096, step=32, optional=True,
                    tooltip="Decode in overlapping tiles of this many pixels, which takes less memory for large "
                    "pictures; 0 decodes each picture whole.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The pictures; of videos their frames, one video after another.")],
            search_aliases=["vae decode", "latent to image", "tiled decode", "decode video", "upscale preview"],
        )  # fmt: skip

    @classmethod
    def execute(cls, samples, vae, enlarge: int, tile_size: int = 0) -> io.NodeOutput:
        """Check the channels, decode, enlarge."""
        if vae is None:
            raise missing_vae()
        latent = samples["samples"]
        channels = getattr(vae, "latent_channels", latent.shape[1])
        if latent.shape[1] != channels:
            raise ValueError(
                "connect the VAE of the ZigMa Model Loader that drew this latent, or the one that the model was "
                f"trained on: got a latent of {latent.shape[1]} channels and a VAE for {channels}"
            )
        if latent.ndim == 5 and getattr(vae, "latent_dim", 2) == 2:
            latent = latent.movedim(2, 1).flatten(0, 1)  # (b, c, f, h, w) -> (b f, c, h, w)
        images = decoded(vae, latent, tile_size)
        if images.ndim == 5:  # of the host's own VAEs for videos
            images = images.flatten(0, 1)
        return io.NodeOutput(images if enlarge == 1 else enlarged(images, enlarge))


def decoded(vae, latent: torch.Tensor, tile_size: int) -> torch.Tensor:
    """The host's decoding of a latent (b, c, h, w), whole or in tiles of `tile_size` pixels: IMAGE (b, h, w, 3).

    Raises:
        ValueError: for tiles too small to overlap.
    """
    scale = vae.spacial_compression_decode()
    if not tile_size or tile_size >= scale * max(latent.shape[-2:]):
        return vae.decode(latent)  # short of memory it turns to tiles by itself
    if tile_size < 8 * scale:
        raise ValueError(f"set tile_size to 0, or to {8 * scale} or more: tiles of {tile_size} pixels are too small")
    tile, overlap = tile_size // scale, min(OVERLAP, tile_size // 4) // scale
    return vae.decode_tiled(latent, tile_x=tile, tile_y=tile, overlap=overlap)


def enlarged(images: torch.Tensor, factor: int) -> torch.Tensor:
    """IMAGE (b, h, w, 3) in [0, 1] -> (b, factor h, factor w, 3)."""
    return torch.cat([as_image(enlarge(picture, factor)) for picture in as_pictures(images)]).to(images)
