"""A small autoencoder between pictures and latents, in the layout of TAESD (64 wide, 8x smaller, any channel count).

The parameter names are that layout's, so that the same file works here and in a host's stock VAE loader.
Its decoder first squashes latents to (-3, 3) by 3*tanh(z/3): a latent with larger values does not survive.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .autoencoder_kl import AutoencoderKL, differing_keys, is_autoencoder_kl
from .pickle_reader import TensorReference, TorchFile

__all__ = ["Autoencoder", "TinyAutoencoder", "autoencoder_from_state_dict", "load_autoencoder"]

WIDTH = 64
DOWNSCALE = 8


class _Squash(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(z / 3)


class _Block(nn.Module):
    """Residual block of three 3x3 convolutions at constant width."""

    def __init__(self, conv) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + x)


def _encoder(conv, latent_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [conv(3, WIDTH), _Block(conv)]
    for _ in range(3):
        layers += [conv(WIDTH, WIDTH, stride=2, bias=False), _Block(conv), _Block(conv), _Block(conv)]
    return nn.Sequential(*layers, conv(WIDTH, latent_channels))


def _decoder(conv, latent_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [_Squash(), conv(latent_channels, WIDTH), nn.ReLU()]
    for _ in range(3):
        layers += [_Block(conv), _Block(conv), _Block(conv)]
        layers += [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*layers, _Block(conv), conv(WIDTH, 3))


class TinyAutoencoder(nn.Module):
    """Pictures (b, 3, H, W) in [-1, 1] <-> latents (b, C, H/8, W/8).

    Args:
        latent_channels: C.
        operations: where Conv2d comes from (a host passes its own).
        device, dtype: of the parameters.
    """

    def __init__(self, latent_channels: int = 4, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()

        def conv(c_in: int, c_out: int, **options) -> nn.Module:
            return operations.Conv2d(c_in, c_out, 3, padding=1, device=device, dtype=dtype, **options)

        self.latent_channels = latent_channels
        self.taesd_encoder = _encoder(conv, latent_channels)
        self.taesd_decoder = _decoder(conv, latent_channels)
        # Part of the layout: the latent outside is (latent inside) / vae_scale + vae_shift.
        self.vae_scale = nn.Parameter(torch.ones((), device=device, dtype=dtype), requires_grad=False)
        self.vae_shift = nn.Parameter(torch.zeros((), device=device, dtype=dtype), requires_grad=False)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (b, 3, H, W) in [-1, 1] -> latents (b, C, H/8, W/8). H and W have to be multiples of 8."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % DOWNSCALE or images.shape[3] % DOWNSCALE:
            raise ValueError(
                f"got pictures of shape {tuple(images.shape)}, expected (batch, 3, height, width) with sides divisible "
                f"by {DOWNSCALE}: crop or resize them first"
            )
        return self.taesd_encoder(images * 0.5 + 0.5) / self.vae_scale + self.vae_shift

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (b, C, h, w) -> pictures (b, 3, 8h, 8w), clamped to [-1, 1]."""
        return self.decode_raw(latents).clamp(-1, 1)

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        """As `decode` without the clamp, which would stop gradients in training."""
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"got latents of shape {tuple(latents.shape)}, expected (b, {self.latent_channels}, height, width): "
                "these belong to another autoencoder"
            )
        return self.taesd_decoder((latents - self.vae_shift) * self.vae_scale) * 2 - 1

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], *, operations=nn, device=None) -> TinyAutoencoder:
        """The autoencoder of these tensors; their dtype is kept, the channel count is read off them.

        Raises:
            ValueError: the tensors are no autoencoder of this layout; names the first keys that differ.
        """
        first = state.get("taesd_decoder.1.weight")
        if first is None or first.dim() != 4:
            raise ValueError(
                "got tensors without 'taesd_decoder.1.weight', expected an autoencoder in TAESD layout: "
                "pass the file of such a VAE"
            )
        model = cls(first.shape[1], operations=operations, device="meta", dtype=first.dtype)
        neutral = {"vae_scale": torch.ones((), dtype=first.dtype), "vae_shift": torch.zeros((), dtype=first.dtype)}
        state = {**neutral, **state}
        wrong = differing_keys(model.state_dict(), state)
        if wrong:
            raise ValueError(
                f"got an autoencoder that differs from the TAESD layout in {len(wrong)} tensors "
                f"({', '.join(wrong[:4])}): pass a file in that layout, 64 wide"
            )
        model.load_state_dict(state, assign=True)
        return model.to(device) if device is not None else model


Autoencoder = TinyAutoencoder | AutoencoderKL


def autoencoder_from_state_dict(state: Mapping[str, torch.Tensor]) -> Autoencoder:
    """The autoencoder of these tensors: TAESD layout, or Stable Diffusion's in its original layout or diffusers'.

    Raises:
        ValueError: they are none of these.
    """
    return (AutoencoderKL if is_autoencoder_kl(state) else TinyAutoencoder).from_state_dict(state)


def load_autoencoder(path: str | os.PathLike, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder of a file, in float32 and frozen.

    Args:
        path: .safetensors, or .pt, .pth, .ckpt, .bin as torch.save wrote it (nothing in it is executed); the
            autoencoder alone, under "vae." in one of our model files, or under "first_stage_model." in a whole model.
        device: where to put it.

    Raises:
        ValueError: it holds no autoencoder, or one of another kind. FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no autoencoder at {path}: expected a VAE file, .safetensors or of torch.save")
    try:
        state = _autoencoder_tensors(path)
        model = autoencoder_from_state_dict({key: value.float() for key, value in state.items()})
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is unusable as an autoencoder: {error}") from error
    return model.to(device).eval().requires_grad_(False)


_PREFIXES = ("vae.", "first_stage_model.")


def _autoencoder_tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, framework="pt") as file:
            chosen = _without_prefix(list(file.keys()))
            return {name: file.get_tensor(key) for key, name in chosen.items()}
    with TorchFile(path) as file:
        held = file.contents
        held = held["state_dict"] if isinstance(held, dict) and isinstance(held.get("state_dict"), dict) else held
        if not isinstance(held, dict):
            raise ValueError("it holds no dictionary of tensors")
        chosen = _without_prefix([key for key, value in held.items() if isinstance(value, TensorReference)])
        return {name: file.tensor(held[key]) for key, name in chosen.items()}


def _without_prefix(keys: list[str]) -> dict[str, str]:
    """The keys of the autoencoder among these, each with its bare name."""
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in keys):
            return {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    return {key: key for key in keys}
