"""Latents to pictures."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..zigma.sheet import enlarge, to_pictures
from .schema import schema


class ZigMaVAEDecode(io.ComfyNode):
    """The host's VAE decoding, with a size that one can see."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaVAEDecode",
            display_name="ZigMa VAE Decode",
            description="Decodes a latent to pictures, and enlarges small ones for looking at. With enlarge 1 it "
            "equals the stock VAE Decode.",
            inputs=[
                io.Latent.Input("samples", tooltip="From ZigMa Sampler or KSampler."),
                io.Vae.Input("vae", tooltip="The VAE of the ZigMa Model Loader, or the one that the model was "
                "trained on."),
                io.Int.Input(
                    "enlarge", default=1, min=1, max=16,
                    tooltip="How many times to enlarge the picture, by Lanczos resampling; 1 leaves it as it is.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The pictures.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, samples, vae, enlarge: int) -> io.NodeOutput:
        """Check the channels, decode, enlarge."""
        latent = samples["samples"]
        channels = getattr(vae, "latent_channels", latent.shape[1])
        if latent.shape[1] != channels:
            raise ValueError(
                f"got a latent of {latent.shape[1]} channels and a VAE for {channels}: connect the VAE of the ZigMa "
                "Model Loader that drew this latent"
            )
        images = vae.decode(latent)
        return io.NodeOutput(images if enlarge == 1 else enlarged(images, enlarge))


def enlarged(images: torch.Tensor, factor: int) -> torch.Tensor:
    """IMAGE (b, h, w, 3) in [0, 1] -> (b, factor h, factor w, 3)."""
    large = []
    for picture in to_pictures(images[..., :3].movedim(-1, 1) * 2 - 1):
        picture = enlarge(picture, factor)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        large.append(pixels.view(picture.height, picture.width, 3).float() / 255)
    return torch.stack(large).to(images)
