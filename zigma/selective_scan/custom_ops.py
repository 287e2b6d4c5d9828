"""The scan and the convolution as `torch.library` operators, so that autograd, torch.compile and export see one node.

Each operator takes the name of the backend that computes it; which one that is has been decided before (dispatch.py).
The definitions are global to a process. A host may load this pack twice, under two names or after a reload: the copy
that comes first registers, the others use what they find.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import BACKENDS
from .orders import check_permutations

__all__ = ["conv1d_silu", "selective_scan"]

# Raise the number when a schema below changes: an older copy of the pack in the process may have registered its own.
NAMESPACE = "zigma_2"

_SCAN_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? input_order, Tensor? output_order"
)
SCHEMAS = {
    "selective_scan": f"({_SCAN_INPUTS}, bool keep, str backend) -> (Tensor, Tensor)",
    # Gradients of absent inputs come back as empty tensors: a schema has no optional outputs.
    "selective_scan_backward": f"(Tensor d_out, {_SCAN_INPUTS}, Tensor states, str backend) -> Tensor[]",
    "selective_scan_over_delta": (
        "(Tensor u, Tensor(a!) delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
        "bool delta_softplus, str backend) -> ()"
    ),
    "conv1d_silu": "(Tensor x, Tensor weight, Tensor? bias, Tensor? order, str backend) -> Tensor",
    "conv1d_silu_backward": (
        "(Tensor d_out, Tensor x, Tensor weight, Tensor? bias, Tensor? order, str backend) -> Tensor[]"
    ),
}


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, backend) -> Tensor:
    """Step k reads u, delta, B, C at row input_order[k], and z and the output at row output_order[k]."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    # Decided here and not by the backend, which runs below autograd and cannot know.
    keep = _has_gradients(inputs)
    operator = getattr(torch.ops, NAMESPACE).selective_scan
    return operator(*inputs, delta_softplus, input_order, output_order, keep, backend)[0]


def can_overwrite_delta(u, delta, A, B, C, D, z, delta_bias, backend: str) -> bool:
    """Whether `selective_scan_over_delta` can stand for `selective_scan` without orders.

    Not within torch.compile, which may have other uses for delta and would copy it.
    """
    return (
        hasattr(BACKENDS[backend], "scan_over_delta")
        and delta.dtype == u.dtype
        and delta.is_contiguous()
        and not _has_gradients((u, delta, A, B, C, D, z, delta_bias))
        and not torch.compiler.is_compiling()
    )


def selective_scan_over_delta(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend) -> Tensor:
    """delta, which holds the result then: without memory for one, which would come fresh from the system each time."""
    operator = getattr(torch.ops, NAMESPACE).selective_scan_over_delta
    operator(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend)
    return delta


def _has_gradients(inputs) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None, backend: str) -> Tensor:
    """x (b, l, d) in raster order, weight (d, k) -> (b, l, d) in scan order."""
    return getattr(torch.ops, NAMESPACE).conv1d_silu(x, weight, bias, order, backend)


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, keep, backend):
    check_permutations(input_order, output_order)  # here, for a compiled graph runs this alone
    return BACKENDS[backend].scan_forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, keep
    )


def _scan_fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, keep, backend):
    shape = BACKENDS[backend].states_shape(*u.shape, A.shape[1]) if keep else (0,)
    return torch.empty_like(u, memory_format=torch.contiguous_format), A.new_empty(shape)


def _scan_over_delta(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend) -> None:
    BACKENDS[backend].scan_over_delta(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _scan_over_delta_fake(*_arguments) -> None:
    """It has no result of its own."""


def _scan_backward(d_out, *arguments) -> list[Tensor]:
    *arguments, backend = arguments
    grads = BACKENDS[backend].scan_backward(d_out, *arguments)
    return [d_out.new_empty(0) if grad is None else grad for grad in grads]


def _scan_backward_fake(d_out, *arguments) -> list[Tensor]:
    return [d_out.new_empty(0) if t is None else t.new_empty(t.shape) for t in arguments[:8]]


def _scan_setup(ctx, inputs, output) -> None:
    *inputs, ctx.backend = inputs
    tensors, (ctx.delta_softplus, input_order, output_order, _keep) = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, input_order, output_order, output[1])


def _scan_autograd(ctx, d_out, _d_states):
    *tensors, input_order, output_order, states = ctx.saved_tensors
    grads = getattr(torch.ops, NAMESPACE).selective_scan_backward(
        d_out, *tensors, ctx.delta_softplus, input_order, output_order, states, ctx.backend
    )
    grads = [None if t is None else grad for t, grad in zip(tensors, grads, strict=True)]
    return *grads, None, None, None, None, None


def _conv(x, weight, bias, order, backend) -> Tensor:
    check_permutations(order)
    return BACKENDS[backend].conv_forward(x, weight, bias, order)


def _conv_fake(x, weight, bias, order, backend) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _conv_backward(d_out, x, weight, bias, order, backend) -> list[Tensor]:
    grads = BACKENDS[backend].conv_backward(d_out, x, weight, bias, order)
    return [d_out.new_empty(0) if grad is None else grad for grad in grads]


def _conv_backward_fake(d_out, x, weight, bias, order, backend) -> list[Tensor]:
    return [d_out.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias)]


def _conv_setup(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _conv_autograd(ctx, d_out):
    x, weight, bias, order = ctx.saved_tensors
    d_x, d_weight, d_bias = getattr(torch.ops, NAMESPACE).conv1d_silu_backward(
        d_out, x, weight, bias, order, ctx.backend
    )
    return d_x, d_weight, None if bias is None else d_bias, None, None


# name: (implementation, shapes alone, what is kept for backward, backward)
_OPERATORS = {
    "selective_scan": (_scan, _scan_fake, _scan_setup, _scan_autograd),
    "selective_scan_backward": (_scan_backward, _scan_backward_fake, None, None),
    "selective_scan_over_delta": (_scan_over_delta, _scan_over_delta_fake, None, None),
    "conv1d_silu": (_conv, _conv_fake, _conv_setup, _conv_autograd),
    "conv1d_silu_backward": (_conv_backward, _conv_backward_fake, None, None),
}


def _register() -> None:
    operators = getattr(torch.ops, NAMESPACE)
    if getattr(operators, "registered", None) is not None:
        return
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, (run, fake, setup, backward) in _OPERATORS.items():
        qualified = f"{NAMESPACE}::{name}"
        library.define(name + SCHEMAS[name])
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=library)
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup, lib=library)
    operators.registered = library  # definitions end with this object, and modules come and go


_register()
