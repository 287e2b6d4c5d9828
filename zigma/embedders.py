"""What surrounds the blocks: patches, times, labels and places into tokens, and tokens into velocities.

Glossary as in model.py. Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT), arXiv 2212.09748.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .mixer import is_plain, read_weights

__all__ = ["FinalLayer", "LabelEmbedder", "PatchEmbed", "TimestepEmbedder", "sine_positions"]


class PatchEmbed(nn.Module):
    """Patches of p x p latent pixels -> tokens in raster order, frame by frame."""

    def __init__(
        self, in_channels: int, embed_dim: int, patch_size: int, *, operations=nn, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.proj = operations.Conv2d(in_channels, embed_dim, patch_size, patch_size, device=device, dtype=dtype)
        self._conv, self._read_weights = operations.Conv2d, getattr(operations, "read_weights", read_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, (h/p)(w/p), d), or (b, f, c, h, w) -> (b, f (h/p)(w/p), d)."""
        frames = x.shape[1] if x.dim() == 5 else 1
        x = x if x.dim() == 4 else rearrange(x, "b f c h w -> (b f) c h w")
        return rearrange(self._tokens(x), "(b f) l d -> b (f l) d", f=frames)

    def _tokens(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, l, d). A convolution that steps by its own size is a product, which lies in rows."""
        if not is_plain(self.proj, self._conv):
            return rearrange(self.proj(x), "b d h w -> b (h w) d")
        weight, bias = self._read_weights(self.proj, x)
        i, j = weight.shape[-2:]
        rows = rearrange(x, "b c (h i) (w j) -> (b h w) (c i j)", i=i, j=j)
        tokens = x.shape[-2] // i * (x.shape[-1] // j)
        return rearrange(F.linear(rows, weight.flatten(1), bias), "(b l) d -> b l d", l=tokens)


def _time_frequencies(count: int) -> list[float]:
    """exp(-ln(10000) k / count) in float32, k = 0 ... count - 1, the same on every processor.

    The last bit of torch.exp depends on the processor, and moves an angle near 1000 by 1e-4, the published outputs by
    2e-4. Here exponents are rounded to float32 as published and their exponentials correctly, but for k = 12 of 128:
    the machine of the published outputs rounded that one, 0.48 of a bit away, up.
    """
    exponents = -math.log(10000) * torch.arange(count, dtype=torch.float32, device="cpu") / count
    exact = [math.exp(exponent) for exponent in exponents.tolist()]
    frequencies = torch.tensor(exact, dtype=torch.float32, device="cpu")
    if count == 128:
        frequencies[12] = torch.nextafter(frequencies[12], torch.ones_like(frequencies[12]))
    return frequencies.tolist()


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 t, cosines first, then a small network: (b,) -> (b, d)."""

    FREQUENCIES = 128

    def __init__(self, embed_dim: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self._frequencies = _time_frequencies(self.FREQUENCIES)
        self.mlp = nn.Sequential(
            operations.Linear(2 * self.FREQUENCIES, embed_dim, **options),
            nn.SiLU(),
            operations.Linear(embed_dim, embed_dim, **options),
        )

    def forward(self, t: Tensor, like: Tensor) -> Tensor:
        """Times (b,) in [0, 1] -> (b, d), computed in the dtype of `like`."""
        frequencies = torch.tensor(self._frequencies, device=t.device, dtype=torch.float32)
        angles = 1000 * t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(like.dtype))


class LabelEmbedder(nn.Module):
    """One learned row per class; the published model has no row for "no class", hence no guidance."""

    def __init__(self, num_classes: int, embed_dim: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        self.embedding_table = operations.Embedding(num_classes, embed_dim, device=device, dtype=dtype)

    def forward(self, labels: Tensor, like: Tensor) -> Tensor:
        """Labels (b,) -> (b, d) in the dtype of `like`."""
        return self.embedding_table(labels).to(like.dtype)


class FinalLayer(nn.Module):
    """Tokens -> the p*p*c velocities of their patch, features in the order (row, column, channel)."""

    def __init__(self, embed_dim: int, out_features: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        self.linear = operations.Linear(embed_dim, out_features, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, p*p*c)."""
        return self.linear(F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6).to(tokens.dtype))


def sine_positions(height: int, width: int, embed_dim: int) -> Tensor:
    """The fixed embedding of use_pe=1 for a grid of height x width tokens: (1, height * width, d) float32.

    The column's sines and cosines first, then the row's, each d/2 wide: [sin(u w_k), cos(u w_k)] with
    w_k = 10000^(-k / (d/4)), k = 0 ... d/4 - 1 (MAE, arXiv 2111.06377, as DiT uses it).
    """
    quarter = embed_dim // 4
    frequencies = 10000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(places: Tensor) -> Tensor:
        angles = places.reshape(-1, 1).double() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([axis(column), axis(row)], dim=1).float()[None]
