"""What lies between two mixers, in one pass over memory: add, normalise, modulate, and gather rows on the way.

Glossary: b batch, l tokens, d width of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_devices, check_order, check_shape
from .custom_ops import gradients_wanted, operators_are_looked_at, transformed
from .dispatch import BACKENDS, select_backend
from .orders import check_permutations

__all__ = ["Stream", "add_norm", "gather_rows"]


class Stream(NamedTuple):
    """The value base + gate * mix + residual, whose sum is left to the norm that reads it.

    Attributes:
        base: (b, l, d).
        mix: (b, l, d) or None.
        gate: (b, 1, d) of the mix, or None for 1.
        residual: (b, l, d), float32 or float64 if base is, or None.
    """

    base: Tensor
    mix: Tensor | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None


def add_norm(
    stream: Stream,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    layer_norm: bool = False,
    modulation: tuple[Tensor, Tensor] | None = None,
    gather: Tensor | None = None,
    total: torch.dtype | None = None,
    keep_norm: bool = True,
    places: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor | None, ...]:
    """x = the stream's sum at rows `gather`; (x, u, m) with u = norm(x) weight + bias and m = u (1 + scale) + shift.

    Sums and norms are float32, of a float64 base float64 (RMSNorm: Zhang and Sennrich, arXiv 1910.07467, equation 4;
    LayerNorm: arXiv 1607.06450; modulation: adaLN of DiT, arXiv 2212.09748, section 3.2).

    Args:
        stream: the summands.
        weight, bias: (d,) or None.
        eps: added to the mean square or variance.
        layer_norm: LayerNorm in place of RMSNorm.
        modulation: (shift, scale), each (b, 1, d); without it m is None.
        gather: (l,) row of the stream for each row of the results; None takes them as they are.
        total: dtype in which x is wanted; None leaves it out.
        keep_norm: whether u is wanted beside m.
        places: memory for x, u and m that nobody needs any more, as `scratch.py` has it: of their shapes and dtypes,
            and apart from what is gathered. A backend may use it where nobody wants gradients.

    Returns:
        (x or None, u or None, m or None), all (b, l, d); u and m in the dtype of base.

    Raises:
        ValueError: shapes, devices or a gather that do not fit.
    """
    shift, scale = modulation or (None, None)
    _check(*stream, weight, bias, shift, scale, gather)
    module = BACKENDS[select_backend(None, *stream, shift, scale)]
    arguments = (*stream, weight, bias, shift, scale, gather, eps, layer_norm, total, keep_norm)
    if hasattr(module, "norm_forward") and not torch.compiler.is_compiling() and not transformed():
        given = [t for t in arguments if isinstance(t, Tensor)]
        if hasattr(module, "norm_backward") or not gradients_wanted(given):
            check_permutations(gather)
            if operators_are_looked_at(*given):
                return _AddNorm.apply(module, *arguments)
            if places is not None and hasattr(module, "norm_into"):
                return module.norm_into(places, *arguments)
            return module.norm_forward(*arguments)
    return composed(*arguments)


def _check(base, mix, gate, residual, weight, bias, shift, scale, gather) -> None:
    rows = base.shape
    row, width = (rows[0], 1, rows[2]), (rows[2],)
    for name, t, form, shape in (
        ("mix", mix, "(b, l, d)", rows), ("residual", residual, "(b, l, d)", rows), ("gate", gate, "(b, 1, d)", row),
        ("shift", shift, "(b, 1, d)", row), ("scale", scale, "(b, 1, d)", row), ("weight", weight, "(d,)", width),
        ("bias", bias, "(d,)", width),
    ):  # fmt: skip
        if t is not None and t.shape != shape:
            check_shape(name, t, form, tuple(shape))
    check_devices("base", base, weight=weight, bias=bias)  # on those of the others a backend is chosen
    check_order("the gather", gather, base)


class _AddNorm(torch.autograd.Function):
    """A backend's kernels; backward computes the sums and norms again from the summands."""

    @staticmethod
    def forward(ctx, module, *arguments):
        *tensors, eps, layer_norm, total, keep_norm = arguments
        ctx.set_materialize_grads(False)
        ctx.module, ctx.settings = module, (eps, layer_norm)
        ctx.save_for_backward(*tensors)
        return module.norm_forward(*tensors, eps, layer_norm, total, keep_norm)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, d_normed, d_modulated):
        grads = ctx.module.norm_backward(d_total, d_normed, d_modulated, *ctx.saved_tensors, *ctx.settings)
        return None, *grads, None, None, None, None, None


def composed(
    base, mix, gate, residual, weight, bias, shift, scale, gather, eps, layer_norm, total, keep_norm
) -> tuple[Tensor | None, ...]:
    """The same in operations of torch: what every device has, and what a compiler fuses by itself."""
    precise = torch.promote_types(base.dtype, torch.float32)
    x = base.to(precise)
    if mix is not None:
        x = x + mix.to(precise) if gate is None else torch.addcmul(x, gate.to(precise), mix.to(precise))
    if residual is not None:
        x = x + residual
    if gather is not None:
        x = gather_rows(x, gather)
    weight, bias = (None if t is None else t.to(precise) for t in (weight, bias))
    if layer_norm:
        norm = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        norm = F.rms_norm(x, x.shape[-1:], weight, eps)
        norm = norm if bias is None else norm + bias
    m = None
    if scale is not None:
        m = torch.addcmul(norm + shift, norm, scale.to(norm.dtype)).to(base.dtype)
    return None if total is None else x.to(total), norm.to(base.dtype) if keep_norm else None, m


class _GatherRows(torch.autograd.Function):
    """x[:, order] for a permutation: its gradient is a gather by the inverse, not a scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(1, ctx.saved_tensors[0].argsort()), None


def gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """x (b, l, ...) -> x[:, order], order a permutation of its l rows."""
    return x.index_select(1, order) if transformed() else _GatherRows.apply(x, order)
