"""What a denoiser's input is: its channels, its size beside the picture, its scale; stated by the model file."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["LatentFormat"]


@dataclasses.dataclass(frozen=True)
class LatentFormat:
    """What the denoiser's input is: latent of the model = (latent of the VAE - shift) * scale.

    Attributes:
        channels: of the latent; 3 in pixel space.
        downscale: sides of the picture / sides of the latent; 1 is pixel space.
        scale, shift: one number, or one for each channel.
        rgb_factors, rgb_bias: RGB in [-1, 1] ~ latent of the model @ factors (channels x 3) + bias, for previews.
    """

    channels: int
    downscale: int = 8
    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0
    rgb_factors: tuple[tuple[float, ...], ...] | None = None
    rgb_bias: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "shift", "rgb_bias"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
                expected = 3 if name == "rgb_bias" else self.channels
                if len(value) != expected:
                    raise ValueError(f"the latent format's {name} has {len(value)} numbers, expected {expected}")
        if self.rgb_factors is not None:
            object.__setattr__(self, "rgb_factors", tuple(tuple(row) for row in self.rgb_factors))
            if len(self.rgb_factors) != self.channels or any(len(row) != 3 for row in self.rgb_factors):
                raise ValueError(f"the latent format's rgb_factors have to be {self.channels} rows of 3 numbers")

    @property
    def pixel_space(self) -> bool:
        """Whether the model works on pictures themselves, in [-1, 1]."""
        return self.downscale == 1

    def _per_channel(self, value: float | tuple[float, ...], like: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)

    def to_model(self, latents: Tensor) -> Tensor:
        """Latents of the VAE (b, c, h, w) -> latents of the model."""
        return (latents - self._per_channel(self.shift, latents)) * self._per_channel(self.scale, latents)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents of the model (b, c, h, w) -> latents of the VAE."""
        return latents / self._per_channel(self.scale, latents) + self._per_channel(self.shift, latents)
