"""The scan and the convolution as `torch.library` operators, so that autograd, torch.compile and export see one node.

Each operator takes the name of the backend that computes it; which one that is has been decided before (dispatch.py).
The definitions are global to a process. A host may load this pack twice, under two names or after a reload: the copy
that comes first registers, the others use what they find.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .dispatch import BACKENDS
from .orders import check_permutations

__all__ = ["conv1d_silu", "selective_scan"]

# Raise the number when a schema below changes: an older copy of the pack in the process may have registered its own.
NAMESPACE = "zigma_1"

_SCAN_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? input_order, Tensor? output_order"
)
SCHEMAS = {
    "selective_scan": f"({_SCAN_INPUTS}, bool keep, str backend) -> (Tensor, Tensor)",
    # Gradients of absent inputs come back as empty tensors: a schema has no optional outputs.
    "selective_scan_backward": f"(Tensor d_out, {_SCAN_INPUTS}, Tensor states, str backend) -> Tensor[]",
    "conv1d_silu": "(Tensor x, Tensor weight, Tensor? bias, Tensor? order, str backend) -> Tensor",
    "conv1d_silu_backward": (
        "(Tensor d_out, Tensor x, Tensor weight, Tensor? bias, Tensor? order, str backend) -> Tensor[]"
    ),
}


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, backend,
    overwrite_delta=False, overwrite_z=False,
) -> Tensor:  # fmt: skip
    """Step k reads u, delta, B, C at row input_order[k], and z and the output at row output_order[k].

    overwrite_delta, overwrite_z: where nobody wants gradients, a backend may return one of them, written over: delta
    without orders, z with whatever order.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if operators_are_looked_at(*inputs):
        # `keep` is decided here and not by the backend, which runs below autograd and cannot know.
        keep = gradients_wanted(inputs) or transformed()  # whose inner levels tell nothing of the outer ones
        return _operator("selective_scan")(*inputs, delta_softplus, input_order, output_order, keep, backend)[0]
    module = BACKENDS[backend]
    check_permutations(input_order, output_order)
    if hasattr(module, "scan_over"):
        moves = input_order is not None or output_order is not None
        for place, allowed in ((delta, overwrite_delta and not moves), (z, overwrite_z)):
            if allowed and place is not None and place.dtype == u.dtype and _rows_lie_apart(place):
                module.scan_over(place, *inputs, delta_softplus, input_order, output_order)
                return place
    return module.scan_forward(*inputs, delta_softplus, input_order, output_order, False)[0]


def conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None, backend: str, overwrite_x: bool = False
) -> Tensor:
    """x (b, l, d) in raster order, weight (d, k) -> (b, l, d) in scan order.

    overwrite_x: where nobody wants gradients and there is no order, a backend may return x, written over.
    """
    if operators_are_looked_at(x, weight, bias):
        return _operator("conv1d_silu")(x, weight, bias, order, backend)
    module = BACKENDS[backend]
    if overwrite_x and order is None and _rows_lie_apart(x) and hasattr(module, "conv_over_x"):
        module.conv_over_x(x, weight, bias)
        return x
    check_permutations(order)
    return module.conv_forward(x, weight, bias, order)


def _rows_lie_apart(x: Tensor) -> bool:
    """Whether each row of x (b, l, d) is dense, and no two share memory, as they do in an expanded tensor."""
    (b, l, d), (sheet, row, column) = x.shape, x.stride()
    return column == 1 and (l == 1 or row >= d) and (b == 1 or sheet >= (l - 1) * row + d)


def operators_are_looked_at(*inputs: Tensor | None) -> bool:
    """Whether anybody needs an operator to be one: autograd, a compiler, tracer, transform, mode or profiler.

    Else the backend is called at once. The way through an operator takes some 40 us, and after matrix products, which
    leave little of it in the caches, several times that: 5 % of a step of the demo model.
    """
    if torch.compiler.is_compiling() or gradients_wanted(inputs):
        return True
    if any(t is not None and type(t) is not Tensor and type(t) is not Parameter for t in inputs):
        return True  # fake tensors, distributed ones, quantized ones
    try:
        if forward_ad._current_level >= 0:
            _refuse_tangents(inputs)
            return True
        return (
            torch._C._len_torch_dispatch_stack() > 0
            or transformed()
            or torch._C._get_tracing_state() is not None
            or torch.autograd._profiler_enabled()
        )
    except AttributeError:  # of another torch, which has these things under other names
        return True


def transformed() -> bool:
    """Whether a transform of torch.func is at work (grad, vmap, ...), which asks more of an operator than autograd."""
    try:
        return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    except AttributeError:  # of another torch
        return False


def _refuse_tangents(inputs) -> None:
    """An operator without a rule for them drops them without a word."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise NotImplementedError(
            "selective scan: got a tensor with a forward-mode tangent, expected none: use reverse mode "
            "(torch.autograd.grad, torch.func.vjp) or backend='reference'"
        )


def gradients_wanted(inputs) -> bool:
    """Of any of the inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, keep, backend):
    check_permutations(input_order, output_order)  # here, for a compiled graph runs this alone
    return BACKENDS[backend].scan_forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, keep
    )


def _scan_fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, keep, backend):
    shape = BACKENDS[backend].states_shape(*u.shape, A.shape[1]) if keep else (0,)
    return torch.empty_like(u, memory_format=torch.contiguous_format), A.new_empty(shape)


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
    grads = _operator("selective_scan_backward")(
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
    d_x, d_weight, d_bias = _operator("conv1d_silu_backward")(d_out, x, weight, bias, order, ctx.backend)
    return d_x, d_weight, None if bias is None else d_bias, None, None


def _nothing_kept(ctx, inputs, output) -> None:
    pass


def _no_second_derivatives(ctx, *_gradients):
    """An operator without a backward of its own would be taken for a constant, and give a wrong result."""
    raise NotImplementedError(
        "selective scan: the kernels have no second derivatives: use backend='reference', or set "
        "ZIGMA_SCAN_BACKEND=reference, which is slow and has them"
    )


def _one_by_one(operator):
    """The rule for torch.func.vmap: each entry of the mapped dimension is a call of the operator."""

    def rule(info, in_dims, *arguments):
        def entry(i: int) -> list:
            return [a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)]

        results = [operator(*entry(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        kind = type(results[0])  # a tuple of the schema's outputs, or a list where it has one
        return kind(torch.stack(parts) for parts in zip(*results, strict=True)), kind(0 for _ in results[0])

    return rule


# name: (implementation, shapes alone, what is kept for backward, backward)
_OPERATORS = {
    "selective_scan": (_scan, _scan_fake, _scan_setup, _scan_autograd),
    "selective_scan_backward": (_scan_backward, _scan_backward_fake, _nothing_kept, _no_second_derivatives),
    "conv1d_silu": (_conv, _conv_fake, _conv_setup, _conv_autograd),
    "conv1d_silu_backward": (_conv_backward, _conv_backward_fake, _nothing_kept, _no_second_derivatives),
}


def _transformable(name: str, setup, backward) -> type[torch.autograd.Function]:
    """The operator for torch.func.grad and its like, which do not take the backward that is registered with it."""

    def forward(*arguments):
        found = getattr(getattr(torch.ops, NAMESPACE), name)(*arguments)
        return tuple(found) if isinstance(found, list) else found  # of a list, autograd would see nothing

    methods = {"forward": forward, "setup_context": setup, "backward": backward}
    members = {"generate_vmap_rule": True, **{key: staticmethod(method) for key, method in methods.items()}}
    return type(name, (torch.autograd.Function,), members)


_TRANSFORMABLE = {
    name: _transformable(name, setup, backward) for name, (_, _, setup, backward) in _OPERATORS.items()
}


def _operator(name: str):
    return _TRANSFORMABLE[name].apply if transformed() else getattr(getattr(torch.ops, NAMESPACE), name)


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
        if hasattr(torch.library, "register_vmap"):  # from torch 2.5 on
            torch.library.register_vmap(qualified, _one_by_one(getattr(operators, name)), lib=library)
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=library)
    operators.registered = library  # definitions end with this object, and modules come and go


_register()
