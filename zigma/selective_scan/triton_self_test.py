"""What the Triton kernels compute on a device, compared with the reference: miscompilation must not pass in silence."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, stream, surroundings, triton_backend


def self_test(device: torch.device, b: int = 2, l: int = 37, d: int = 48, n: int = 16) -> str | None:
    """A small problem, forward and backward, in one pass and split, against the reference; what went wrong, or None."""
    with surroundings.autograd_of_its_own(device.type):
        try:
            errors = (_scan_error(device, b, l, d, n), _conv_error(device, b, l, d), _norm_error(device, b, l, d))
            return next((error for error in errors if error is not None), None)
        except Exception as error:  # whatever a compiler, linker or driver raises, other backends still work
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _scan_error(device: torch.device, b: int, l: int, d: int, n: int) -> str | None:
    shapes = ((b, l, d), (b, l, d), (d, n), (b, l, n), (b, l, n), (d,), (b, l, d), (d,))
    (*inputs, d_out), order = _draw(*shapes, (b, l, d)), _draw_order(l)
    inputs[2] = -inputs[2].exp()

    def scan(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
        u, delta, B, C, z = (t[:, order] for t in (u, delta, B, C, z))
        return reference.scan(u, delta, A, B, C, D, z, delta_bias, True, None, None)[:, order.argsort()]

    want = _with_gradients(scan, inputs, d_out)
    *inputs, d_out, on_device = (t.to(device) for t in (*inputs, d_out, order))
    arguments = (*inputs, True, on_device, on_device)
    for programs in (1, triton_backend.PROGRAMS):
        out, states = triton_backend.scan_forward(*arguments, True, programs=programs)
        grads = triton_backend.scan_backward(d_out, *arguments, states, programs=programs)
        if (error := _difference("scan", (out, *grads), want)) is not None:
            return error
    return None


def _conv_error(device: torch.device, b: int, l: int, d: int) -> str | None:
    (*inputs, d_out), order = _draw((b, l, d), (d, 4), (d,), (b, l, d)), _draw_order(l)
    want = _with_gradients(lambda *t: reference.conv1d_silu(*t, order), inputs, d_out)
    *inputs, d_out, order = (t.to(device) for t in (*inputs, d_out, order))
    out = triton_backend.conv_forward(*inputs, order)
    return _difference("convolution", (out, *triton_backend.conv_backward(d_out, *inputs, order)), want)


def _norm_error(device: torch.device, b: int, l: int, d: int) -> str | None:
    rows, ones = (b, l, d), (b, 1, d)
    tensors, order = _draw(rows, rows, ones, rows, (d,), (d,), ones, ones), _draw_order(l)
    for layer_norm in (False, True):
        settings = (1e-5, layer_norm, torch.float32, True)
        want = stream.composed(*tensors, order, *settings)
        got = triton_backend.norm_forward(*(t.to(device) for t in (*tensors, order)), *settings)
        if (error := _difference("norm", got, want)) is not None:
            return error
    return None


def _draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _draw_order(l: int) -> Tensor:
    return torch.randperm(l, generator=torch.Generator().manual_seed(0))


def _with_gradients(function, inputs: list[Tensor], d_out: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def _difference(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> str | None:
    for result, expected in zip(got, want, strict=True):
        error = (result.cpu() - expected).abs().max() / expected.abs().max()
        if not error < 1e-4:
            return f"relative error {float(error):.1e} of the {name} against the reference"
    return None
