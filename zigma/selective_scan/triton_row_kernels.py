"""The Triton kernels between two scans: the ordered convolution, and add, norm and modulation of rows.

Conventions as in `triton_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _load, _locate, _rows, _sigmoid, _store, _vector


@triton.jit
def _convolved(
    x, weight, bias, order, k, length, channels, rows_x, d, d_valid,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """bias + sum_j weight_j x at step k - (WIDTH - 1) + j, a tile (steps, channels)."""
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32) + _vector(bias, d, d_valid)[None, :]
    for j in tl.static_range(WIDTH):
        read = k - (WIDTH - 1) + j
        valid = (read >= 0) & (read < length)
        x_j = _load(x, _rows(order, read, valid), rows_x, valid, d, d_valid)
        total += _vector(weight + j, d * WIDTH, d_valid)[None, :] * x_j
    return total


@triton.jit(do_not_specialize=["length"])
def conv_outputs(
    x, weight, bias, order, out, length, channels, batch_x, rows_x,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (b, l, d) in scan order: SiLU of the depthwise causal convolution of x (b, l, d) along order."""
    block, piece, batch = _locate(tl.cdiv(channels, BLOCK_D), tl.cdiv(length, BLOCK_T))
    d, k = block * BLOCK_D + tl.arange(0, BLOCK_D), piece * BLOCK_T + tl.arange(0, BLOCK_T)
    d_valid = d < channels
    v = _convolved(
        x + batch * batch_x, weight, bias, order, k, length, channels, rows_x, d, d_valid, WIDTH, BLOCK_T, BLOCK_D
    )
    _store(out + batch * length * channels, k.to(tl.int64), channels, k < length, d, d_valid, v * _sigmoid(v))


@triton.jit(do_not_specialize=["length"])
def conv_parameter_gradients(
    d_out, x, weight, bias, order, d_v, d_weight, d_bias, length, channels, batch_out, rows_out, batch_x, rows_x,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_v (b, l, d) float32, the gradient of what SiLU takes, in scan order; partial sums of it over steps, d_bias
    (b, pieces, d), and of its product with x, d_weight (b, pieces, d, WIDTH)."""
    pieces = tl.cdiv(length, BLOCK_T)
    block, piece, batch = _locate(tl.cdiv(channels, BLOCK_D), pieces)
    d, k = block * BLOCK_D + tl.arange(0, BLOCK_D), piece * BLOCK_T + tl.arange(0, BLOCK_T)
    d_valid, k_valid = d < channels, k < length
    x += batch * batch_x
    v = _convolved(x, weight, bias, order, k, length, channels, rows_x, d, d_valid, WIDTH, BLOCK_T, BLOCK_D)
    gate = _sigmoid(v)
    steps = k.to(tl.int64)
    d_v_k = _load(d_out + batch * batch_out, steps, rows_out, k_valid, d, d_valid) * gate * (1 + v * (1 - gate))
    _store(d_v + batch * length * channels, steps, channels, k_valid, d, d_valid, d_v_k)
    place = (batch * pieces + piece) * channels
    if d_bias is not None:
        tl.store(d_bias + place + d, tl.sum(d_v_k, 0), mask=d_valid)
    for j in tl.static_range(WIDTH):
        read = k - (WIDTH - 1) + j
        valid = (read >= 0) & (read < length)
        x_j = _load(x, _rows(order, read, valid), rows_x, valid, d, d_valid)
        tl.store(d_weight + (place + d) * WIDTH + j, tl.sum(d_v_k * x_j, 0), mask=d_valid)


@triton.jit(do_not_specialize=["length"])
def conv_input_gradients(
    d_v, weight, order, d_x, length, channels,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_x (b, l, d) in raster order: d_x[order[k]] = sum_j weight_j d_v[k + (WIDTH - 1) - j]."""
    block, piece, batch = _locate(tl.cdiv(channels, BLOCK_D), tl.cdiv(length, BLOCK_T))
    d, k = block * BLOCK_D + tl.arange(0, BLOCK_D), piece * BLOCK_T + tl.arange(0, BLOCK_T)
    d_valid = d < channels
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for j in tl.static_range(WIDTH):
        read = k + (WIDTH - 1) - j
        d_v_j = _load(d_v + batch * length * channels, read.to(tl.int64), channels, read < length, d, d_valid)
        total += _vector(weight + j, d * WIDTH, d_valid)[None, :] * d_v_j
    k_valid = k < length
    _store(d_x + batch * length * channels, _rows(order, k, k_valid), channels, k_valid, d, d_valid, total)


@triton.jit
def _row(base, offset, d, valid):
    return tl.load(base + offset + d, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _store_row(base, offset, d, valid, row):
    tl.store(base + offset + d, row.to(base.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["length"])
def rows_outputs(
    base, mix, gate, residual, weight, bias, shift, scale, gather, total, normed, modulated,
    length, channels, eps,
    batch_base, rows_base, batch_mix, rows_mix, batch_residual, rows_residual, batch_gate, batch_shift, batch_scale,
    LAYER_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x = base + gate mix + residual at row gather[k], u = norm(x) weight + bias, m = u (1 + scale) + shift; one row
    of total (x), normed (u) and modulated (m), each (b, l, d) or None, per program."""
    _, k, batch = _locate(1, length)
    d = tl.arange(0, BLOCK)
    valid = d < channels
    row = k.to(tl.int64)
    if gather is not None:
        row = tl.load(gather + k)
    x = _row(base, batch * batch_base + row * rows_base, d, valid)
    if mix is not None:
        added = _row(mix, batch * batch_mix + row * rows_mix, d, valid)
        if gate is not None:
            added *= _row(gate, batch * batch_gate, d, valid)
        x += added
    if residual is not None:
        x += _row(residual, batch * batch_residual + row * rows_residual, d, valid)
    place = (batch * length + k) * channels
    if total is not None:
        _store_row(total, place, d, valid, x)
    u = x
    if LAYER_NORM:
        u = tl.where(valid, x - tl.sum(x, 0) / channels, 0.0)
    u = u / tl.sqrt(tl.sum(u * u, 0) / channels + eps)
    if weight is not None:
        u *= _vector(weight, d, valid)
    u += _vector(bias, d, valid)
    if normed is not None:
        _store_row(normed, place, d, valid, u)
    if modulated is not None:
        m = u * (1.0 + _row(scale, batch * batch_scale, d, valid)) + _row(shift, batch * batch_shift, d, valid)
        _store_row(modulated, place, d, valid, m)
