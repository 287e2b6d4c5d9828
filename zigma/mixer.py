"""The Mamba mixer that reads its tokens in any order, and the cross-attention beside it.

Glossary: b batch, l tokens, d width of a token (embed_dim), e width inside the mixer (expand * d), n states per
channel, r rank of the step size (dt_rank), m text tokens.

Mamba: Gu and Dao 2023, arXiv 2312.00752, section 3.4. The permutation of the tokens: ZigMa, arXiv 2403.13802,
equation 2. Everything keeps the layout (b, l, d): what a matrix product writes, the scan reads without a transpose.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .selective_scan import ordered_conv1d_silu, selective_scan_gathered

__all__ = ["CrossAttention", "Mamba", "read_weights"]


def read_weights(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer whose own forward is bypassed by a kernel.

    A host that casts, patches or offloads weights inside its layers puts its accessor in place of this one, as the
    attribute `read_weights` of the `operations` it passes; `like` is a tensor of the device and dtype of the use.
    """
    return layer.weight, getattr(layer, "bias", None)  # norms may have none


class Mamba(nn.Module):
    """Selective state-space layer over the tokens in a given order; (b, l, d) -> (b, l, d), both in raster order.

    Args:
        embed_dim: d. d_state: n. d_conv: width of the causal convolution. expand: e / d. dt_rank: r.
        operations, device, dtype: where the layers come from, and of the parameters.
    """

    def __init__(
        self, embed_dim: int, d_state: int, d_conv: int, expand: int, dt_rank: int, *, operations=nn, device=None,
        dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        options = {"device": device, "dtype": dtype}
        e = expand * embed_dim
        self.splits = [dt_rank, d_state, d_state]
        self.in_proj = operations.Linear(embed_dim, 2 * e, bias=False, **options)
        # Depthwise; only its weights are used. A causal convolution pads on the left, which Conv1d cannot say.
        self.conv1d = operations.Conv1d(e, e, d_conv, groups=e, padding=d_conv - 1, **options)
        self.x_proj = operations.Linear(e, dt_rank + 2 * d_state, bias=False, **options)
        self.dt_proj = operations.Linear(dt_rank, e, **options)
        self.out_proj = operations.Linear(e, embed_dim, bias=False, **options)
        self.A_log = nn.Parameter(torch.empty(e, d_state, **options))
        self.D = nn.Parameter(torch.empty(e, **options))
        self._read_weights = getattr(operations, "read_weights", read_weights)

    def forward(self, tokens: Tensor, order: Tensor) -> Tensor:
        """tokens (b, l, d) in raster order, order (l,): order[k] is the token read at step k."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)
        weight, bias = self._read_weights(self.conv1d, x)
        u = ordered_conv1d_silu(x, weight, bias, order)  # from here on in scan order; z waits in raster order
        dt, B, C = self.x_proj(u).split(self.splits, dim=-1)
        delta = self.dt_proj(dt)  # its bias included: softplus follows inside the scan
        A = -torch.exp(self.A_log.float().to(u.device))
        y = selective_scan_gathered(u, delta, A, B, C, self.D.float().to(u.device), z, order=order)
        return self.out_proj(y)

    @torch.no_grad()
    def reset_parameters(self, depth: int) -> None:
        """Mamba's initial values: step sizes log-uniform in [1e-3, 1e-1], A = -(1 ... n), output over sqrt(depth)."""
        rank = self.splits[0]
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight.div_(math.sqrt(depth))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        low, high = math.log(1e-3), math.log(1e-1)
        steps = torch.rand(self.dt_proj.bias.shape, device=self.dt_proj.bias.device)
        steps = torch.exp(low + steps * (high - low)).clamp(min=1e-4)
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus(bias) = steps
        self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1)


class CrossAttention(nn.Module):
    """Tokens of the picture ask tokens of the text; (b, l, d), (b, m, d) -> (b, l, d). No mask, no dropout.

    Eight heads of 64 channels whatever the width, as published.
    """

    HEADS = 8
    HEAD_DIM = 64

    def __init__(self, embed_dim: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        inner, options = self.HEADS * self.HEAD_DIM, {"device": device, "dtype": dtype}
        self.to_q = operations.Linear(embed_dim, inner, bias=False, **options)
        self.to_k = operations.Linear(embed_dim, inner, bias=False, **options)
        self.to_v = operations.Linear(embed_dim, inner, bias=False, **options)
        # A list, for the published key is to_out.0 (beside a dropout without weights).
        self.to_out = nn.ModuleList([operations.Linear(inner, embed_dim, **options)])

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """tokens (b, l, d) and context (b, m, d) -> (b, l, d)."""
        q, k, v = (
            rearrange(part, "b l (h c) -> b h l c", h=self.HEADS)
            for part in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        if torch.is_grad_enabled() and q.device.type == "cpu":
            # The fused attention's backward on a CPU took a third of a training step at 64 tokens.
            mixed = torch.softmax(q @ k.transpose(-1, -2) * self.HEAD_DIM**-0.5, dim=-1).to(v.dtype) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(mixed, "b h l c -> b l (h c)"))
