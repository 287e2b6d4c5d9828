"""The autoencoder of Stable Diffusion (AutoencoderKL), whose latents all released ZigMa models work on.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752, section 3.1 and
appendix G. Parameter names are those of its original files; the layout of diffusers is renamed on reading. Sizes are
read off the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["AutoencoderKL", "differing_keys", "is_autoencoder_kl"]

GROUPS, EPS = 32, 1e-6


class _ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, operations, options: dict) -> None:
        super().__init__()
        self.norm1 = operations.GroupNorm(GROUPS, c_in, eps=EPS, **options)
        self.conv1 = operations.Conv2d(c_in, c_out, 3, padding=1, **options)
        self.norm2 = operations.GroupNorm(GROUPS, c_out, eps=EPS, **options)
        self.conv2 = operations.Conv2d(c_out, c_out, 3, padding=1, **options)
        self.nin_shortcut = operations.Conv2d(c_in, c_out, 1, **options) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Attention(nn.Module):
    """One head over all places; its projections are 1x1 convolutions."""

    def __init__(self, channels: int, operations, options: dict) -> None:
        super().__init__()
        self.norm = operations.GroupNorm(GROUPS, channels, eps=EPS, **options)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, operations.Conv2d(channels, channels, 1, **options))

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        q, k, v = (rearrange(layer(u), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class _Middle(nn.Module):
    def __init__(self, channels: int, operations, options: dict) -> None:
        super().__init__()
        self.block_1 = _ResnetBlock(channels, channels, operations, options)
        self.attn_1 = _Attention(channels, operations, options)
        self.block_2 = _ResnetBlock(channels, channels, operations, options)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Resample(nn.Module):
    """Half the sides, padded right and below only as published; or twice the sides."""

    def __init__(self, channels: int, up: bool, operations, options: dict) -> None:
        super().__init__()
        self.up = up
        self.conv = operations.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=int(up), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    def __init__(self, widths: list[int], resample: str | None, operations, options: dict) -> None:
        super().__init__()
        self.block = nn.ModuleList(_ResnetBlock(a, b, operations, options) for a, b in pairwise(widths))
        if resample:
            self.add_module(resample, _Resample(widths[-1], resample == "upsample", operations, options))
        self._resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self._resample)(x) if self._resample else x


class _Encoder(nn.Module):
    def __init__(self, widths: list[int], blocks: int, latent: int, operations, options: dict) -> None:
        super().__init__()
        self.conv_in = operations.Conv2d(3, widths[0], 3, padding=1, **options)
        last, levels = widths[0], []
        for level, width in enumerate(widths):
            resample = "downsample" if level < len(widths) - 1 else None
            levels.append(_Level([last] + [width] * blocks, resample, operations, options))
            last = width
        self.down = nn.ModuleList(levels)
        self.mid = _Middle(last, operations, options)
        self.norm_out = operations.GroupNorm(GROUPS, last, eps=EPS, **options)
        self.conv_out = operations.Conv2d(last, 2 * latent, 3, padding=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, widths: list[int], blocks: int, latent: int, operations, options: dict) -> None:
        super().__init__()
        last = widths[-1]
        self.conv_in = operations.Conv2d(latent, last, 3, padding=1, **options)
        self.mid = _Middle(last, operations, options)
        levels: list[nn.Module] = []
        for level, width in reversed(list(enumerate(widths))):  # up.0 is the largest picture, and comes last
            resample = "upsample" if level else None
            levels.insert(0, _Level([last] + [width] * (blocks + 1), resample, operations, options))
            last = width
        self.up = nn.ModuleList(levels)
        self.norm_out = operations.GroupNorm(GROUPS, last, eps=EPS, **options)
        self.conv_out = operations.Conv2d(last, 3, 3, padding=1, **options)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """Pictures (b, 3, H, W) in [-1, 1] <-> latents (b, C, H/f, W/f), unscaled; f is 8 for Stable Diffusion.

    Args:
        widths: channels at each resolution, the largest picture first; f is 2 ** (len(widths) - 1).
        blocks: residual blocks per resolution of the encoder (the decoder has one more).
        latent_channels: C.
        quantised: with the 1x1 convolutions round the latent that Stable Diffusion has.
        operations, device, dtype: where the layers come from, and of the parameters.
    """

    def __init__(
        self, widths: tuple[int, ...] = (128, 256, 512, 512), blocks: int = 2, latent_channels: int = 4, *,
        quantised: bool = True, operations=nn, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.latent_channels, self.downscale = latent_channels, 2 ** (len(widths) - 1)
        self.encoder = _Encoder(list(widths), blocks, latent_channels, operations, options)
        self.decoder = _Decoder(list(widths), blocks, latent_channels, operations, options)
        c = latent_channels
        self.quant_conv = operations.Conv2d(2 * c, 2 * c, 1, **options) if quantised else nn.Identity()
        self.post_quant_conv = operations.Conv2d(c, c, 1, **options) if quantised else nn.Identity()

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (b, C, H/f, W/f): the mean of their distribution, or a sample where there is a generator.

        Raises:
            ValueError: for pictures of other channels, or sides that f does not divide.
        """
        f = self.downscale
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(
                f"got pictures of shape {tuple(images.shape)}, expected (batch, 3, height, width) with sides divisible "
                f"by {f}: crop or resize them first"
            )
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
        return mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, C, h, w) -> pictures (b, 3, f h, f w), clamped to [-1, 1]."""
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"got latents of shape {tuple(latents.shape)}, expected (b, {self.latent_channels}, height, width): "
                "these belong to another autoencoder"
            )
        return self.decoder(self.post_quant_conv(latents)).clamp(-1, 1)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, operations=nn, device=None) -> AutoencoderKL:
        """The autoencoder of these tensors, in the original layout or that of diffusers; their dtype is kept.

        Raises:
            ValueError: the tensors are no such autoencoder; names the first keys that differ.
        """
        state = _original_names(state)
        levels = 1 + max((int(m.group(1)) for k in state if (m := re.match(r"encoder\.down\.(\d+)\.", k))), default=-1)
        first = [state.get(f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)]
        last = state.get("decoder.conv_in.weight")
        if not levels or last is None or any(tensor is None for tensor in first):
            raise ValueError("got tensors without encoder.down and decoder.conv_in, expected a Stable Diffusion VAE")
        blocks = 1 + max(int(m.group(1)) for k in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", k)))
        model = cls(
            tuple(tensor.shape[0] for tensor in first), blocks, last.shape[1], quantised="quant_conv.weight" in state,
            operations=operations, device="meta", dtype=last.dtype,
        )  # fmt: skip
        wrong = differing_keys(model.state_dict(), state)
        if wrong:
            raise ValueError(
                f"got an autoencoder that differs from Stable Diffusion's in {len(wrong)} tensors "
                f"({', '.join(wrong[:4])}): pass a VAE of SD 1.x, in its original layout or that of diffusers"
            )
        model.load_state_dict(state, assign=True)
        return model.to(device) if device is not None else model


def differing_keys(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Keys that only one of the two has, then those whose shapes differ."""
    return sorted(set(own) ^ set(state)) + [k for k in own if k in state and own[k].shape != state[k].shape]


def is_autoencoder_kl(state: Mapping[str, Tensor]) -> bool:
    """Whether these look like the tensors of such an autoencoder, in either layout."""
    return any(key.endswith("decoder.conv_in.weight") for key in state)


_RENAMED = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."), (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."), (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."), (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."), (r"\.group_norm\.", ".norm."), (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."), (r"\.(?:to_v|value)\.", ".v."), (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out."),
)  # fmt: skip


def _original_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the original names: renamed from diffusers' layout."""
    ups = {int(match.group(1)) for key in state if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))}
    renamed = {}
    for key, value in state.items():
        if not key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            continue  # the loss of the training, an EMA counter
        for pattern, name in _RENAMED:
            key = re.sub(pattern, name, key)
        match = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers\.0)\.(.*)", key)
        if match:  # diffusers counts them as they are computed, the original by resolution
            part = "block" if match.group(2) == "resnets" else "upsample"
            key = f"decoder.up.{len(ups) - 1 - int(match.group(1))}.{part}.{match.group(3)}"
        if ".attn_1." in key and key.endswith("weight") and value.dim() == 2:
            value = value[:, :, None, None]
        renamed[key] = value
    return renamed
