"""The selective scan written as its definition; every backend is tested against it. Slow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .orders import check_permutations

NAME = "reference"


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, or None: it always can."""
    return None


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why this backend cannot take these tensors, or None: it takes any device and floating-point dtype."""
    return None


def describe() -> str:
    """What runs, for a log line."""
    return "the definition, step by step: slow, for tests"


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order) -> Tensor:
    """Arguments as in `custom_ops.selective_scan`; differentiable by autograd."""
    check_permutations(input_order, output_order)
    dtype = A.dtype
    if input_order is not None:
        u, delta, B, C = (t[:, input_order] for t in (u, delta, B, C))
    x, dt, B, C = (t.to(dtype) for t in (u, delta, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = F.softplus(dt)
    s, ys = torch.zeros_like(A), []
    for k in range(u.shape[1]):
        s = torch.exp(dt[:, k, :, None] * A) * s + dt[:, k, :, None] * B[:, k, None, :] * x[:, k, :, None]
        ys.append((s * C[:, k, None, :]).sum(-1))
    y = torch.stack(ys, dim=1) if ys else torch.zeros_like(x)
    if D is not None:
        y = y + D * x
    if output_order is not None:
        y = y[:, output_order.argsort()]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """Arguments as in `operator.ordered_conv1d_silu`; weight (d, k)."""
    check_permutations(order)
    walk = (x if order is None else x[:, order]).to(weight.dtype).transpose(1, 2)
    walk = F.pad(walk, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(walk, weight[:, None], bias, groups=len(weight))).transpose(1, 2).to(x.dtype)
