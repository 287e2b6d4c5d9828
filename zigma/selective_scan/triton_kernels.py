"""The Triton kernels of the selective scan; `triton_backend` launches them.

The scan is algorithm 2 of Mamba (Gu and Dao, arXiv 2312.00752) with the work-efficient order of its section 3.3.2:
states live in registers and never reach memory, except one at the start of every chunk of CHUNK steps, from which
backward recomputes the others. s_k = a_k s_{k-1} + x_k is a composition of affine maps, which is associative (Blelloch
1990), so that a chunk is one `tl.associative_scan` over a tile (steps, channels, states).

To fill a device with a batch of one the sequence is cut into segments of whole chunks, in three passes (forward; the
gradient of the state runs through the same three in reverse):

1. `scan_segment_states`: what each segment adds to the state, started from zero, and its sum of dt.
2. `scan_carry`: s <- exp(A sum_dt) s + added, over segments: the state at the start of each.
3. `scan_outputs`: each segment from its start.

With one segment the third kernel alone does it. No kernel uses atomics: sums over channels, batch or segments go to
memory as partial sums, so that the same inputs give the same bits.

Conventions: `rows_*` strides are in elements; the last dimension of every tensor is contiguous; an absent tensor is
None. A is scaled by log2(e) where it is loaded for exp2. Public functions are kernels that are launched, and the tests
compile every one of them; names with an underscore are parts of kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _compose(a1, x1, a2, x2):
    """The map s -> a2 s + x2 after the map s -> a1 s + x1."""
    return a1 * a2, a2 * x1 + x2


@triton.jit
def _compose_both(a1, x1, _a1, _x1, a2, x2, before_a2, before_x2):
    """`_compose`, and the same map without its last step: (before_a, before_x) is (1, 0) for a single step."""
    return a1 * a2, a2 * x1 + x2, a1 * before_a2, before_a2 * x1 + before_x2


@triton.jit
def _scan_both(decay, x, reverse: tl.constexpr):
    """The state after and before each step of a tile that starts from zero; in reverse, from its end."""
    one, zero = tl.full(x.shape, 1.0, tl.float32), tl.zeros_like(x)
    _a, after, _before_a, before = tl.associative_scan((decay, x, one, zero), 0, _compose_both, reverse=reverse)
    return after, before


@triton.jit
def _softplus(x):
    """log(1 + exp(x)); log1p(e) = 2 artanh(e / (2 + e)) as a series, exact to float32 for every e in [0, 1]."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    t = e / (2.0 + e)
    q = t * t
    series = 1 / 11 + q * (1 / 13 + q * (1 / 15))
    series = 1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * series)))
    return tl.maximum(x, 0.0) + 2.0 * (t + t * q * series)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _locate(blocks, pieces):
    """(block of channels, piece of the sequence, batch item) of this program: one grid axis has no 65535 limit."""
    program = tl.program_id(0)
    return program % blocks, program // blocks % pieces, (program // blocks // pieces).to(tl.int64)


@triton.jit
def _rows(order, steps, valid):
    """Rows of the tokens read at these steps."""
    rows = steps.to(tl.int64)
    if order is not None:
        rows = tl.load(order + steps, mask=valid, other=0)
    return rows


@triton.jit
def _load(base, rows, row_stride, row_valid, columns, column_valid):
    """A float32 tile (rows, columns), zero where either is not valid."""
    mask = row_valid[:, None] & column_valid[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(base, rows, row_stride, row_valid, columns, column_valid, tile):
    mask = row_valid[:, None] & column_valid[None, :]
    tl.store(base + rows[:, None] * row_stride + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _vector(base, columns, valid):
    """A float32 vector, zero where absent."""
    vector = tl.zeros(columns.shape, tl.float32)
    if base is not None:
        vector = tl.load(base + columns, mask=valid, other=0.0).to(tl.float32)
    return vector


@triton.jit
def _step_sizes(delta, rows, row_stride, row_valid, d, d_valid, bias, SOFTPLUS: tl.constexpr):
    """delta + bias, and dt, which is zero for steps and channels that are not there: they leave states alone."""
    raw = _load(delta, rows, row_stride, row_valid, d, d_valid) + bias[None, :]
    dt = raw
    if SOFTPLUS:
        dt = _softplus(raw)
    return raw, tl.where(row_valid[:, None] & d_valid[None, :], dt, 0.0)


@triton.jit
def _outer(rows, columns):
    """(steps, channels), (steps, states) -> (steps, channels, states)."""
    return rows[:, :, None] * columns[:, None, :]


@triton.jit
def _at(index, step: tl.constexpr, tile):
    """The tile (steps, channels, states) with zeros except at one step."""
    return tl.where((index == step)[:, None, None], tile, 0.0)


@triton.jit(do_not_specialize=["length", "segments", "per_segment"])
def scan_segment_states(
    u, delta, A, B, bias, order, added, sum_dt,
    length, segments, per_segment, channels, states,
    batch_u, rows_u, batch_delta, rows_delta, batch_B, rows_B,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """Pass 1: added (b, segments, d, n) = sum_k exp(A sum_{j > k} dt_j) dt_k B_k u_k, and sum_dt (b, segments, d)."""
    block, segment, batch = _locate(tl.cdiv(channels, BLOCK_D), segments)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_valid = d < channels
    dt_bias = _vector(bias, d, d_valid)
    place = (batch * segments + segment) * channels
    index = tl.arange(0, CHUNK)
    last = tl.minimum((segment + 1) * per_segment, tl.cdiv(length, CHUNK))
    total = tl.zeros([BLOCK_D], tl.float32)
    state = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for chunk in range(segment * per_segment, last):
        k = chunk * CHUNK + index
        k_valid = k < length
        next_valid = (index + 1 < CHUNK) & (k + 1 < length)
        rows = _rows(order, k, k_valid)
        next_rows = _rows(order, k + 1, next_valid)
        u_k = _load(u + batch * batch_u, rows, rows_u, k_valid, d, d_valid)
        _raw, dt = _step_sizes(delta + batch * batch_delta, rows, rows_delta, k_valid, d, d_valid, dt_bias, SOFTPLUS)
        _raw, next_dt = _step_sizes(
            delta + batch * batch_delta, next_rows, rows_delta, next_valid, d, d_valid, dt_bias, SOFTPLUS
        )
        # Summed from the end: the difference of two sums from the start would be inexact where it matters, near zero.
        remaining = tl.cumsum(next_dt, 0, reverse=True)
        chunk_dt = tl.sum(dt, 0)
        for j in range(BLOCKS_N):
            n = j * BLOCK_N + tl.arange(0, BLOCK_N)
            n_valid = n < states
            a = _load(A, d, states, d_valid, n, n_valid) * LOG2_E
            B_k = _load(B + batch * batch_B, rows, rows_B, k_valid, n, n_valid)
            kept = tl.exp2(remaining[:, :, None] * a[None, :, :])
            state = tl.exp2(chunk_dt[:, None] * a) * state + tl.sum(kept * _outer(dt * u_k, B_k), 0)
            if BLOCKS_N > 1:  # one chunk per segment
                _store(added + place * states, d, states, d_valid, n, n_valid, state)
                state = tl.zeros_like(state)
        total += chunk_dt
    if BLOCKS_N == 1:
        n = tl.arange(0, BLOCK_N)
        _store(added + place * states, d, states, d_valid, n, n < states, state)
    tl.store(sum_dt + place + d, total, mask=d_valid)


@triton.jit(do_not_specialize=["segments"])
def scan_carry(
    A, added, sum_dt, starts,
    segments, channels, states,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 2: starts (b, segments, d, n), the state before each segment (with REVERSE, after it: its gradient)."""
    size = channels * states
    block, _, batch = _locate(tl.cdiv(size, BLOCK), 1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    valid = i < size
    a = _vector(A, i, valid) * LOG2_E
    state = tl.zeros([BLOCK], tl.float32)
    for step in range(segments):
        segment = step
        if REVERSE:
            segment = segments - 1 - step
        place = batch * segments + segment
        tl.store(starts + place * size + i, state, mask=valid)
        decay = tl.exp2(_vector(sum_dt + place * channels, i // states, valid) * a)
        state = decay * state + _vector(added + place * size, i, valid)


@triton.jit(do_not_specialize=["length", "segments", "per_segment"])
def scan_outputs(
    u, delta, A, B, C, D, z, bias, order, out_order, starts, kept_states, out,
    length, segments, per_segment, channels, states,
    batch_u, rows_u, batch_delta, rows_delta, batch_B, rows_B, batch_C, rows_C, batch_z, rows_z,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """Pass 3: out (b, l, d) from the segments' starts; kept_states (b, chunks, d, n), the state before each chunk."""
    block, segment, batch = _locate(tl.cdiv(channels, BLOCK_D), segments)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_valid = d < channels
    dt_bias, D_d = _vector(bias, d, d_valid), _vector(D, d, d_valid)
    index = tl.arange(0, CHUNK)
    chunks = tl.cdiv(length, CHUNK)
    n = tl.arange(0, BLOCK_N)
    state = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    start = (batch * segments + segment) * channels * states
    if starts is not None and BLOCKS_N == 1:
        state = _load(starts + start, d, states, d_valid, n, n < states)
    for chunk in range(segment * per_segment, tl.minimum((segment + 1) * per_segment, chunks)):
        k = chunk * CHUNK + index
        k_valid = k < length
        rows = _rows(order, k, k_valid)
        u_k = _load(u + batch * batch_u, rows, rows_u, k_valid, d, d_valid)
        _raw, dt = _step_sizes(delta + batch * batch_delta, rows, rows_delta, k_valid, d, d_valid, dt_bias, SOFTPLUS)
        y = D_d[None, :] * u_k
        for j in range(BLOCKS_N):
            n = j * BLOCK_N + tl.arange(0, BLOCK_N)
            n_valid = n < states
            a = _load(A, d, states, d_valid, n, n_valid) * LOG2_E
            B_k = _load(B + batch * batch_B, rows, rows_B, k_valid, n, n_valid)
            C_k = _load(C + batch * batch_C, rows, rows_C, k_valid, n, n_valid)
            if BLOCKS_N > 1:  # one chunk per segment; what the variable holds is of the block before
                state = tl.zeros_like(state)
                if starts is not None:
                    state = _load(starts + start, d, states, d_valid, n, n_valid)
            if kept_states is not None:
                kept = kept_states + (batch * chunks + chunk) * channels * states
                _store(kept, d, states, d_valid, n, n_valid, state)
            decay = tl.exp2(dt[:, :, None] * a[None, :, :])
            x = _outer(dt * u_k, B_k) + _at(index, 0, decay * state[None, :, :])
            _product, s = tl.associative_scan((decay, x), 0, _compose)
            y += tl.sum(s * C_k[:, None, :], 2)
            state = tl.sum(_at(index, CHUNK - 1, s), 0)
        out_rows = _rows(out_order, k, k_valid)
        if z is not None:
            z_k = _load(z + batch * batch_z, out_rows, rows_z, k_valid, d, d_valid)
            y *= z_k * _sigmoid(z_k)
        _store(out + batch * length * channels, out_rows, channels, k_valid, d, d_valid, y)


@triton.jit(do_not_specialize=["length", "segments", "per_segment"])
def scan_segment_gradients(
    d_out, delta, A, C, z, bias, order, out_order, added, sum_dt,
    length, segments, per_segment, channels, states,
    batch_out, rows_out, batch_delta, rows_delta, batch_C, rows_C, batch_z, rows_z,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """Pass 1 of backward: added (b, segments, d, n) = sum_k exp(A sum_{j <= k} dt_j) dy_k C_k, the gradient that each
    segment adds to that of the state before it, and sum_dt (b, segments, d)."""
    block, segment, batch = _locate(tl.cdiv(channels, BLOCK_D), segments)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_valid = d < channels
    dt_bias = _vector(bias, d, d_valid)
    place = (batch * segments + segment) * channels
    first = segment * per_segment
    last = tl.minimum(first + per_segment, tl.cdiv(length, CHUNK))
    total = tl.zeros([BLOCK_D], tl.float32)
    gradient = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for step in range(last - first):
        k = (last - 1 - step) * CHUNK + tl.arange(0, CHUNK)
        k_valid = k < length
        rows, out_rows = _rows(order, k, k_valid), _rows(out_order, k, k_valid)
        _raw, dt = _step_sizes(delta + batch * batch_delta, rows, rows_delta, k_valid, d, d_valid, dt_bias, SOFTPLUS)
        dy = _load(d_out + batch * batch_out, out_rows, rows_out, k_valid, d, d_valid)
        if z is not None:
            z_k = _load(z + batch * batch_z, out_rows, rows_z, k_valid, d, d_valid)
            dy *= z_k * _sigmoid(z_k)
        passed = tl.cumsum(dt, 0)
        chunk_dt = tl.sum(dt, 0)
        for j in range(BLOCKS_N):
            n = j * BLOCK_N + tl.arange(0, BLOCK_N)
            n_valid = n < states
            a = _load(A, d, states, d_valid, n, n_valid) * LOG2_E
            C_k = _load(C + batch * batch_C, rows, rows_C, k_valid, n, n_valid)
            kept = tl.exp2(passed[:, :, None] * a[None, :, :])
            gradient = tl.exp2(chunk_dt[:, None] * a) * gradient + tl.sum(kept * _outer(dy, C_k), 0)
            if BLOCKS_N > 1:  # one chunk per segment
                _store(added + place * states, d, states, d_valid, n, n_valid, gradient)
                gradient = tl.zeros_like(gradient)
        total += chunk_dt
    if BLOCKS_N == 1:
        n = tl.arange(0, BLOCK_N)
        _store(added + place * states, d, states, d_valid, n, n < states, gradient)
    tl.store(sum_dt + place + d, total, mask=d_valid)


@triton.jit(do_not_specialize=["length", "segments", "per_segment"])
def scan_gradients(
    d_out, u, delta, A, B, C, D, z, bias, order, out_order, kept_states, ends,
    d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias,
    batch_size, length, segments, per_segment, channels, states,
    batch_out, rows_out, batch_u, rows_u, batch_delta, rows_delta,
    batch_B, rows_B, batch_C, rows_C, batch_z, rows_z,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_N: tl.constexpr,
):  # fmt: skip
    """Pass 3 of backward. With g_k = dy_k C_k + a_{k+1} g_{k+1}, the gradient of s_k, and h_k = a_k s_{k-1} (computed
    so, since s_k - x_k is inexact where decay is fast)::

        d_dt_k = sum_n g_k (A h_k + B_k u_k),  d_u_k = dt_k sum_n g_k B_k + D dy_k,  d_A = sum_k g_k h_k dt_k,
        d_B_k = sum_d g_k dt_k u_k,  d_C_k = sum_d s_k dy_k

    d_A (b, segments, d, n), d_D and d_bias (b, segments, d), d_B and d_C (blocks of channels, b, l, n) are partial.
    """
    blocks = tl.cdiv(channels, BLOCK_D)
    block, segment, batch = _locate(blocks, segments)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_valid = d < channels
    dt_bias, D_d = _vector(bias, d, d_valid), _vector(D, d, d_valid)
    index = tl.arange(0, CHUNK)
    chunks = tl.cdiv(length, CHUNK)
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    place = (batch * segments + segment) * channels
    dense, partial = batch * length * channels, (block * batch_size + batch) * length * states
    n = tl.arange(0, BLOCK_N)
    gradient = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    if ends is not None and BLOCKS_N == 1:
        gradient = _load(ends + place * states, d, states, d_valid, n, n < states)
    sum_A = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    sum_D, sum_bias = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for step in range(last - first):
        chunk = last - 1 - step
        k = chunk * CHUNK + index
        k_valid = k < length
        rows, out_rows = _rows(order, k, k_valid), _rows(out_order, k, k_valid)
        u_k = _load(u + batch * batch_u, rows, rows_u, k_valid, d, d_valid)
        raw, dt = _step_sizes(delta + batch * batch_delta, rows, rows_delta, k_valid, d, d_valid, dt_bias, SOFTPLUS)
        d_out_k = _load(d_out + batch * batch_out, out_rows, rows_out, k_valid, d, d_valid)
        dy = d_out_k
        if z is not None:
            z_k = _load(z + batch * batch_z, out_rows, rows_z, k_valid, d, d_valid)
            dy = d_out_k * z_k * _sigmoid(z_k)
        y = D_d[None, :] * u_k
        d_x, d_dt = tl.zeros_like(y), tl.zeros_like(y)
        for j in range(BLOCKS_N):
            n = j * BLOCK_N + tl.arange(0, BLOCK_N)
            n_valid = n < states
            A_n = _load(A, d, states, d_valid, n, n_valid)
            B_k = _load(B + batch * batch_B, rows, rows_B, k_valid, n, n_valid)
            C_k = _load(C + batch * batch_C, rows, rows_C, k_valid, n, n_valid)
            start = _load(kept_states + (batch * chunks + chunk) * channels * states, d, states, d_valid, n, n_valid)
            if BLOCKS_N > 1:
                gradient = tl.zeros_like(gradient)
                if ends is not None:
                    gradient = _load(ends + place * states, d, states, d_valid, n, n_valid)
            decay = tl.exp2(dt[:, :, None] * (A_n * LOG2_E)[None, :, :])
            x = _outer(dt * u_k, B_k)
            before = _at(index, 0, tl.broadcast_to(start[None, :, :], x.shape))
            s, previous = _scan_both(decay, x + decay * before, False)
            h = decay * (previous + before)
            g = _outer(dy, C_k) + _at(index, CHUNK - 1, tl.broadcast_to(gradient[None, :, :], x.shape))
            passed, following = _scan_both(decay, decay * g, True)
            g += following
            gradient = tl.sum(_at(index, 0, passed), 0)
            if z is not None:
                y += tl.sum(s * C_k[:, None, :], 2)
            gh = g * h
            d_dt += tl.sum(gh * A_n[None, :, :], 2)
            d_x += tl.sum(g * B_k[:, None, :], 2)
            chunk_A = tl.sum(gh * dt[:, :, None], 0)
            _store(d_B + partial, rows, states, k_valid, n, n_valid, tl.sum(g * (dt * u_k)[:, :, None], 1))
            _store(d_C + partial, rows, states, k_valid, n, n_valid, tl.sum(s * dy[:, :, None], 1))
            if BLOCKS_N > 1:  # one chunk per segment
                _store(d_A + place * states, d, states, d_valid, n, n_valid, chunk_A)
            else:
                sum_A += chunk_A
        d_raw = d_dt + d_x * u_k
        if SOFTPLUS:
            d_raw *= _sigmoid(raw)
        _store(d_u + dense, rows, channels, k_valid, d, d_valid, d_x * dt + D_d[None, :] * dy)
        _store(d_delta + dense, rows, channels, k_valid, d, d_valid, d_raw)
        if z is not None:
            gate = _sigmoid(z_k)
            _store(d_z + dense, out_rows, channels, k_valid, d, d_valid, d_out_k * y * gate * (1 + z_k * (1 - gate)))
        sum_D += tl.sum(dy * u_k, 0)
        sum_bias += tl.sum(d_raw, 0)
    if BLOCKS_N == 1:
        _store(d_A + place * states, d, states, d_valid, n, n < states, sum_A)
    if d_D is not None:
        tl.store(d_D + place + d, sum_D, mask=d_valid)
    if d_bias is not None:
        tl.store(d_bias + place + d, sum_bias, mask=d_valid)
