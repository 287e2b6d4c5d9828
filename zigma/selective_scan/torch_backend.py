"""The selective scan in plain torch operations: any device, float32 state (float64 for float64 inputs).

One `addcmul` per step is all that runs in sequence; everything else works on chunks of steps, which also bounds
memory. Backward keeps the state at the start of each chunk and recomputes the rest. Written for every device torch
has: no float64 constants, no in-place index writes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 16


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, or None: it always can."""
    return None


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why this backend cannot take these tensors, or None: it takes any device and floating-point dtype."""
    return None


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, gathered) -> Tensor:
    """Arguments as in `operator.selective_scan`; gathered: u, delta, B and C are in scan order already."""
    dtype = A.dtype
    with torch.autocast(u.device.type, enabled=False):
        if order is not None and not gathered:
            u, delta, B, C = (t.index_select(1, order) for t in (u, delta, B, C))
        x, dt, B, C = (t.to(dtype) for t in (u, delta, B, C))
        if delta_bias is not None:
            dt = dt + delta_bias
        if delta_softplus:
            dt = F.softplus(dt)
        y = _Recurrence.apply(dt, dt * x, A, B, C)
        if D is not None:
            y = torch.addcmul(y, D, x)
        if order is not None:
            y = y.index_select(1, order.argsort())
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(u.dtype)


def conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """Arguments as in `operator.ordered_conv1d_silu`; weight (d, k). A sum of k shifted products, since conv1d
    would want the channels before the tokens."""
    l, k = x.shape[1], weight.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        walk = (x if order is None else x.index_select(1, order)).to(weight.dtype)
        walk = F.pad(walk, (0, 0, k - 1, 0))
        y = walk[:, :l] * weight[:, 0]
        for j in range(1, k):
            y = torch.addcmul(y, walk[:, j : j + l], weight[:, j])
        if bias is not None:
            y = y + bias
        return F.silu(y).to(x.dtype)


def _states(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays exp(dt A) and states, both (steps, b, d, n), of one chunk; dt and x (steps, b, d), start (b, d, n)."""
    decay = torch.exp(dt[..., None] * A)
    s = x[..., None] * B[:, :, None, :]
    previous = start
    for k in range(len(s)):
        previous = s[k].addcmul_(decay[k], previous)
    return decay, s


class _Recurrence(torch.autograd.Function):
    """s_k = exp(dt_k A) s_{k-1} + x_k B_k, y_k = <s_k, C_k>; dt, x (b, l, d), A (d, n), B, C (b, l, n) -> (b, l, d)."""

    @staticmethod
    def forward(ctx, dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        b, l, d = x.shape
        state = x.new_zeros(b, d, A.shape[1])
        steps, starts, ys = [t.transpose(0, 1) for t in (dt, x, B, C)], [], []
        for first in range(0, l, CHUNK):
            dt_c, x_c, B_c, C_c = (t[first : first + CHUNK] for t in steps)
            starts.append(state)
            s = _states(dt_c, x_c, A, B_c, state)[1]
            ys.append((s @ C_c[..., None]).squeeze(-1))
            state = s[-1].clone()
        ctx.save_for_backward(dt, x, A, B, C, *starts)
        return torch.cat(ys).transpose(0, 1).contiguous() if ys else torch.zeros_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        with torch.autocast(dy.device.type, enabled=False):  # backward may run under the caller's autocast
            return _Recurrence._gradients(dy, *ctx.saved_tensors)

    @staticmethod
    def _gradients(dy: Tensor, dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, *starts: Tensor):
        steps = [t.transpose(0, 1) for t in (dt, x, B, C, dy)]
        dA, carry, grads = torch.zeros_like(A), None, []
        for chunk in reversed(range(len(starts))):
            dt_c, x_c, B_c, C_c, dy_c = (t[chunk * CHUNK : (chunk + 1) * CHUNK] for t in steps)
            decay, s = _states(dt_c, x_c, A, B_c, starts[chunk])
            g = dy_c[..., None] * C_c[:, :, None, :]  # dL/ds_k = dy_k C_k + decay_{k+1} dL/ds_{k+1}
            if carry is not None:
                g[-1].add_(carry)
            for k in reversed(range(len(g) - 1)):
                g[k].addcmul_(decay[k + 1], g[k + 1])
            carry = decay[0] * g[0]
            h = g * decay * torch.cat((starts[chunk][None], s[:-1]))
            dA += (h * dt_c[..., None]).sum((0, 1))
            d_dt, d_x = (h * A).sum(-1), (g @ B_c[..., None]).squeeze(-1)
            d_B, d_C = ((t[..., None, :] @ m).squeeze(-2) for t, m in ((x_c, g), (dy_c, s)))
            grads.append((d_dt, d_x, d_B, d_C))
        if not grads:
            return tuple(torch.zeros_like(t) for t in (dt, x, A, B, C))
        d_dt, d_x, d_B, d_C = (torch.cat(parts[::-1]).transpose(0, 1) for parts in zip(*grads, strict=True))
        return d_dt, d_x, dA, d_B, d_C
