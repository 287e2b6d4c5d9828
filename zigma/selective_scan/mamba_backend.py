"""The selective scan by the CUDA kernels of an installed mamba-ssm (Gu and Dao, arXiv 2312.00752), CUDA only.

This module has not been run on a GPU: it is tested against a stand-in that checks every call as the extension does.

Calls `selective_scan_cuda`, the extension's own module, whose two functions have kept their signatures from mamba-ssm
1.0 to 2.3; the package itself, with its imports, is not needed. It wants (b, d, l) and (b, 1, n, l) with contiguous
last dimensions, one dtype for u, delta, B, C and z, float32 for A, D and delta_bias, and n <= 256. It cannot gather:
orders are applied by the copies that bring tensors into its layout. Its backward adds up d_A, d_B, d_C, d_D and
d_delta_bias by atomic additions, so those differ by rounding from run to run.

The convolution is causal-conv1d's (1.5.1 or later) where that is installed and takes the width, else torch's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor

from . import torch_backend

NAME = "mamba-ssm"
CHUNK = 2048  # steps after which the kernel stores a state
MAX_STATES = 256
INSTALL = "`pip install mamba-ssm causal-conv1d --no-build-isolation`"
BUILD = "`MAMBA_KEEP_CUDA_BUILD=TRUE pip install --force-reinstall --no-deps mamba-ssm --no-build-isolation`"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, with the remedy, or None. The first call tries them on the GPU."""
    if importlib.util.find_spec("selective_scan_cuda") is None:
        if importlib.util.find_spec("mamba_ssm") is None:
            return f"mamba-ssm is not installed; {INSTALL} installs it"
        return f"mamba-ssm is installed without its CUDA extension selective_scan_cuda; {BUILD} builds it"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, and the adapter to mamba-ssm is for CUDA; choose another backend"
    if not torch.cuda.is_available():
        return "mamba-ssm needs a CUDA device and torch finds none; check the driver, or choose another backend"
    return _fault()


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors (device or dtype), or None."""
    for t in tensors:
        if t is None:
            continue
        if t.device.type != "cuda":
            return f"works on CUDA devices, not on {t.device}"
        if t.dtype not in _DTYPES:
            return f"takes float32, bfloat16 and float16, not {t.dtype}"
    return None


def describe() -> str:
    """The versions in use, such as "mamba-ssm 2.2.4, causal-conv1d 1.5.2"."""
    conv = f"causal-conv1d {_version('causal-conv1d')}" if _conv_functions() else "the convolution by torch"
    return f"mamba-ssm {_version('mamba-ssm')}, {conv}"


def states_shape(b: int, l: int, d: int, n: int) -> tuple[int, ...]:
    """Shape of what forward keeps for backward: states between the kernel's chunks, then the output before the gate.

    Kept rather than computed again, as mamba-ssm does: that would cost backward a whole forward. Float32 whatever the
    inputs are, which holds half precision exactly.
    """
    return (_chunk_floats(b, l, d, n) + b * d * l,)


def scan_forward(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output (b, l, d) in u's dtype and, if `keep`, what `scan_backward` needs, else an empty tensor.

    Step k reads u, delta, B and C at rows input_order[k], reads z and writes the output at rows output_order[k].
    """
    (b, l, d), n = u.shape, A.shape[1]
    kept = A.new_empty(states_shape(b, l, d, n) if keep else 0)
    if b * l * d * n == 0:  # a launch of no blocks would fail
        out, _ = torch_backend.scan_forward(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, False
        )
        return out, kept
    arguments = _arguments(u, delta, A, B, C, D, z, delta_bias, input_order, output_order)
    y, chunks, *gated = _extension().fwd(*arguments, bool(delta_softplus))
    if keep:
        size = _chunk_floats(b, l, d, n)
        if size:
            kept[: chunks.numel()] = chunks.flatten()
        kept[size:].view(b, d, l).copy_(y)
    return _rows(gated[0] if gated else y, output_order).to(u.dtype), kept


def scan_backward(
    d_out, u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, states
) -> tuple[Tensor | None, ...]:
    """Gradients for u, delta, A, B, C, D, z, delta_bias, each in its input's dtype; None for absent inputs."""
    (b, l, d), n = u.shape, A.shape[1]
    if b * l * d * n == 0:
        none = A.new_empty(torch_backend.states_shape(b, l, d, n))
        return torch_backend.scan_backward(
            d_out, u, delta, A, B, C, D, z, delta_bias, delta_softplus, input_order, output_order, none
        )
    dtype, size = _common_dtype(u, delta, B, C, z), _chunk_floats(b, l, d, n)
    arguments = _arguments(u, delta, A, B, C, D, z, delta_bias, input_order, output_order)
    chunks = states[: b * d * _chunks(l) * 2 * n].view(b, d, _chunks(l), 2 * n) if size else None
    y = None if z is None else states[size:].view(b, d, l).to(dtype)
    d_out = _columns(d_out, output_order, dtype)
    d_u, d_delta, d_A, d_B, d_C, d_D, d_bias, *d_z = _extension().bwd(
        *arguments, d_out, chunks, y, None, bool(delta_softplus), False
    )
    d_u, d_delta, d_B, d_C = (
        _rows(grad, input_order).to(t.dtype)
        for grad, t in ((d_u, u), (d_delta, delta), (d_B.squeeze(1), B), (d_C.squeeze(1), C))
    )
    d_z = None if z is None else _rows(d_z[0], output_order).to(z.dtype)
    return d_u, d_delta, d_A, d_B, d_C, None if D is None else d_D, d_z, None if delta_bias is None else d_bias


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """SiLU of the depthwise causal convolution along `order`; x (b, l, d) raster, result in scan order."""
    functions = _conv_functions()
    if functions is None or not _conv_fits(x, weight):
        return torch_backend.conv_forward(x, weight, bias, order)
    forward, _ = functions
    out = forward(*_conv_arguments(x, weight, bias, order), None, None, None, True)
    return out.transpose(1, 2).contiguous()


def conv_backward(d_out, x, weight, bias, order) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients for x (raster), weight and bias."""
    functions = _conv_functions()
    if functions is None or not _conv_fits(x, weight):
        return torch_backend.conv_backward(d_out, x, weight, bias, order)
    _, backward = functions
    arguments = _conv_arguments(x, weight, bias, order)
    d_out = _channels_first(d_out.to(x.dtype))
    d_x, d_weight, d_bias, *_ = backward(*arguments, d_out, None, None, None, None, False, True)
    return _rows(d_x, order), d_weight, None if bias is None else d_bias


def _extension() -> ModuleType:
    return importlib.import_module("selective_scan_cuda")


@functools.cache
def _conv_functions():
    """causal-conv1d's forward and backward without autograd, or None where they are missing or older than 1.5.1."""
    try:
        functions = importlib.import_module("causal_conv1d.cpp_functions")
        return functions.causal_conv1d_fwd_function, functions.causal_conv1d_bwd_function
    except (ImportError, AttributeError):
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _chunks(l: int) -> int:
    return -(-l // CHUNK)


def _chunk_floats(b: int, l: int, d: int, n: int) -> int:
    """Room for the states between chunks, none for one chunk; whole 16 bytes, to which the kernel's loads align."""
    return 0 if _chunks(l) < 2 else -(-b * d * _chunks(l) * 2 * n // 4) * 4


def _common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The one dtype that the kernel takes: that of all tensors, or float32."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _columns(t: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """t (b, l, w) as contiguous (b, w, l), steps in the order of the walk: one copy does both."""
    t = t.transpose(1, 2)
    return (t.contiguous() if order is None else t.index_select(2, order)).to(dtype)


def _rows(t: Tensor, order: Tensor | None) -> Tensor:
    """t (b, w, l) as contiguous (b, l, w), every step back at the row that `order` names."""
    t = t.transpose(1, 2)
    return t.contiguous() if order is None else t.index_select(1, order.argsort())


def _arguments(u, delta, A, B, C, D, z, delta_bias, input_order, output_order) -> tuple[Tensor | None, ...]:
    """u, delta, A, B, C, D, z, delta_bias as the kernel wants them."""
    dtype = _common_dtype(u, delta, B, C, z)
    u, delta, B, C = (_columns(t, input_order, dtype) for t in (u, delta, B, C))
    z = None if z is None else _columns(z, output_order, dtype)
    A, D, delta_bias = (None if t is None else t.contiguous() for t in (A, D, delta_bias))
    return u, delta, A, B[:, None], C[:, None], D, z, delta_bias


def _conv_fits(x: Tensor, weight: Tensor) -> bool:
    return x.numel() > 0 and 2 <= weight.shape[1] <= 4


def _channels_first(rows: Tensor) -> Tensor:
    """(b, l, d) as the (b, d, l) that causal-conv1d takes: the same memory if 8 divides d, else the other layout."""
    rows = rows.contiguous().transpose(1, 2)
    return rows if rows.shape[1] % 8 == 0 else rows.contiguous()


def _conv_arguments(x, weight, bias, order) -> tuple[Tensor, Tensor, Tensor | None]:
    walk = x if order is None else x.index_select(1, order)
    return _channels_first(walk), weight.contiguous(), None if bias is None else bias.contiguous()


def _test_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def _fault() -> str | None:
    """What is wrong with the installed kernels, found by loading them and trying a small problem; None if nothing."""
    try:
        _extension()
    except (ImportError, OSError) as error:
        return f"mamba-ssm's selective_scan_cuda does not load ({error}); {BUILD} builds it for this torch"
    try:
        error = _self_test(_test_device())
    except torch.cuda.OutOfMemoryError:
        raise  # says nothing about the kernels
    except (RuntimeError, TypeError) as exception:
        error = str(exception).strip().partition("\n")[0]
    return None if error is None else f"mamba-ssm failed its self-test ({error}); {BUILD} builds it for this GPU"


def _self_test(device: torch.device) -> str | None:
    """What is wrong with scans of one and two chunks and a convolution, forward and backward, or None."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    with torch.no_grad():
        for l in (40, CHUNK + 8):
            b, d, n = 2, 8, 3
            u, delta, z, B, C = draw(b, l, d), draw(b, l, d), draw(b, l, d), draw(b, l, n), draw(b, l, n)
            order, d_out = torch.randperm(l, generator=generator).to(device), draw(b, l, d)
            inputs = u, delta, -draw(d, n).exp(), B, C, draw(d), z, draw(d), True, order, order
            conv = u, draw(d, 4), draw(d), order
            found = []
            for module in (sys.modules[__name__], torch_backend):
                out, states = module.scan_forward(*inputs, True)
                found.append((
                    out, *module.scan_backward(d_out, *inputs, states),
                    module.conv_forward(*conv), *module.conv_backward(d_out, *conv),
                ))  # fmt: skip
            for got, want in zip(*found, strict=True):
                error = (got - want).abs().max() / want.abs().max()
                if not error < 1e-3:
                    return f"relative error {float(error):.1e} against plain torch"
    return None
