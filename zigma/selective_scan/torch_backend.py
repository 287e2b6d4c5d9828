"""The selective scan in plain torch operations: any device, float32 state (float64 for float64 inputs).

    v_k = dt_k u_k,  a_k = exp(dt_k A),  s_k = a_k s_{k-1} + v_k B_k,  y_k = <s_k, C_k> + D u_k,  out_k = y_k silu(z_k)

Forward and backward are written out. Both walk the sequence in segments (token-wise parts) and those in chunks and
tiles (what is as wide as the state), so that memory beyond the results does not grow with the length. Backward starts
from the state before every STATE_STEPS-th step and recomputes the rest. Layout: steps first, channels last and
contiguous, so that every operation is vectorised over channels. Written for every device torch has: no float64
constants, no in-place index writes.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "torch"
STATE_STEPS = 16
SEGMENT = 16 * STATE_STEPS  # at most: longer ones save launches of token-wise operations, and take memory
SEGMENT_ELEMENTS = 2**18  # of one token-wise tensor on the CPU: the caches hold a handful of them
TILE = 32768  # elements of one step's state per CPU thread: what torch hands to one thread, and the cache holds


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
        recurrence, state = _Recurrence(A, b, adjoint=False), A.new_zeros(b, n, d)
        for segment in _segments(u):
            x, dt, B_, C_ = (_walk(t, input_order, segment, A.dtype) for t in (u, delta, B, C))
            dt = dt if delta_bias is None else dt + delta_bias
            dt = F.softplus(dt) if delta_softplus else dt
            y = recurrence.forward(dt, dt * x, B_, C_, state, states[segment.start // STATE_STEPS :])
            if D is not None:
                y.addcmul_(D, x)
            if z is not None:
                y *= F.silu(_walk(z, output_order, segment, A.dtype))
            _store(out, output_order, segment, y)
        return _settle(out, output_order), states


def scan_backward(
    d_out, u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, states
) -> tuple[Tensor | None, ...]:
    """Gradients for u, delta, A, B, C, D, z, delta_bias, each in its input's dtype; None for absent inputs."""
    with _without_autocast(u):
        d_u, d_delta, d_B, d_C = (t.new_empty(t.shape) for t in (u, delta, B, C))
        d_z = None if z is None else z.new_empty(z.shape)
        d_D, d_bias = (None if t is None else t.new_zeros(t.shape) for t in (D, delta_bias))
        recurrence, carry = _Recurrence(A, len(u), adjoint=True), A.new_zeros(len(u), A.shape[1], u.shape[2])
        for segment in reversed(_segments(u)):
            x, raw, B_, C_ = (_walk(t, input_order, segment, A.dtype) for t in (u, delta, B, C))
            raw = raw if delta_bias is None else raw + delta_bias
            dt = F.softplus(raw) if delta_softplus else raw
            dy = _walk(d_out, output_order, segment, A.dtype)
            if z is not None:
                silu, slope = _silu_and_slope(_walk(z, output_order, segment, A.dtype))
                d_gate, dy = slope.mul_(dy), silu.mul_(dy)
            starts = states[segment.start // STATE_STEPS :]
            y, d_dt, d_v, d_B_, d_C_ = recurrence.backward(dy, dt, dt * x, B_, C_, carry, starts)
            d_x = d_v * dt
            d_dt.addcmul_(d_v, x)
            if D is not None:
                d_x.addcmul_(dy, D)
                d_D += (dy * x).sum((0, 1))
                y.addcmul_(D, x)
            if delta_softplus:
                d_dt *= torch.sigmoid(raw)
            if delta_bias is not None:
                d_bias += d_dt.sum((0, 1))
            if z is not None:
                _store(d_z, output_order, segment, d_gate.mul_(y))
            for grad, part in ((d_u, d_x), (d_delta, d_dt), (d_B, d_B_), (d_C, d_C_)):
                _store(grad, input_order, segment, part)
        d_u, d_delta, d_B, d_C = (_settle(t, input_order) for t in (d_u, d_delta, d_B, d_C))
        d_z = None if d_z is None else _settle(d_z, output_order)
        return d_u, d_delta, recurrence.d_A.T.contiguous(), d_B, d_C, d_D, d_z, d_bias


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """SiLU of the depthwise causal convolution along `order`; x (b, l, d) raster, result in scan order."""
    with _without_autocast(x):
        out = x.new_empty(x.shape)
        for segment in _segments(x, longest=16 * SEGMENT):
            walk = _walk_with_past(x, order, segment.start, segment.stop, weight)
            out[:, segment] = F.silu(_convolved(walk, weight, bias))
        return out


def conv_backward(d_out, x, weight, bias, order) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients for x (raster), weight and bias."""
    (_, l, d), k = x.shape, weight.shape[1]
    d_x, d_weight, d_bias = x.new_empty(x.shape), weight.new_zeros(k, d), weight.new_zeros(d)
    with _without_autocast(x):
        for segment in _segments(x, longest=16 * SEGMENT):
            steps, end = segment.stop - segment.start, min(segment.stop + k - 1, l)  # the steps that read this segment
            walk = _walk_with_past(x, order, segment.start, end, weight)
            _, slope = _silu_and_slope(_convolved(walk, weight, bias))
            dy = slope.mul_(d_out[:, segment.start : end])
            d_bias += dy[:, :steps].sum((0, 1))
            for j in range(k):
                d_weight[j] += (dy[:, :steps] * walk[:, j : j + steps]).sum((0, 1))
            dy = F.pad(dy, (0, 0, 0, steps + k - 1 - dy.shape[1]))
            part = dy[:, k - 1 : k - 1 + steps] * weight[:, 0]
            for j in range(1, k):
                part.addcmul_(dy[:, k - 1 - j : k - 1 - j + steps], weight[:, j])
            _store(d_x, order, segment, part.transpose(0, 1))
        return _settle(d_x, order), d_weight.T.contiguous(), None if bias is None else d_bias


def _walk_with_past(x: Tensor, order: Tensor | None, first: int, last: int, weight: Tensor) -> Tensor:
    """Steps first to last (b, steps, d) with the k - 1 before them, zeros where there are none."""
    past = weight.shape[1] - 1
    walk = _walk(x, order, slice(max(first - past, 0), last), weight.dtype).transpose(0, 1)
    return walk if first >= past else F.pad(walk, (0, 0, past - first, 0))


def _convolved(walk: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A sum of k shifted products, since conv1d would want the channels before the tokens."""
    steps = walk.shape[1] - weight.shape[1] + 1
    y = walk[:, :steps] * weight[:, 0]
    for j in range(1, weight.shape[1]):
        y.addcmul_(walk[:, j : j + steps], weight[:, j])
    return y if bias is None else y.add_(bias)


def _without_autocast(t: Tensor):
    """The state is float32 whatever the caller's autocast says."""
    if torch.amp.is_autocast_available(t.device.type):
        return torch.autocast(t.device.type, enabled=False)
    return contextlib.nullcontext()


def _on_cpu(t: Tensor) -> bool:
    """Whether work is cut to the caches; other devices get few launches, and nothing that one of them may lack."""
    return t.device.type == "cpu"


def _pieces(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _segments(x: Tensor, longest: int = SEGMENT) -> list[slice]:
    """The steps of x (b, l, d) in pieces of whole STATE_STEPS, up to `longest`."""
    b, l, d = x.shape
    fitting = SEGMENT_ELEMENTS // max(b * d, 1) // STATE_STEPS * STATE_STEPS if _on_cpu(x) else longest
    return _pieces(l, max(STATE_STEPS, min(fitting, longest)))


def _walk(t: Tensor, order: Tensor | None, segment: slice, dtype: torch.dtype) -> Tensor:
    """Steps `segment` of t (b, l, w) in the order of the walk, as (steps, b, w)."""
    rows = t[:, segment] if order is None else _gathered(t, order[segment])
    return rows.to(dtype).transpose(0, 1)


def _gathered(t: Tensor, rows: Tensor) -> Tensor:
    """t[:, rows]. On the CPU index_select is several times faster, if it sees one dimension of rows: it would first
    copy all of another tensor that is not contiguous, such as half of a projection."""
    b, l = t.shape[:2]
    if not _on_cpu(t) or b == 0 or (b > 1 and t.stride(0) != l * t.stride(1)):
        return t[:, rows]
    of_all = rows if b == 1 else (torch.arange(0, b * l, l)[:, None] + rows).flatten()
    return t.flatten(0, 1).index_select(0, of_all).unflatten(0, (b, len(rows)))


def _store(t: Tensor, order: Tensor | None, segment: slice, steps: Tensor) -> None:
    """Write steps (steps, b, w) of the walk into t (b, l, w), to be settled when all are there.

    Only on the CPU at their rows at once: not every device can write by index.
    """
    rows = steps.transpose(0, 1).to(t.dtype)
    if order is None or not _on_cpu(t):
        t[:, segment] = rows
    else:
        t.index_copy_(1, order[segment], rows)


def _settle(t: Tensor, order: Tensor | None) -> Tensor:
    """t with every row where `order` says."""
    return t if order is None or _on_cpu(t) else t.index_select(1, order.argsort())


def _silu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """silu(z) = z sigma(z) and its derivative sigma(z) + silu(z) (1 - sigma(z))."""
    sigma = torch.sigmoid(z)
    silu = z * sigma
    return silu, torch.addcmul(sigma, silu, 1 - sigma)


def _over_states(m: Tensor, s: Tensor) -> Tensor:
    """sum_n m[.., n] s[.., n, d]. Off the CPU without a matrix product, which may run in TF32 there."""
    return (m[..., None, :] @ s).squeeze(-2) if _on_cpu(s) else (m[..., None] * s).sum(-2)


def _over_channels(s: Tensor, m: Tensor) -> Tensor:
    """sum_d s[.., n, d] m[.., d]. A row times a matrix: as matrix times column it takes eight times as long."""
    return (m[..., None, :] @ s.mT).squeeze(-2) if _on_cpu(s) else (s * m[..., None, :]).sum(-1)


class _Recurrence:
    """s_k = a_k s_{k-1} + v_k B_k and its adjoint, over the steps of one segment.

    On the CPU a chunk of steps is one group, and channels and batch items come in tiles that stay in the cache. Other
    devices pay by the launch: there STATE_STEPS groups of STATE_STEPS steps advance together as if each started from
    nothing, then the last states are carried from group to group.
    """

    def __init__(self, A: Tensor, b: int, adjoint: bool):
        d, n = A.shape
        self.adjoint = adjoint
        self.A = A.T.contiguous()
        self.rates = self.A * math.log2(math.e)  # exp(dt A) = 2^(dt rates): exp2 is the faster of the two
        self.d_A = torch.zeros_like(self.A)
        self.groups, self.tiles = STATE_STEPS, [(slice(0, b), slice(0, d))]
        if _on_cpu(A):
            size = TILE * torch.get_num_threads() // max(n, 1)
            items = max(1, min(b, size // max(d, 1)))
            self.groups = 1
            self.tiles = [(i, c) for i in _pieces(b, items) for c in _pieces(d, max(1, size // max(items, 1)))]
        self.work: dict[tuple[int, ...], _Work] = {}

    def forward(self, dt: Tensor, v: Tensor, B: Tensor, C: Tensor, state: Tensor, states: Tensor) -> Tensor:
        """y (steps, b, d) of a segment, from dt, v (steps, b, d) and B, C (steps, b, n).

        Advances `state` (b, n, d) in place and, unless `states` is empty, writes the state before every
        STATE_STEPS-th step there.
        """
        y = torch.empty_like(v)
        for c in self._chunks(len(v)):
            for item, channel in self.tiles:
                at = c, item, channel
                s = self._states(dt[at], v[at], B[c, item], state[item, :, channel], channel).s
                y[at] = _over_states(C[c, item], s[1:])
                state[item, :, channel] = s[-1]
                if states.numel():
                    kept = s[:-1:STATE_STEPS]
                    first = c.start // STATE_STEPS
                    states[first : first + len(kept), item, :, channel] = kept
        return y

    def backward(self, dy, dt, v, B, C, carry: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """y, d_dt, d_v, d_B, d_C of a segment, while d_A adds up.

        `carry` = a_{k+1} dL/ds_{k+1} at the segment's last step k; it becomes that of the segment before.
        """
        y, d_dt, d_v = (torch.empty_like(v) for _ in range(3))
        d_B, d_C = torch.zeros_like(B), torch.zeros_like(C)
        for c in reversed(self._chunks(len(v))):
            for item, channel in self.tiles:
                at, start = (c, item, channel), states[c.start // STATE_STEPS, item, :, channel]
                dy_, dt_, v_, B_, C_ = dy[at], dt[at], v[at], B[c, item], C[c, item]
                w = self._states(dt_, v_, B_, start, channel)
                decay, s, g = w.decay, w.s, self._adjoint(dy_, dt_, C_, carry[item, :, channel], channel)
                torch.mul(decay[0], g[0], out=carry[item, :, channel])
                y[at], d_v[at] = _over_states(C_, s[1:]), _over_states(B_, g)
                d_C[c, item] += _over_channels(s[1:], dy_)
                d_B[c, item] += _over_channels(g, v_)
                h = decay.mul_(s[:-1]).mul_(g)  # dL/d(dt_k A) = g_k a_k s_{k-1}
                d_dt[at] = torch.mul(h, self.A[:, channel], out=g).sum(2)
                self.d_A[:, channel] += h.mul_(dt_[:, :, None, :]).sum((0, 1))
        return y, d_dt, d_v, d_B, d_C

    def _chunks(self, steps: int) -> list[slice]:
        """Whole groups in as large chunks as allowed, then the steps that fill no group."""
        whole = steps // STATE_STEPS * STATE_STEPS
        rest = [slice(whole, steps)] if whole < steps else []
        return _pieces(whole, self.groups * STATE_STEPS) + rest

    def _work(self, dt: Tensor) -> _Work:
        """Memory that every chunk of this shape uses again: fresh pages for each would cost a third of the time."""
        key = tuple(dt.shape)
        if key not in self.work:
            self.work[key] = _Work(self.A.new_empty, *key, len(self.A), self.adjoint)
        return self.work[key]

    def _states(self, dt: Tensor, v: Tensor, B: Tensor, start: Tensor, channel: slice) -> _Work:
        """Fills in the decays and states of one chunk and tile."""
        w, rates = self._work(dt), self.rates[:, channel]
        torch.mul(dt[:, :, None, :], rates, out=w.decay).exp2_()
        w.s[0] = start
        torch.mul(v[:, :, None, :], B[..., None], out=w.s[1:])
        w.s[1].addcmul_(w.decay[0], w.s[0])
        for s_j, a_j, s_i in w.forward:
            s_j.addcmul_(a_j, s_i)
        if w.groups > 1:
            x = _grouped(w.s[1:])
            p = torch.exp2(_grouped(dt).cumsum(1)[:, :, :, None] * rates)
            for k in range(1, w.groups):
                x[k, -1].addcmul_(p[k, -1], x[k - 1, -1])
            x[1:, :-1].addcmul_(p[1:, :-1], x[:-1, -1:])
        return w

    def _adjoint(self, dy: Tensor, dt: Tensor, C: Tensor, carry: Tensor, channel: slice) -> Tensor:
        """g_k = dL/ds_k = dy_k C_k + a_{k+1} g_{k+1}, (steps, b, n, d): the recurrence backwards."""
        w = self._work(dt)
        torch.mul(dy[:, :, None, :], C[..., None], out=w.g)
        w.g[-1] += carry
        for g_i, a_j, g_j in w.backward:
            g_i.addcmul_(a_j, g_j)
        if w.groups > 1:
            x, after = _grouped(w.g), _grouped(torch.cat((dt[1:], torch.zeros_like(dt[:1]))))
            p = torch.exp2(after.flip(1).cumsum(1).flip(1)[:, :, :, None] * self.rates[:, channel])
            for k in reversed(range(w.groups - 1)):
                x[k, 0].addcmul_(p[k, 0], x[k + 1, 0])
            x[:-1, 1:].addcmul_(p[:-1, 1:], x[1:, :1])
        return w.g


class _Work:
    """decay, g (steps, b, n, d) and s (steps + 1, b, n, d) of one chunk and tile, and the views its recurrences take.

    Each of `forward` is (s_j, a_j, s_{j-1}) and of `backward` (g_{j-1}, a_j, g_j), for step j of every group at once.
    """

    def __init__(self, new_empty, steps: int, b: int, d: int, n: int, adjoint: bool):
        self.decay, self.s = new_empty(steps, b, n, d), new_empty(steps + 1, b, n, d)
        a, s = _grouped(self.decay).unbind(1), _grouped(self.s[1:]).unbind(1)
        self.groups = len(a[0])
        self.forward = list(zip(s[1:], a[1:], s[:-1], strict=True))
        if adjoint:
            self.g = new_empty(steps, b, n, d)
            g = _grouped(self.g).unbind(1)
            self.backward = list(zip(g[:-1], a[1:], g[1:], strict=True))[::-1]


def _grouped(t: Tensor) -> Tensor:
    """(steps, ...) as (groups, STATE_STEPS, ...), or as one group if the steps do not divide."""
    return t.unflatten(0, (-1, STATE_STEPS) if len(t) % STATE_STEPS == 0 else (1, len(t)))
