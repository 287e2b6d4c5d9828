"""The operator's public signature: checks of shapes and orders, then one backend.

Glossary: b batch, l length (tokens), d channels, n states per channel, k convolution width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import custom_ops, reference
from .checks import check_devices, check_order, check_shape
from .dispatch import select_backend


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    order: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Selective state space scan over tokens read in `order`; everything is given and returned in raster order.

    With dt = softplus(delta + delta_bias), step k of every channel computes::

        s_k = exp(dt_k A) * s_{k-1} + dt_k B_k u_k,    y_k = <s_k, C_k> + D u_k,    out_k = y_k * silu(z_k)

    (Gu and Dao, arXiv 2312.00752, equations 2 and 4 with their simplified discretisation of B). The result with an
    order o equals the operator on inputs gathered by o, gathered back by argsort(o).

    Args:
        u, delta: (b, l, d), float32 or bfloat16 (float16 and float64 on the torch backend).
        A: (d, n); D, delta_bias: (d,) or None. Taken as float32, like the state.
        B, C: (b, l, n).
        z: (b, l, d) gate, or None for no gate.
        order: (l,) LongTensor, order[k] = raster index of the token read at step k; None is raster order.
        backend: a name of `available_backends()`; None picks by device.

    Returns:
        (b, l, d) in the dtype of u.

    Raises:
        ValueError: shapes that do not fit, an order that is not a permutation of l tokens, an unknown backend.
        RuntimeError: a backend was asked for by name and cannot run.
    """
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    check_order("the token order", order, u)
    name = select_backend(backend, u, delta, B, C, z, states=A.shape[1])
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, order, name)


def selective_scan_gathered(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    order: Tensor | None = None,
    backend: str | None = None,
    overwrite_delta: bool = False,
    overwrite_z: bool = False,
) -> Tensor:
    """`selective_scan` for u, delta, B and C that are already in scan order; z and the result are in raster order.

    What the Mamba mixer calls after `ordered_conv1d_silu`: the gather of z and the scatter of the result happen
    inside the kernel. Shapes, dtypes and errors as in `selective_scan`.

    overwrite_delta, overwrite_z: the caller needs delta or z no more, and the result may take its memory: in inference
    on the native backend it takes that of delta without an order, that of z with one. No other input lies there.
    """
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    check_order("the token order", order, u)
    name = select_backend(backend, u, delta, B, C, z, states=A.shape[1])
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, None, order, name, overwrite_delta, overwrite_z)


def ordered_conv1d_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    backend: str | None = None,
    overwrite_x: bool = False,
) -> Tensor:
    """SiLU of a depthwise causal convolution over the tokens read in `order`.

    out[:, t] = silu(bias + sum_j weight[:, j] * x[:, order[t - (k - 1) + j]]), with zeros before the first token.

    Args:
        x: (b, l, d) in raster order; any row stride, so half of a wider projection needs no copy.
        weight: (d, 1, k) as in a depthwise nn.Conv1d, or (d, k).
        bias: (d,) or None.
        order, backend: as in `selective_scan`.
        overwrite_x: the caller needs x no more, and the result may take its memory: it does in inference on the
            native backend without an order.

    Returns:
        (b, l, d) in scan order, in the dtype of x.

    Raises:
        ValueError, RuntimeError: as in `selective_scan`.
    """
    check_shape("x", x, "(b, l, d)", (None, None, None))
    if weight.ndim == 3:
        check_shape("weight", weight, "(d, 1, k) or (d, k)", (x.shape[2], 1, None))
        weight = weight.squeeze(1)
    check_shape("weight", weight, "(d, 1, k) or (d, k)", (x.shape[2], None))
    if not weight.shape[1]:
        raise ValueError("selective scan: the convolution has no taps, expected a weight (d, k) with k of at least 1")
    check_devices("x", x, weight=weight, bias=bias)
    if bias is not None:
        check_shape("bias", bias, "(d,)", (x.shape[2],))
    check_order("the token order", order, x)
    name = select_backend(backend, x, conv_width=weight.shape[1])
    weight, bias = (_parameter(x, t) for t in (weight, bias))
    if name == reference.NAME:
        return reference.conv1d_silu(x, weight, bias, order)
    return custom_ops.conv1d_silu(x, weight, bias, order, name, overwrite_x)


def _scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, name: str,
    overwrite_delta: bool = False, overwrite_z: bool = False,
) -> Tensor:  # fmt: skip
    A, D, delta_bias = (_parameter(u, t) for t in (A, D, delta_bias))
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order)
    if name == reference.NAME:  # which autograd sees through
        return reference.scan(*arguments)
    return custom_ops.selective_scan(*arguments, name, overwrite_delta, overwrite_z)


def _check_scan(u, delta, A, B, C, D, z, delta_bias) -> None:
    check_shape("u", u, "(b, l, d)", (None, None, None))
    b, l, d = u.shape
    check_shape("A", A, "(d, n)", (d, None))
    n = A.shape[1]
    check_shape("delta", delta, "(b, l, d)", (b, l, d))
    check_shape("B", B, "(b, l, n)", (b, l, n))
    check_shape("C", C, "(b, l, n)", (b, l, n))
    for name, t, form, shape in (
        ("D", D, "(d,)", (d,)),
        ("z", z, "(b, l, d)", (b, l, d)),
        ("delta_bias", delta_bias, "(d,)", (d,)),
    ):
        if t is not None:
            check_shape(name, t, form, shape)
    check_devices("u", u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)


def _parameter(u: Tensor, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float64 if u.dtype == torch.float64 else torch.float32)
