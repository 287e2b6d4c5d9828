"""The selective scan on the CPU by the native kernel (native/kernels.c): torch tensors in, C structures out."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native_library, reference, surroundings
from .native_library import CONV_ARGS, NORM_ARGS, SCAN_ARGS, NativeLibrary, NativeUnavailable

NAME = "native"
MAX_STATES, MAX_CONV_WIDTH = 256, 16  # of native/scan.h

_ABSENT = (0, 0, 0, 0)  # rows
_NO_GRADIENTS = 6 * _ABSENT + (0, 0, 0)  # the last nine fields of a scan
_DTYPES = {torch.float32: native_library.FLOAT32, torch.bfloat16: native_library.BFLOAT16}


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, with the remedy, or None."""
    try:
        native_library.load()
    except NativeUnavailable as error:
        return str(error)
    return None


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why the kernel cannot take these tensors (device or dtype), or None."""
    for t in tensors:
        if t is None:
            continue
        if t.device.type != "cpu":
            return f"works on the CPU, not on {t.device}"
        if t.dtype not in _DTYPES:
            return f"takes float32 and bfloat16, not {t.dtype}"
    return None


def describe() -> str:
    """The instruction set that the kernel uses here, such as "avx512"."""
    return native_library.load().instruction_set


def _dense_rows(t: Tensor | None) -> Tensor | None:
    """t itself if its last dimension is contiguous, all the kernel asks for, and its sign in memory; else a copy."""
    if t is None or ((t.stride(-1) == 1 or t.shape[-1] <= 1) and not t.is_neg()):
        return t
    return t.resolve_neg().contiguous()


def _rows(t: Tensor | None) -> tuple[int, int, int, int]:
    if t is None:
        return _ABSENT
    batch_stride, row_stride, _ = t.stride()
    return _pointer(t), batch_stride, row_stride, _DTYPES[t.dtype]


def _pointer(t: Tensor | None) -> int:
    if t is None:
        return 0
    if not t.is_cpu:  # an address of elsewhere, or none at all (meta), is no memory to the kernel
        raise RuntimeError(f"selective scan: got a tensor on {t.device} beside others on the CPU: move it there")
    return t.data_ptr()


def _fresh(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result of that shape, in the same dtype or another."""
    result = like.new_empty(like.shape, dtype=dtype or like.dtype)
    return native_library.load().use_huge_pages(result)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def states_shape(b: int, l: int, d: int, n: int, library: NativeLibrary | None = None) -> tuple[int, ...]:
    """Of what `scan_forward` keeps for backward: the states at the start of each chunk, in the kernel's own layout."""
    # Times b here: a compiler's symbol for the batch, given to the library, would become the number it has today.
    return (b * (library or native_library.load()).checkpoint_floats(1, l, d, n),)


def scan_forward(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, keep: bool,
    library: NativeLibrary | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the states that `scan_backward` starts from (empty unless `keep`).

    The kernel reads u, delta, B, C at rows input_order and reads z and writes the output at rows output_order.
    """
    (b, l, d), n = u.shape, A.shape[1]
    library = library or native_library.load()
    out = library.use_huge_pages(u.new_empty(b, l, d))
    states = A.new_empty(states_shape(b, l, d, n, library) if keep else (0,))
    _scan_into(
        out, states, library, u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order
    )  # fmt: skip
    return out, states


def scan_over(place: Tensor, u, delta, A, *rest) -> None:
    """The output of `scan_forward` in `place`: delta where there are no orders, or z; dense rows, the dtype of u."""
    _scan_into(place, A.new_empty(0), native_library.load(), u, delta, A, *rest)


def _scan_into(
    out: Tensor, states: Tensor, library: NativeLibrary,
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order,
) -> None:  # fmt: skip
    u, delta, B, C, z = (_dense_rows(t) for t in (u, delta, B, C, z))
    A, D, delta_bias, input_order, output_order = (
        _contiguous(t) for t in (A, D, delta_bias, input_order, output_order)
    )
    if out.numel():
        inputs = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order)
        library.call("scan_forward", _scan_args(*inputs, out, states, _NO_GRADIENTS))


def scan_backward(
    d_out, u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, states,
    library: NativeLibrary | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients for u, delta, A, B, C, D, z, delta_bias, each in its input's dtype; None for absent inputs."""
    (b, l, d), n = u.shape, A.shape[1]
    u, delta, B, C, z, d_out = (_dense_rows(t) for t in (u, delta, B, C, z, d_out))
    A, D, delta_bias, input_order, output_order = (
        _contiguous(t) for t in (A, D, delta_bias, input_order, output_order)
    )
    library = library or native_library.load()
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    grads = tuple(None if t is None else library.use_huge_pages(t.new_empty(t.shape)) for t in inputs)
    d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias = grads
    if b * l * d * n == 0:
        for t in grads:
            if t is not None:
                t.zero_()
        return grads
    gradients = [field for t in (d_out, d_u, d_delta, d_B, d_C, d_z) for field in _rows(t)]
    gradients += (_pointer(t) for t in (d_A, d_D, d_bias))
    args = (*inputs, delta_softplus, input_order, output_order, None, states, gradients)
    library.call("scan_backward", _scan_args(*args))
    return grads


def _scan_args(
    u, delta, A, B, C, D, z, bias, delta_softplus, input_order, output_order, out, states, gradients
) -> bytes:
    return SCAN_ARGS.pack(
        *u.shape, A.shape[1], delta_softplus, torch.get_num_threads(),
        _pointer(input_order), _pointer(output_order), _pointer(A), _pointer(D), _pointer(bias),
        *_rows(u), *_rows(delta), *_rows(B), *_rows(C), *_rows(z), *_rows(out),
        states.data_ptr() if states.numel() else 0, *gradients,
    )  # fmt: skip


def conv_forward(x: Tensor, weight: Tensor, bias, order) -> Tensor:
    """SiLU of the depthwise causal convolution along `order`; x raster, result in scan order."""
    out = _fresh(x)
    _conv_into(out, x, weight, bias, order)
    return out


def conv_over_x(x: Tensor, weight: Tensor, bias) -> None:
    """The result in place of x, whose rows are dense and do not overlap, read as they lie."""
    _conv_into(x, x, weight, bias, None)


def _conv_into(out: Tensor, x: Tensor, weight: Tensor, bias, order) -> None:
    x, weight, bias, order = _dense_rows(x), _contiguous(weight), _contiguous(bias), _contiguous(order)
    if out.numel():
        args = _conv_args(x, weight, bias, order, _rows(out), _ABSENT, _ABSENT, 0, 0)
        native_library.load().call("conv_forward", args)


def conv_backward(d_out, x, weight, bias, order) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients for x, weight and bias."""
    d_out, x = _dense_rows(d_out), _dense_rows(x)
    weight, bias, order = _contiguous(weight), _contiguous(bias), _contiguous(order)
    d_x, d_weight = _fresh(x), weight.new_zeros(weight.shape)
    d_bias = None if bias is None else bias.new_zeros(bias.shape)
    if d_x.numel():
        gradients = (_rows(d_out), _rows(d_x), _pointer(d_weight), _pointer(d_bias))
        native_library.load().call("conv_backward", _conv_args(x, weight, bias, order, _ABSENT, *gradients))
    return d_x, d_weight, d_bias


def _conv_args(x, weight, bias, order, out, d_out, d_x, d_weight, d_bias) -> bytes:
    return CONV_ARGS.pack(
        *x.shape, weight.shape[1], torch.get_num_threads(), _pointer(order), _pointer(weight), _pointer(bias),
        *_rows(x), *out, *d_out, *d_x, d_weight, d_bias,
    )  # fmt: skip


def norm_forward(*arguments) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Arguments and results as in `stream.add_norm`."""
    return norm_into((None, None, None), *arguments)


def norm_into(
    places, base, mix, gate, residual, weight, bias, shift, scale, gather, eps, layer_norm, total, keep_norm
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same, each result in its place if it has one: dense rows of its shape and dtype.

    Without a gather a place may be that of a summand: each row is read before it is written.
    """
    wanted = ((total is not None, total), (keep_norm, base.dtype), (scale is not None, base.dtype))
    x, normed, modulated = (
        (_fresh(base, dtype) if place is None else place) if needed else None
        for place, (needed, dtype) in zip(places, wanted, strict=True)
    )
    inputs = (base, mix, gate, residual, weight, bias, shift, scale, gather, eps, layer_norm)
    _run_norm("norm_forward", *inputs, (x, normed, modulated), (None,) * 6, (None,) * 5)
    return x, normed, modulated


def norm_backward(
    d_total, d_normed, d_modulated, base, mix, gate, residual, weight, bias, shift, scale, gather, eps, layer_norm
) -> tuple[Tensor | None, ...]:
    """Gradients for base, mix, gate, residual, weight, bias, shift and scale, each in its input's dtype."""
    inputs = (base, mix, gate, residual, weight, bias, shift, scale)
    d_x, d_mix, d_residual = (None if t is None else _fresh(t) for t in (base, mix, residual))
    summed = (gate, weight, bias, shift, scale)
    sums = [None if t is None else t.new_zeros(t.shape, dtype=torch.float32) for t in summed]
    d_gate, d_weight, d_bias, d_shift, d_scale = sums
    d_rows = (*(_dense_rows(t) for t in (d_total, d_normed, d_modulated)), d_x, d_residual, d_mix)
    d_sums = (d_gate, d_scale, d_shift, d_weight, d_bias)
    _run_norm("norm_backward", *inputs, gather, eps, layer_norm, (None,) * 3, d_rows, d_sums)
    grads = (d_x, d_mix, d_gate, d_residual, d_weight, d_bias, d_shift, d_scale)
    return tuple(None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))


def _run_norm(
    name: str, base, mix, gate, residual, weight, bias, shift, scale, gather, eps, layer_norm, outputs, d_rows, d_sums
) -> None:
    if not base.numel():
        return
    rows = [_dense_rows(t) for t in (base, mix, gate, residual, scale, shift)]
    weight, bias = (None if t is None else t.float().contiguous() for t in (weight, bias))
    gather = _contiguous(gather)
    args = NORM_ARGS.pack(
        *base.shape, torch.get_num_threads(), layer_norm, eps, _pointer(gather), _pointer(weight), _pointer(bias),
        *(field for t in (*rows, *outputs, *d_rows) for field in _rows(t)), *map(_pointer, d_sums),
    )  # fmt: skip
    native_library.load().call(name, args)


def self_test(library: NativeLibrary) -> str | None:
    """A small problem, forward and backward, against the reference; what went wrong, or None."""
    with surroundings.autograd_of_its_own("cpu"):
        generator = torch.Generator("cpu").manual_seed(0)
        b, l, d, n = 2, 19, 21, 16

        def draw(*shape: int) -> Tensor:
            # Whatever the defaults are.
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

        u, delta, z, B, C = draw(b, l, d), draw(b, l, d), draw(b, l, d), draw(b, l, n), draw(b, l, n)
        inputs = (u, delta, -draw(d, n).exp(), B, C, draw(d), z, draw(d))
        order, d_out = torch.randperm(l, generator=generator, device="cpu"), draw(b, l, d)
        out, states = scan_forward(*inputs, True, order, order, True, library)
        grads = scan_backward(d_out, *inputs, True, order, order, states, library)
        leaves = [t.clone().requires_grad_() for t in inputs]
        expected = reference.scan(*leaves, True, order, order)
        wanted = torch.autograd.grad(expected, leaves, d_out)
        for got, want in zip((out, *grads), (expected.detach(), *wanted), strict=True):
            error = (got - want).abs().max() / want.abs().max()
            if not error < 1e-4:
                return f"relative error {float(error):.1e} against the reference"
    return None
