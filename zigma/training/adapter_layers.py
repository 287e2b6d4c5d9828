"""What an adapter adds to one linear layer: LoRA and LoKr, as activations and as weights.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. LoKr: Yeh et al., "Navigating
Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv 2309.14859, section 3.

Glossary: r rank   i, o inputs and outputs of a layer, whose weight is (o, i)   i = i1 i2, o = o1 o2 their parts in LoKr
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mixer import at_least_float32

__all__ = ["LAYERS", "LoKr", "LoRA", "factorization"]


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """size = m n with m <= n, and m the largest possible up to `factor` (-1: no bound), as LyCORIS has it.

    >>> factorization(128), factorization(128, 4), factorization(127)
    ((8, 16), (4, 32), (1, 127))
    """
    bound = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    m = next(m for m in range(bound, 0, -1) if size % m == 0)
    return m, size // m


class AdapterLayer(nn.Module):
    """The change of one layer, with parameters that are at least float32 whatever the layer's are.

    Attributes:
        scale: what the product of the factors is multiplied by.
        alpha: that a file states, from which its readers come to the same scale.
    """

    def __init__(self, alpha: float, scale: float, dropout: float) -> None:
        super().__init__()
        self.alpha, self.scale, self.dropout = alpha, scale, dropout

    def factors(self) -> dict[str, nn.Parameter]:
        """The parameters, by what their keys in a file end in."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """The change of the weight (o, i) at strength 1."""
        raise NotImplementedError

    def product(self, x: Tensor, strength: float) -> Tensor:
        """x (..., i) -> strength * x delta^T (..., o), without the delta itself."""
        raise NotImplementedError

    def forward(self, x: Tensor, strength: float, training: bool) -> Tensor:
        """x (..., i), as the layer gets it -> (..., o), what to add to the layer's output."""
        return self.product(F.dropout(x, self.dropout, training and self.dropout > 0), strength)


class LoRA(AdapterLayer):
    """delta = alpha / r * up down, with up (o, r) at zero and down (r, i) uniform up to 1 / sqrt(i)."""

    def __init__(self, layer: nn.Linear, settings, generator: torch.Generator | None) -> None:
        super().__init__(settings.alpha, settings.alpha / settings.rank, settings.dropout)
        self.down = drawn(layer, (settings.rank, layer.in_features), generator)
        self.up = zeros(layer, (layer.out_features, settings.rank))

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_up.weight": self.up, "lora_down.weight": self.down}

    def delta(self) -> Tensor:
        return self.scale * (self.up @ self.down)

    def product(self, x: Tensor, strength: float) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        return F.linear(strength * self.scale * F.linear(x, down), up)


class LoKr(AdapterLayer):
    """delta = scale * kron(w1, w2), with w1 (o1, i1) drawn and w2 (o2, i2) at zero, the larger of the two.

    w2 is itself a product, w2_a (o2, r) w2_b (r, i2), where r is below half of its longer side. Then the scale is
    alpha / r, else it is 1 and alpha means nothing: so LyCORIS and hosts have it.
    """

    def __init__(self, layer: nn.Linear, settings, generator: torch.Generator | None) -> None:
        (o1, o2), (i1, i2) = (factorization(n, settings.factor) for n in (layer.out_features, layer.in_features))
        rank = settings.rank
        low_rank = 2 * rank < max(o2, i2)
        alpha = settings.alpha if low_rank else rank  # so that alpha / r is the scale for any reader
        super().__init__(alpha, alpha / rank, settings.dropout)
        self.low_rank = low_rank
        self.w1 = drawn(layer, (o1, i1), generator)
        if self.low_rank:
            self.w2_a, self.w2_b = zeros(layer, (o2, rank)), drawn(layer, (rank, i2), generator)
        else:
            self.w2 = zeros(layer, (o2, i2))

    def factors(self) -> dict[str, nn.Parameter]:
        second = {"lokr_w2_a": self.w2_a, "lokr_w2_b": self.w2_b} if self.low_rank else {"lokr_w2": self.w2}
        return {"lokr_w1": self.w1, **second}

    def delta(self) -> Tensor:
        return self.scale * torch.kron(self.w1, self.w2_a @ self.w2_b if self.low_rank else self.w2)

    def product(self, x: Tensor, strength: float) -> Tensor:
        h = x.unflatten(-1, (self.w1.shape[1], -1))  # (..., i1, i2)
        for factor in (self.w2_b, self.w2_a) if self.low_rank else (self.w2,):
            h = F.linear(h, factor.to(x.dtype))
        w1 = strength * self.scale * self.w1
        return F.linear(h.mT, w1.to(x.dtype)).mT.flatten(-2)  # (..., o1, o2) -> (..., o)


LAYERS = {"lora": LoRA, "lokr": LoKr}


def zeros(layer: nn.Linear, shape: tuple[int, int]) -> nn.Parameter:
    """Zeros where the layer is."""
    weight = layer.weight
    return nn.Parameter(torch.zeros(shape, device=weight.device, dtype=at_least_float32(weight.dtype)))


def drawn(layer: nn.Linear, shape: tuple[int, int], generator: torch.Generator | None) -> nn.Parameter:
    """Uniform up to 1 / sqrt(columns): kaiming_uniform with a = sqrt(5), as a linear layer starts.

    Drawn where the generator is, so that a seed means the same on every device.
    """
    device = "cpu" if generator is None else generator.device
    values = (2 * torch.rand(shape, generator=generator, device=device) - 1) / math.sqrt(shape[1])
    return nn.Parameter(values.to(layer.weight.device, at_least_float32(layer.weight.dtype)))
