"""The selective scan and the ordered convolution in Triton, for GPUs of NVIDIA and AMD.

The algorithm, of Gu and Dao (arXiv 2312.00752, algorithm 2), stands in `triton_kernels`. It has been verified in
Triton's interpreter on the CPU, and compiled for sm_75, sm_90, sm_120, gfx942 and gfx1100; it has not been run on a
GPU yet. Therefore a small problem is compared with the reference on the device before the first use of it, and what
fails there leaves the work to another backend.

Triton is imported when it is first needed.
"""

from __future__ import annotations

import functools
import sys
import threading
from types import ModuleType

import torch
from torch import Tensor

NAME = "triton"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 16  # steps per tile, and per state kept for backward
BLOCK_D = 16  # channels per program of the scan
BLOCK_N = 16  # states per tile
CARRY_BLOCK = 256
CONV_BLOCK_T, CONV_BLOCK_D = 32, 64
# Enough programs to occupy the largest devices. A constant, since results must not depend on the device's size.
PROGRAMS = 2048

_lock = threading.Lock()
_self_tests: dict[int, str | None] = {}


def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine, with the remedy, or None."""
    if (failure := _import_failure()) is not None:
        return failure
    if _interpreted(_kernels()):
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU that Triton compiles for, install a GPU build of torch and its driver"
    from .triton_self_test import self_test

    index = torch.cuda.current_device()
    with _lock:
        if index not in _self_tests:
            _self_tests[index] = self_test(torch.device("cuda", index))
    if _self_tests[index] is None:
        return None
    name = torch.cuda.get_device_name(index)
    return f"Triton failed its self-test on {name} ({_self_tests[index]}), update triton and the driver of the GPU"


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors (device or dtype), or None."""
    devices = ("cpu", "cuda") if _interpreted(_kernels()) else ("cuda",)
    for t in tensors:
        if t is None:
            continue
        if t.device.type not in devices:
            return f"works on GPUs (and with TRITON_INTERPRET=1, for tests, on the CPU), not on {t.device}"
        if t.dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16, not {t.dtype}"
        if t.dtype == torch.bfloat16 and t.device.type == "cuda" and (reason := _without_bfloat16(t.device.index)):
            return reason
    return None


@functools.cache
def _without_bfloat16(index: int | None) -> str | None:
    """Turing and older lack the instructions, which Triton writes all the same before version 3.3."""
    import triton

    release = tuple(map(int, triton.__version__.split(".")[:2]))
    if torch.version.hip or release >= (3, 3) or torch.cuda.get_device_capability(index) >= (8, 0):
        return None
    name = torch.cuda.get_device_name(index)
    return f"takes bfloat16 on {name} from Triton 3.3 on, not with {triton.__version__}: use float16, or update torch"


def describe() -> str:
    """What the kernels are compiled for, such as "Triton 3.2.0, sm_90", or that they are interpreted."""
    import triton

    if _interpreted(_kernels()):
        return f"Triton {triton.__version__}, interpreted"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    architecture = getattr(properties, "gcnArchName", None) if torch.version.hip else None
    return f"Triton {triton.__version__}, {architecture or f'sm_{properties.major}{properties.minor}'}"


def states_shape(b: int, l: int, d: int, n: int) -> tuple[int, ...]:
    """Shape of the states kept for backward: one before every chunk of steps."""
    return b, _ceil(l, CHUNK), d, n


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache  # this is asked at every call of the operator
def _import_failure() -> str | None:
    try:
        _kernels()
    except Exception as error:  # a broken installation raises all kinds
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"Triton cannot be imported ({error}), install it with `pip install {package}`"
    return None


def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def _row_kernels() -> ModuleType:
    from . import triton_row_kernels

    return triton_row_kernels


def _interpreted(kernels: ModuleType) -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were defined, which is when Triton looks at it."""
    from triton.runtime.jit import JITFunction

    return not isinstance(kernels.scan_outputs, JITFunction)


@functools.cache
def _warp_size() -> int:
    """Threads per warp: 64 on AMD's data centre GPUs."""
    if not torch.cuda.is_available():
        return 32
    import triton

    return triton.runtime.driver.active.get_current_target().warp_size


def _launch(kernel, grid: int, tensors: tuple, sizes: tuple, *, threads: int = 128, **constants) -> None:
    """The one place where kernels start: on the device of their tensors, in Triton's order of arguments."""
    device = tensors[0].device
    options = {"num_warps": max(1, threads // _warp_size()), "enable_fp_fusion": True}
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[(grid,)](*tensors, *sizes, **constants, **options)


def _block(limit: int, size: int) -> int:
    """The smallest power of two that holds size, at most limit."""
    return min(limit, 1 << (size - 1).bit_length())


def _split(b: int, l: int, d: int, n: int, programs: int) -> tuple[int, int]:
    """(segments, chunks per segment) of the sequence.

    As few segments as give that many programs: one, and with it a single pass over memory, when batch and channels
    alone suffice; at most one per chunk. A state of more than BLOCK_N numbers per channel does not stay in
    registers from one chunk to the next, and takes a segment per chunk.
    """
    chunks = _ceil(l, CHUNK)
    if n > BLOCK_N:
        return chunks, 1
    wanted = min(chunks, _ceil(programs, b * _ceil(d, _block(BLOCK_D, d))))
    per_segment = _ceil(chunks, wanted)
    return _ceil(chunks, per_segment), per_segment


def _dense_rows(t: Tensor | None) -> Tensor | None:
    """t itself if its last dimension is contiguous, which is all the kernels ask for; else a copy."""
    return t if t is None or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Batch and row strides of each tensor in elements, zeros where it is absent."""
    return tuple(0 if t is None else t.stride(axis) for t in tensors for axis in (0, 1))


def _constants(d: int, n: int, delta_softplus: bool) -> dict[str, int | bool]:
    block_n = _block(BLOCK_N, max(n, 1))
    return {
        "SOFTPLUS": bool(delta_softplus),
        "CHUNK": CHUNK,
        "BLOCK_D": _block(BLOCK_D, d),
        "BLOCK_N": block_n,
        "BLOCKS_N": max(1, _ceil(n, block_n)),
    }


def _carry(A: Tensor, added: Tensor, sum_dt: Tensor, starts: Tensor, *, reverse: bool) -> None:
    """Fills starts (b, segments, d, n): the state before every segment, or, in reverse, its gradient after it."""
    b, segments, d, n = added.shape
    if added.numel():
        block = _block(CARRY_BLOCK, d * n)
        tensors, constants = (A, added, sum_dt, starts), {"REVERSE": reverse, "BLOCK": block}
        _launch(_kernels().scan_carry, b * _ceil(d * n, block), tensors, (segments, d, n), **constants)


def scan_forward(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    input_order,
    output_order,
    keep,
    *,
    programs: int = PROGRAMS,
) -> tuple[Tensor, Tensor]:
    """The output and, if `keep`, the states that `scan_backward` starts from; else an empty tensor.

    The kernels read u, delta, B, C at rows input_order and read z and write the output at rows output_order.
    programs: how many the sequence is split for, see `_split`.
    """
    (b, l, d), n = u.shape, A.shape[1]
    u, delta, B, C, z = (_dense_rows(t) for t in (u, delta, B, C, z))
    A, D, delta_bias, input_order, output_order = _contiguous(A, D, delta_bias, input_order, output_order)
    out = u.new_empty(b, l, d)
    states = A.new_empty(states_shape(b, l, d, n) if keep else (0,))
    if out.numel() == 0:
        return out, states
    kernels, constants = _kernels(), _constants(d, n, delta_softplus)
    segments, per_segment = _split(b, l, d, n, programs)
    sizes = (l, segments, per_segment, d, n)
    grid = b * segments * _ceil(d, constants["BLOCK_D"])
    starts = None
    if segments > 1:
        added, sum_dt = A.new_empty(b, segments, d, n), A.new_empty(b, segments, d)
        tensors = (u, delta, A, B, delta_bias, input_order, added, sum_dt)
        _launch(kernels.scan_segment_states, grid, tensors, (*sizes, *_strides(u, delta, B)), **constants)
        starts = states if keep and per_segment == 1 else torch.empty_like(added)
        _carry(A, added, sum_dt, starts, reverse=False)
    kept = states if keep and starts is not states else None
    tensors = (u, delta, A, B, C, D, z, delta_bias, input_order, output_order, starts, kept, out)
    _launch(kernels.scan_outputs, grid, tensors, (*sizes, *_strides(u, delta, B, C, z)), **constants)
    return out, states


def scan_backward(
    d_out,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    input_order,
    output_order,
    states,
    *,
    programs: int = PROGRAMS,
) -> tuple[Tensor | None, ...]:
    """Gradients for u, delta, A, B, C, D, z, delta_bias, each in its input's dtype; None for absent inputs."""
    (b, l, d), n = u.shape, A.shape[1]
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if u.numel() == 0:
        return tuple(None if t is None else torch.zeros_like(t) for t in inputs)
    u, delta, B, C, z, d_out = (_dense_rows(t) for t in (u, delta, B, C, z, d_out))
    A, D, delta_bias, input_order, output_order = _contiguous(A, D, delta_bias, input_order, output_order)
    kernels, constants = _kernels(), _constants(d, n, delta_softplus)
    segments, per_segment = _split(b, l, d, n, programs)
    sizes = (l, segments, per_segment, d, n)
    blocks = _ceil(d, constants["BLOCK_D"])
    grid = b * segments * blocks
    ends = None
    if segments > 1:
        added, sum_dt = A.new_empty(b, segments, d, n), A.new_empty(b, segments, d)
        tensors = (d_out, delta, A, C, z, delta_bias, input_order, output_order, added, sum_dt)
        strides = _strides(d_out, delta, C, z)
        _launch(kernels.scan_segment_gradients, grid, tensors, (*sizes, *strides), **constants)
        ends = torch.empty_like(added)
        _carry(A, added, sum_dt, ends, reverse=True)
    d_u, d_delta = u.new_empty(b, l, d), delta.new_empty(b, l, d)
    d_z = None if z is None else z.new_empty(b, l, d)
    d_A, d_B, d_C = A.new_empty(b, segments, d, n), A.new_empty(blocks, b, l, n), A.new_empty(blocks, b, l, n)
    d_D, d_bias = (None if t is None else A.new_empty(b, segments, d) for t in (D, delta_bias))
    tensors = (d_out, u, delta, A, B, C, D, z, delta_bias, input_order, output_order, states, ends)
    tensors += (d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias)
    strides = _strides(d_out, u, delta, B, C, z)
    _launch(kernels.scan_gradients, grid, tensors, (b, *sizes, *strides), threads=256, **constants)
    d_B, d_C = d_B.sum(0).to(B.dtype), d_C.sum(0).to(C.dtype)
    d_A, d_D, d_bias = (None if t is None else t.sum((0, 1)) for t in (d_A, d_D, d_bias))
    return d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor | None) -> Tensor:
    """SiLU of the depthwise causal convolution along `order`; x raster, result in scan order."""
    x = _dense_rows(x)
    weight, bias, order = _contiguous(weight, bias, order)
    out = x.new_empty(x.shape)
    if out.numel():
        grid, constants = _conv_grid(x, weight)
        sizes = (*x.shape[1:], *_strides(x))
        _launch(_row_kernels().conv_outputs, grid, (x, weight, bias, order, out), sizes, **constants)
    return out


def conv_backward(d_out, x, weight, bias, order) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients for x, weight and bias."""
    if x.numel() == 0:
        return tuple(None if t is None else torch.zeros_like(t) for t in (x, weight, bias))
    d_out, x = _dense_rows(d_out), _dense_rows(x)
    weight, bias, order = _contiguous(weight, bias, order)
    (b, l, d), width = x.shape, weight.shape[1]
    grid, constants = _conv_grid(x, weight)
    pieces = _ceil(l, constants["BLOCK_T"])
    d_v, d_x = x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape)
    d_weight = weight.new_empty(b, pieces, d, width)
    d_bias = None if bias is None else weight.new_empty(b, pieces, d)
    kernels = _row_kernels()
    tensors, sizes = (d_out, x, weight, bias, order, d_v, d_weight, d_bias), (l, d, *_strides(d_out, x))
    _launch(kernels.conv_parameter_gradients, grid, tensors, sizes, **constants)
    _launch(kernels.conv_input_gradients, grid, (d_v, weight, order, d_x), (l, d), **constants)
    return d_x, d_weight.sum((0, 1)), None if d_bias is None else d_bias.sum((0, 1))


def _conv_grid(x: Tensor, weight: Tensor) -> tuple[int, dict[str, int]]:
    b, l, d = x.shape
    constants = {"WIDTH": weight.shape[1], "BLOCK_T": _block(CONV_BLOCK_T, l), "BLOCK_D": _block(CONV_BLOCK_D, d)}
    return b * _ceil(l, constants["BLOCK_T"]) * _ceil(d, constants["BLOCK_D"]), constants


def norm_forward(
    base, mix, gate, residual, weight, bias, shift, scale, gather, eps, layer_norm, total, keep_norm
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(x, u, m): x = base + gate mix + residual at rows `gather`, u = norm(x) weight + bias, m = u (1 + scale) + shift.

    Sums and norms are float32 (RMSNorm: arXiv 1910.07467, equation 4; LayerNorm: arXiv 1607.06450; modulation: adaLN
    of DiT, arXiv 2212.09748, section 3.2). Forward only: for gradients `stream.add_norm` composes torch operations.

    Args:
        base: (b, l, d); mix: (b, l, d) or None; residual: (b, l, d) or None.
        gate, shift, scale: (b, d) or (b, 1, d), or None; shift and scale together.
        weight, bias: (d,) or None.
        gather: (l,) int64 row of base, mix and residual for each row of the results, or None.
        eps: added to the mean square or variance.
        layer_norm: LayerNorm in place of RMSNorm.
        total: dtype in which x is wanted; None leaves it out.
        keep_norm: whether u is wanted.

    Returns:
        (x or None, u or None, m or None), all (b, l, d); u and m in the dtype of base.
    """
    b, l, d = base.shape
    x = None if total is None else base.new_empty(base.shape, dtype=total)
    normed = base.new_empty(base.shape) if keep_norm else None
    modulated = None if scale is None else base.new_empty(base.shape)
    if base.numel():
        base, mix, residual = (_dense_rows(t) for t in (base, mix, residual))
        gate, shift, scale = (None if t is None else _dense_rows(t.reshape(b, d)) for t in (gate, shift, scale))
        weight, bias, gather = _contiguous(weight, bias, gather)
        tensors = (base, mix, gate, residual, weight, bias, shift, scale, gather, x, normed, modulated)
        batches = (0 if t is None else t.stride(0) for t in (gate, shift, scale))
        sizes = (l, d, float(eps), *_strides(base, mix, residual), *batches)
        block = 1 << (d - 1).bit_length()
        threads = min(1024, max(32, block // 8))
        constants = {"LAYER_NORM": bool(layer_norm), "BLOCK": block}
        _launch(_row_kernels().rows_outputs, b * l, tensors, sizes, threads=threads, **constants)
    return x, normed, modulated
