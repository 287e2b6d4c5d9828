"""The selective scan in plain torch operations: any device, float32 state (float64 for float64 inputs).

    v_k = dt_k u_k,  a_k = exp(dt_k A),  s_k = a_k s_{k-1} + v_k B_k,  y_k = <s_k, C_k> + D u_k,  out_k = y_k silu(z_k)

Forward and backward are written out. Both walk the sequence in segments (token-wise parts) and those in chunks (what
is as wide as the state), so that memory beyond the results does not grow with the length. Backward starts from the
state before every STATE_STEPS-th step and recomputes the rest. Layout: steps first, channels last and contiguous, so
that every operation is vectorised over channels. Written for every device torch has: no float64 constants, no
in-place index writes.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "torch"
STATE_STEPS = 16
SEGMENT = 8 * STATE_STEPS


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, or None: it always can."""
    return None


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why this backend cannot take these tensors, or None: it takes any device and floating-point dtype."""
    return None


def describe() -> str:
    """A short detail for the log line."""
    return "plain torch operations"


def states_shape(b: int, l: int, d: int, n: int) -> tuple[int, ...]:
    """Shape of what forward keeps for backward: the state before every STATE_STEPS-th step."""
    return -(-l // STATE_STEPS), b, n, d


def scan_forward(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output (b, l, d) in u's dtype and, if `keep`, the states for `scan_backward`, else an empty tensor.

    Step k reads u, delta, B and C at rows input_order[k], reads z and writes the output at rows output_order[k].
    """
    with _without_autocast(u):
        (b, l, d), n = u.shape, A.shape[1]
        out = u.new_empty(b, l, d)
        states = A.new_empty(states_shape(b, l, d, n) if keep else 0)
        state, rates = A.new_zeros(b, n, d), _rates(A)
        for segment in _pieces(0, l, SEGMENT):
            x, dt, B_, C_ = (_walk(t, input_order, segment, A.dtype) for t in (u, delta, B, C))
            dt = _step_sizes(dt, delta_bias, delta_softplus)
            y, v = torch.empty_like(x), dt * x
            for chunk in _pieces(0, len(x), STATE_STEPS):
                if keep:
                    states[(segment.start + chunk.start) // STATE_STEPS] = state
                _, s = _states(dt[chunk], v[chunk], B_[chunk], rates, state)
                y[chunk] = _over_states(C_[chunk], s[1:])
                state = s[-1]
            if D is not None:
                y.addcmul_(D, x)
            if z is not None:
                y *= F.silu(_walk(z, output_order, segment, A.dtype))
            out[:, segment] = y.transpose(0, 1)
        return _unwalk(out, output_order), states


def scan_backward(
    d_out, u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, states
) -> tuple[Tensor | None, ...]:
    """Gradients for u, delta, A, B, C, D, z, delta_bias, each in its input's dtype; None for absent inputs."""
    with _without_autocast(u):
        d_u, d_delta, d_B, d_C = (t.new_empty(t.shape) for t in (u, delta, B, C))
        d_z = None if z is None else z.new_empty(z.shape)
        d_D, d_bias = (None if t is None else torch.zeros_like(t) for t in (D, delta_bias))
        rates, d_A = _rates(A), torch.zeros_like(A.T, memory_format=torch.contiguous_format)
        carry = A.new_zeros(u.shape[0], A.shape[1], u.shape[2])
        for segment in reversed(_pieces(0, u.shape[1], SEGMENT)):
            x, raw, B_, C_ = (_walk(t, input_order, segment, A.dtype) for t in (u, delta, B, C))
            dt = _step_sizes(raw, delta_bias, delta_softplus)
            dy = _walk(d_out, output_order, segment, A.dtype)
            if z is not None:
                gate = _walk(z, output_order, segment, A.dtype)
                d_gate, dy = dy * _silu_slope(gate), dy * F.silu(gate)
            y, v = torch.empty_like(x), dt * x
            d_dt, d_v, d_B_, d_C_ = (torch.empty_like(t) for t in (x, x, B_, C_))
            for c in reversed(_pieces(0, len(x), STATE_STEPS)):
                start = states[(segment.start + c.start) // STATE_STEPS]
                y[c], d_dt[c], d_v[c], d_B_[c], d_C_[c], d_A_c, carry = _chunk_gradients(
                    dy[c], dt[c], v[c], A.T, B_[c], C_[c], rates, start, carry
                )
                d_A += d_A_c
            d_x = d_v * dt
            d_dt.addcmul_(d_v, x)
            if D is not None:
                d_x.addcmul_(dy, D)
                d_D += (dy * x).sum((0, 1))
                y.addcmul_(D, x)
            if delta_softplus:
                d_dt *= torch.sigmoid(raw if delta_bias is None else raw + delta_bias)
            if delta_bias is not None:
                d_bias += d_dt.sum((0, 1))
            if z is not None:
                d_z[:, segment] = (d_gate * y).transpose(0, 1)
            for grad, part in ((d_u, d_x), (d_delta, d_dt), (d_B, d_B_), (d_C, d_C_)):
                grad[:, segment] = part.transpose(0, 1)
        d_u, d_delta, d_B, d_C = (_unwalk(t, input_order) for t in (d_u, d_delta, d_B, d_C))
        return d_u, d_delta, d_A.T.contiguous(), d_B, d_C, d_D, _unwalk(d_z, output_order), d_bias


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """SiLU of the depthwise causal convolution along `order`; x (b, l, d) raster, result in scan order."""
    with _without_autocast(x):
        return F.silu(_convolved(_padded_walk(x, weight, order), weight, bias)).to(x.dtype)


def conv_backward(d_out, x, weight, bias, order) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients for x (raster), weight and bias."""
    with _without_autocast(x):
        l, k = x.shape[1], weight.shape[1]
        walk = _padded_walk(x, weight, order)
        dy = d_out.to(weight.dtype) * _silu_slope(_convolved(walk, weight, bias))
        d_weight = torch.stack([(dy * walk[:, j : j + l]).sum((0, 1)) for j in range(k)], dim=1)
        ahead = F.pad(dy, (0, 0, 0, k - 1))
        d_x = ahead[:, k - 1 : k - 1 + l] * weight[:, 0]
        for j in range(1, k):
            d_x.addcmul_(ahead[:, k - 1 - j : k - 1 - j + l], weight[:, j])
        return _unwalk(d_x.to(x.dtype), order), d_weight, None if bias is None else dy.sum((0, 1))


def _padded_walk(x: Tensor, weight: Tensor, order: Tensor | None) -> Tensor:
    walk = (x if order is None else x.index_select(1, order)).to(weight.dtype)
    return F.pad(walk, (0, 0, weight.shape[1] - 1, 0))


def _convolved(walk: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A sum of k shifted products, since conv1d would want the channels before the tokens."""
    l = walk.shape[1] - weight.shape[1] + 1
    y = walk[:, :l] * weight[:, 0]
    for j in range(1, weight.shape[1]):
        y.addcmul_(walk[:, j : j + l], weight[:, j])
    return y if bias is None else y.add_(bias)


def _without_autocast(t: Tensor):
    """The state is float32 whatever the caller's autocast says."""
    if torch.amp.is_autocast_available(t.device.type):
        return torch.autocast(t.device.type, enabled=False)
    return contextlib.nullcontext()


def _pieces(first: int, last: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]


def _walk(t: Tensor, order: Tensor | None, segment: slice, dtype: torch.dtype) -> Tensor:
    """Steps `segment` of t (b, l, w) in the order of the walk, as (steps, b, w)."""
    rows = t[:, segment] if order is None else t.index_select(1, order[segment])
    return rows.to(dtype).transpose(0, 1)


def _unwalk(t: Tensor | None, order: Tensor | None) -> Tensor | None:
    """Rows of the walk put back where `order` read them."""
    return t if t is None or order is None else t.index_select(1, order.argsort())


def _rates(A: Tensor) -> Tensor:
    """A (d, n) as (n, d), scaled so that exp(dt A) = 2^(dt rates): exp2 is the faster of the two."""
    return (A.T * math.log2(math.e)).contiguous()


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    dt = delta if delta_bias is None else delta + delta_bias
    return F.softplus(dt) if delta_softplus else dt


def _silu_slope(z: Tensor) -> Tensor:
    """d silu(z) / dz = sigma(z) (1 + z (1 - sigma(z)))."""
    sigma = torch.sigmoid(z)
    return sigma * (1 + z * (1 - sigma))


def _states(dt: Tensor, v: Tensor, B: Tensor, rates: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays (steps, b, n, d) and states (steps + 1, b, n, d), the first of them `start`, of one chunk."""
    decay = torch.exp2(dt[:, :, None, :] * rates)
    s = start.new_empty(len(dt) + 1, *start.shape)
    s[0] = start
    torch.mul(v[:, :, None, :], B[..., None], out=s[1:])
    for k in range(len(dt)):
        s[k + 1].addcmul_(decay[k], s[k])
    return decay, s


def _over_states(m: Tensor, s: Tensor) -> Tensor:
    """sum_n m[.., n] s[.., n, d]."""
    return (m[..., None, :] @ s).squeeze(-2)


def _over_channels(s: Tensor, m: Tensor) -> Tensor:
    """sum_d s[.., n, d] m[.., d]."""
    return (s @ m[..., None]).squeeze(-1)


def _chunk_gradients(dy, dt, v, A, B, C, rates, start, carry) -> tuple[Tensor, ...]:
    """y, d_dt, d_v, d_B, d_C, d_A (n, d) and the carry for the chunk before.

    The carry is a_{k+1} g_{k+1} at the chunk's last step k.
    g_k = dL/ds_k = dy_k C_k + a_{k+1} g_{k+1};  dL/d(dt_k A) = g_k a_k s_{k-1}.
    """
    decay, s = _states(dt, v, B, rates, start)
    g = dy[:, :, None, :] * C[..., None]
    g[-1].add_(carry)
    for k in reversed(range(len(g) - 1)):
        g[k].addcmul_(decay[k + 1], g[k + 1])
    carry = decay[0] * g[0]
    y, d_C = _over_states(C, s[1:]), _over_channels(s[1:], dy)
    d_v, d_B = _over_states(B, g), _over_channels(g, v)
    h = decay.mul_(s[:-1]).mul_(g)
    d_dt = (h * A).sum(2)
    return y, d_dt, d_v, d_B, d_C, h.mul_(dt[:, :, None, :]).sum((0, 1)), carry
