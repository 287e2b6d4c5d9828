"""The Triton backend without a GPU: computed in Triton's interpreter, compiled for GPUs that are not here."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zigma.selective_scan import triton_backend

ROOT = Path(__file__).resolve().parents[2]
LAWS = Path(__file__).with_name("triton_interpreted.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="NOT TESTED: the Triton kernels, Triton is not installed (`pip install triton`)",
)


@needs_triton
def test_the_laws_hold_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(LAWS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* passed in", done.stdout, re.MULTILINE), done.stdout


TARGETS = {
    "sm_75": ("cuda", 75, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def kernels():
    """Every kernel of every module of kernels, by name; parts of kernels begin with an underscore."""
    from triton.runtime.jit import JITFunction

    found = {}
    for path in sorted((ROOT / "zigma" / "selective_scan").glob("triton_*kernels.py")):
        module = importlib.import_module(f"zigma.selective_scan.{path.stem}")
        functions = {name: f for name, f in vars(module).items() if isinstance(f, JITFunction)}
        found |= {name: f for name, f in functions.items() if not name.startswith("_")}
    return found


def launches(monkeypatch, dtype, l=64, d=64, n=16, complete=True):
    """What the backend would launch for such inputs: (kernel, arguments by name, constants, threads).

    Complete: with every optional input, the sequence split; else without them and in one pass where that is possible.
    """
    recorded = []

    def record(kernel, grid, tensors, sizes, *, threads=128, **constants):
        arguments = dict(zip(kernel.arg_names, (*tensors, *sizes), strict=False))
        recorded.append((kernel, arguments, constants, threads))

    monkeypatch.setattr(triton_backend, "_launch", record)
    u, B = torch.empty(2, l, d, dtype=dtype), torch.empty(2, l, n, dtype=dtype)
    A, D, weight, order = torch.empty(d, n), torch.empty(d), torch.empty(d, 4), torch.arange(l)
    options = (D, u, D, True, order, order) if complete else (None, None, None, False, None, None)
    programs = triton_backend.PROGRAMS if complete else 1
    _, states = triton_backend.scan_forward(u, u, A, B, B, *options, True, programs=programs)
    triton_backend.scan_backward(u, u, u, A, B, B, *options, states, programs=programs)
    bias, order = (D, order) if complete else (None, None)
    triton_backend.conv_forward(u, weight, bias, order)
    triton_backend.conv_backward(u, u, weight, bias, order)
    rows = (u, u[:, 0], u.float(), D, D, u[:, 0], u[:, 0], order) if complete else (None,) * 8
    triton_backend.norm_forward(u, *rows, 1e-6, complete, torch.float32 if complete else None, True)
    return recorded


def signature(kernel, arguments, constants):
    """Types, constants and divisibilities as Triton derives them from the arguments of a launch."""
    types, values, attributes = {}, dict(constants), {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments.get(parameter.name)
        if isinstance(value, torch.Tensor):
            types[name], divisible = POINTERS[value.dtype], True
        elif name in constants or value is None or (value == 1 and not parameter.do_not_specialize):
            types[name], divisible = "constexpr", False
            values.setdefault(name, value)
        elif isinstance(value, float):
            types[name], divisible = "fp32", False
        else:
            types[name], divisible = "i32", value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[index,] = [["tt.divisibility", 16]]
    return types, values, attributes


def compile_all(recorded, target):
    """Names of the kernels, each compiled once per signature."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip(f"NOT TESTED: compiling the Triton kernels, whose interface changed after {triton.__version__}")
    target, done = GPUTarget(*TARGETS[target]), set()
    for kernel, arguments, constants, threads in recorded:
        types, values, attributes = signature(kernel, arguments, constants)
        identity = (kernel.__name__, *types.values(), *values.values(), *attributes)
        if identity not in done:
            done.add(identity)
            options = {"num_warps": max(1, threads // target.warp_size), "enable_fp_fusion": True}
            compiled = triton.compile(ASTSource(kernel, types, values, attributes), target=target, options=options)
            assert compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    return {name for name, *_ in done}


@needs_triton
@pytest.mark.parametrize(
    "target, dtype",
    # Tiles are float32 as soon as they are loaded: for each vendor one target stands for all in float32.
    [*((target, torch.bfloat16) for target in TARGETS), ("sm_90", torch.float32), ("gfx942", torch.float32)],
)
def test_every_kernel_compiles(target, dtype, monkeypatch):
    """With all inputs, as the backend launches it; a kernel that is not launched here would be missing."""
    assert compile_all(launches(monkeypatch, dtype), target) == set(kernels())


@needs_triton
@pytest.mark.parametrize(
    "target, l, d, n", [("sm_75", 64, 48, 32), ("gfx1100", 1, 1, 1)], ids=["many states", "sizes of one"]
)
def test_every_kernel_compiles_without_what_is_optional(target, l, d, n, monkeypatch):
    """Triton makes a constant of a size of one and of an absent tensor, and another kernel with it."""
    names = compile_all(launches(monkeypatch, torch.float16, l, d, n, complete=False), target)
    assert names >= {"scan_outputs", "scan_gradients", "conv_outputs", "conv_input_gradients", "rows_outputs"}


def test_segments_hold_every_chunk():
    for b, l, d, n in [(1, 1, 1, 1), (1, 1024, 1536, 16), (1, 16384, 768, 16), (64, 256, 1536, 16), (2, 100, 7, 64)]:
        chunks = triton_backend.states_shape(b, l, d, n)[1]
        segments, per_segment = triton_backend._split(b, l, d, n, triton_backend.PROGRAMS)
        assert (segments - 1) * per_segment < chunks <= segments * per_segment
        assert segments == 1 or per_segment == 1 or b * segments * d / 16 >= triton_backend.PROGRAMS / 2
        if n > triton_backend.BLOCK_N:
            assert per_segment == 1
    assert triton_backend._split(64, 256, 1536, 16, triton_backend.PROGRAMS) == (1, 16)
    assert triton_backend._split(1, 1024, 1536, 16, triton_backend.PROGRAMS)[0] > 16


@pytest.mark.parametrize("platform, package", [("linux", "triton"), ("win32", "triton-windows")])
def test_without_triton_one_sentence_says_what_to_install(platform, package, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return real(name, *arguments)

    for name in [name for name in sys.modules if re.match(r"zigma\.selective_scan\.triton_(row_)?kernels", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["zigma.selective_scan"], "triton_kernels", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(sys, "platform", platform)
    triton_backend._import_failure.cache_clear()
    try:
        assert triton_backend.unavailable() == (
            f"Triton cannot be imported (No module named 'triton'), install it with `pip install {package}`"
        )
    finally:
        triton_backend._import_failure.cache_clear()


@needs_triton
def test_without_a_gpu_it_is_unavailable_and_takes_no_tensor_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_backend.unavailable().startswith("torch finds no GPU")
    assert "not on cpu" in triton_backend.unsupported(torch.ones(1))


@needs_triton
def test_a_failed_self_test_is_one_sentence_and_is_not_repeated(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(triton_backend, "_self_tests", {})
    module = importlib.import_module("zigma.selective_scan.triton_self_test")
    monkeypatch.setattr(module, "self_test", lambda device: calls.append(device) or "relative error 1.0e+00")
    for _ in range(2):
        assert triton_backend.unavailable() == (
            "Triton failed its self-test on GPU 7 (relative error 1.0e+00), update triton and the driver of the GPU"
        )
    assert calls == [torch.device("cuda", 7)]


@needs_triton
def test_turing_takes_bfloat16_only_from_triton_that_can_compile_it(monkeypatch):
    import triton

    tensor = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    for version, capability, taken in [("3.2.0", (7, 5), False), ("3.2.0", (8, 0), True), ("3.3.1", (7, 5), True)]:
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        triton_backend._without_bfloat16.cache_clear()
        reason = triton_backend.unsupported(tensor)
        assert reason is None if taken else "takes bfloat16 on GPU 0 from Triton 3.3 on, not with 3.2.0" in reason
    triton_backend._without_bfloat16.cache_clear()


def test_triton_is_not_imported_before_it_is_used():
    code = (
        "import torch, sys; before = set(sys.modules); import zigma.selective_scan.triton_backend\n"
        "sys.exit('triton' in set(sys.modules) - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: the Triton kernels on a GPU, torch finds none")
@needs_triton
def test_the_kernels_run_on_a_gpu():
    assert triton_backend.unavailable() is None
    device = torch.device("cuda")
    g = torch.Generator(device).manual_seed(0)
    for dtype, n in ((torch.bfloat16, 16), (torch.float32, 40)):
        b, l, d = 2, 300, 96
        u, delta, z, d_out = (torch.randn(b, l, d, device=device, generator=g).to(dtype) for _ in range(4))
        B, C = (torch.randn(b, l, n, device=device, generator=g).to(dtype) for _ in range(2))
        A, D = -torch.rand(d, n, device=device, generator=g), torch.rand(d, device=device, generator=g)
        order = torch.randperm(l, device=device, generator=g)
        arguments = (u, delta, A, B, C, D, z, D, True, order, order)
        results = []
        for programs in (1, triton_backend.PROGRAMS):
            out, states = triton_backend.scan_forward(*arguments, True, programs=programs)
            results.append((out, *triton_backend.scan_backward(d_out, *arguments, states, programs=programs)))
        for one, split in zip(*results, strict=True):
            error, scale = (one.float() - split.float()).abs().max(), one.float().abs().max()
            assert error <= (2**-7 if one.dtype == torch.bfloat16 else 1e-5) * scale
