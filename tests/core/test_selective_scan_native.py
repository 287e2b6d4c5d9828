"""The native library itself: loading and its failures, threads, forks, accuracy."""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from zigma.selective_scan import (
    available_backends,
    dispatch,
    native,
    native_library,
    ordered_conv1d_silu,
    selective_scan,
    selective_scan_gathered,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def library():
    try:
        return native_library.load()
    except native_library.NativeUnavailable as error:
        pytest.skip(f"NOT TESTED: the native kernel: {error}")


@pytest.fixture(params=native_library.INSTRUCTION_SETS)
def instruction_set(request, library, monkeypatch):
    """The kernels of each instruction set of this CPU, one after the other."""
    if request.param not in library.instruction_sets():
        pytest.skip(f"NOT TESTED: {request.param}, which this CPU lacks")
    monkeypatch.setattr(library, "instruction_set", request.param)
    return request.param


def draw_inputs(b, l, d, n, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = ((b, l, d), (b, l, d), (d, n), (b, l, n), (b, l, n), (d,), (b, l, d), (d,))
    tensors = [torch.randn(shape, generator=g) for shape in shapes]
    tensors[2] = -tensors[2].exp()
    return [t.requires_grad_(requires_grad) for t in tensors]


def output_and_gradients(inputs):
    out = selective_scan(*inputs, backend="native")
    return out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "own threads"])
def kind(request, library):
    """The two kinds of threads that the kernels run on."""
    team = native_library.threads_of_torch()
    if request.param == "torch's threads" and team is None:
        pytest.skip("NOT TESTED: torch's threads, for this torch has no OpenMP runtime like libgomp")
    library.lend_threads(team if request.param == "torch's threads" else None)
    yield request.param
    library.lend_threads(team)


MANY = (3, 192, 300, 16)  # elements enough for two threads of either kind


def test_number_of_threads_does_not_change_a_bit(library, kind, set_threads):
    inputs, results = draw_inputs(*MANY, requires_grad=True), []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(output_and_gradients(inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_several_python_threads_at_once(library, kind, set_threads):
    inputs = draw_inputs(*MANY, requires_grad=True)
    set_threads(2)
    want = output_and_gradients(inputs)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: output_and_gradients(inputs), range(8)))
    for got in results:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: libgomp, which torch has on Linux alone")
def test_the_kernels_run_on_torchs_threads(library):
    """Beside those, which spin for a while after each loop of torch, threads of our own were no faster than one."""
    loaded = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line]
    if not any(Path(torch.__file__).resolve().parent in Path(name).parents for name in loaded):
        pytest.skip("NOT TESTED: torch's threads, for this torch brings no libgomp")
    assert native_library.threads_of_torch()


@pytest.mark.parametrize("come", [1, 2, 3, 7])
def test_a_team_is_as_large_as_torchs_and_may_come_in_any_number(library, set_threads, come):
    """A runtime ends threads that a smaller team leaves out. It may also send fewer than it was asked for, or more."""
    small, large = draw_inputs(1, 64, 300, 16), draw_inputs(*MANY)
    want, asked = [selective_scan(*inputs, backend="native") for inputs in (small, large)], []
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def team(run, data, threads, flags):
        asked.append((threads, flags))
        for _ in range(come):
            run(data)

    set_threads(3)
    library.lend_threads(ctypes.cast(team, ctypes.c_void_p).value)
    try:
        got = [selective_scan(*inputs, backend="native") for inputs in (small, large)]
    finally:
        library.lend_threads(native_library.threads_of_torch())
    assert asked == [(3, 0), (3, 0)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="NOT TESTED: fork, which this system lacks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_the_same(library, kind, set_threads):
    """A data loader forks after the parent has used its threads; the child must neither hang nor differ."""
    inputs = draw_inputs(*MANY)
    set_threads(2)
    want = selective_scan(*inputs, backend="native").numpy().tobytes()
    child = os.fork()
    if child == 0:  # only the kernel and bytes: torch's own threads do not survive a fork
        same = selective_scan(*inputs, backend="native").numpy().tobytes() == want
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 30
    while (finished := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(finished[1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_result_may_take_the_place_of_delta(instruction_set, dtype):
    """Bit for bit the same, whatever of the gate, the bias and D there is, and the rows of whole chunks or not."""
    for sizes in ((1, 1, 1, 1), (2, 37, 21, 5), (2, 48, 256, 16), (0, 4, 4, 2)):
        inputs = draw_inputs(*sizes)
        inputs = [t.to(dtype) if t.ndim == 3 else t for t in inputs]
        for optional in (inputs, [*inputs[:5], None, None, None]):
            want = selective_scan_gathered(*optional, backend="native")
            delta = optional[1].clone()
            got = selective_scan_gathered(
                optional[0], delta, *optional[2:], backend="native", overwrite_delta=True
            )  # fmt: skip
            assert torch.equal(got, want)
            assert got.data_ptr() == delta.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_result_may_take_the_place_of_z(instruction_set, dtype):
    """Bit for bit the same with any order, in half of a wider tensor whose other half stays."""
    for b, l, d, n in ((1, 1, 1, 1), (2, 37, 21, 5), (2, 48, 256, 16), (0, 4, 4, 2)):
        u, delta, A, B, C, D, _, bias = (t.to(dtype) if t.ndim == 3 else t for t in draw_inputs(b, l, d, n))
        wide = torch.randn(b, l, 2 * d, generator=torch.Generator().manual_seed(1)).to(dtype)
        for order in (None, torch.randperm(l, generator=torch.Generator().manual_seed(2))):
            rest, z = wide.clone().chunk(2, dim=-1)
            options = {"order": order, "backend": "native"}
            want = selective_scan_gathered(u, delta, A, B, C, D, z, bias, **options)
            got = selective_scan_gathered(u, delta, A, B, C, D, z, bias, **options, overwrite_z=True)
            assert torch.equal(got, want)
            assert got.data_ptr() == z.data_ptr()
            assert torch.equal(rest, wide[..., :d])


@pytest.mark.parametrize("why", ["order", "gradients", "another dtype", "not dense", "torch"])
def test_delta_is_left_alone(library, why):
    """Where the result cannot take its place, allowed or not."""
    u, delta, *others = draw_inputs(2, 20, 24, 4, requires_grad=why == "gradients")
    options = {"backend": "torch" if why == "torch" else "native", "order": None}
    if why == "order":
        options["order"] = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    elif why == "another dtype":
        delta = delta.bfloat16()
    elif why == "not dense":
        delta = delta[:, :1].expand(-1, 20, -1)
    before = delta.detach().clone()
    got = selective_scan_gathered(u, delta, *others, **options, overwrite_delta=True)
    assert torch.equal(got, selective_scan_gathered(u, delta, *others, **options))
    assert torch.equal(delta, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_convolution_may_take_the_place_of_its_input(instruction_set, dtype):
    """Bit for bit the same, in half of a wider tensor whose other half stays, whatever the sizes are."""
    g = torch.Generator().manual_seed(0)
    for b, l, d, width in ((1, 1, 1, 4), (2, 37, 21, 3), (1, 2, 300, 16), (2, 48, 256, 4), (1, 5, 9, 1), (0, 4, 4, 2)):
        wide = torch.randn(b, l, 2 * d, generator=g).to(dtype)
        weight, bias = torch.randn(d, width, generator=g), torch.randn(d, generator=g)
        for given in (bias, None):
            (x, rest), before = wide.clone().chunk(2, dim=-1), wide[..., d:]
            want = ordered_conv1d_silu(x, weight, given, backend="native")
            got = ordered_conv1d_silu(x, weight, given, backend="native", overwrite_x=True)
            assert torch.equal(got, want)
            assert got.data_ptr() == x.data_ptr()
            assert torch.equal(rest, before)


@pytest.mark.parametrize("why", ["order", "gradients", "rows that share memory", "columns apart", "torch", "not asked"])
def test_the_input_of_a_convolution_is_left_alone(library, why):
    """Where the result cannot take its place, allowed or not."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 20, 24, generator=g), torch.randn(24, 4, generator=g)
    options = {"backend": "torch" if why == "torch" else "native", "order": None}
    if why == "order":
        options["order"] = torch.randperm(20, generator=g)
    elif why == "gradients":
        x.requires_grad_()
    elif why == "rows that share memory":
        x = x[:, :1].expand(-1, 20, -1)
    elif why == "columns apart":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    before = x.detach().clone()
    got = ordered_conv1d_silu(x, weight, **options, overwrite_x=why != "not asked")
    assert torch.equal(got, ordered_conv1d_silu(before, weight, **options))
    assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@torch.no_grad()
def test_an_A_that_is_not_finite_stays_in_its_channel(instruction_set, bad):
    u, delta, A, *others = draw_inputs(1, 40, 33, 5)
    want = selective_scan(u, delta, A, *others, backend="reference")
    for channel, state in ((0, 0), (17, 4), (32, 2)):
        spoiled = A.clone()
        spoiled[channel, state] = bad
        got = selective_scan(u, delta, spoiled, *others, backend="native")
        rest = torch.arange(33) != channel
        torch.testing.assert_close(got[..., rest], want[..., rest], rtol=2e-5, atol=2e-5)
        if bad != -torch.inf:  # exp(-inf) = 0 is a state without memory
            assert not got[..., channel].isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: /proc/cpuinfo, which is Linux's")
def test_the_fastest_kernels_that_the_processor_runs_come_first(library):
    """What the kernels ask of the processor themselves, against what the system says of it."""
    described = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in described)}
    flags = set(known.get("flags", "").split())
    if not flags:
        assert library.instruction_sets() == ("neon",)
        return
    want = ["sse2"]
    if {"avx2", "fma", "f16c", "bmi1", "bmi2"} <= flags:
        want.insert(0, "avx2")
        if {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"} <= flags:
            want.insert(0, "avx512")
            if known["vendor_id"] == "AuthenticAMD" and "avx512_bf16" in flags:
                want.insert(0, "zen4")
    assert library.instruction_sets() == tuple(want)
    assert library.instruction_set == want[0]


def test_exponential(library, instruction_set):
    """Relative error below two units in the last place, exact at integers, zero or tiny below the range."""
    def exp2(x, as_decays=False):
        x, y = x.float().contiguous(), torch.empty(x.numel())
        library.exp2(instruction_set, x, y, as_decays)
        return y

    x = torch.cat((torch.linspace(-125.9, 126.9, 400_001), -torch.logspace(-9, 0, 100_001)))
    exact = torch.exp2(x.double())
    error = (exp2(x).double() - exact) / exact
    assert error.abs().max() < 2e-7
    assert error.mean().abs() < 2e-8
    integers = torch.arange(-126, 127).float()
    assert torch.equal(exp2(integers), torch.exp2(integers))
    assert exp2(torch.tensor([-127.5, -1000.0, -1e30])).max() <= 2.0**-126
    assert exp2(torch.tensor([128.0, 1e30])).min() >= 2.0**127
    payloads = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FD55555, 0x7FFFFFFF, -0x3FFFFF], dtype=torch.int32)
    assert exp2(payloads.view(torch.float32)).isnan().all()


def test_decays(library, instruction_set):
    """Some units in the last place beside 1, more where little is left; 1 exactly at 0; little bias near it."""
    def decay(x):
        x, y = x.float().contiguous(), torch.empty(x.numel())
        library.exp2(instruction_set, x, y, as_decays=True)
        return y.double()

    x = torch.cat((torch.linspace(-119.9, 119.9, 400_001), -torch.logspace(-9, 0, 100_001)))
    exact = torch.exp2(x.double())
    error = decay(x) - exact
    assert (error.abs() <= exact * (3e-7 + 1.5e-7 * x.abs())).all()
    assert error[x <= 0].abs().max() < 3e-7
    if instruction_set not in ("zen4", "avx512", "avx2"):  # which have a shorter exponential for them
        assert (error / exact).abs().max() < 2e-7
    assert (decay(torch.tensor([0.0, -0.0, -1e-9])) == 1).all()
    for size in (1e-3, 1e-2, 1e-1):  # 1 - decay is what a state forgets
        x = -size * (0.5 + torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
        forgotten = 1 - torch.exp2(x.double())
        assert ((1 - decay(x)).mean() / forgotten.mean() - 1).abs() < 2e-5


def test_the_kernel_refuses_an_order_by_itself(library):
    """The last guard against an index out of bounds, should a caller come past the checks."""
    u, delta, A, B, C, D, z, bias = draw_inputs(1, 8, 4, 2)
    for bad in ([0, 1, 2, 3, 4, 5, 6, 8], [0, 1, 2, 3, 4, 5, 6, 6], [-1, 1, 2, 3, 4, 5, 6, 7]):
        order = torch.tensor(bad)
        with pytest.raises(ValueError, match="not a permutation of 0 to 7"):
            native.scan_forward(u, delta, A, B, C, D, z, bias, True, None, order, False)
        with pytest.raises(ValueError, match="not a permutation of 0 to 7"):
            native.conv_forward(u, torch.ones(4, 4), None, order)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "one byte", "another library", "checksum"])
def test_a_damaged_library_falls_back_to_torch_and_says_so(damage, tmp_path, monkeypatch, caplog, fresh_choices):
    try:
        original = native_library.library_path()
    except native_library.NativeUnavailable as error:
        pytest.skip(f"NOT TESTED: damaged libraries: {error}")
    data, path = bytearray(original.read_bytes()), tmp_path / original.name
    checksum = native_library.checksum_path(original).read_text()
    native_library.checksum_path(path).write_text(checksum.upper()[:-9] if damage == "checksum" else checksum)
    if damage == "one byte":
        data[len(data) // 2] ^= 1
    contents = {"empty": b"", "truncated": data[: len(data) // 2], "another library": b"\x7fELF not this one"}
    if damage != "missing":
        path.write_bytes(contents.get(damage, data))
    monkeypatch.setattr(native_library, "library_path", lambda: path)
    monkeypatch.setattr(native_library, "_loaded", None)
    inputs = draw_inputs(1, 9, 5, 4)
    with caplog.at_level(logging.INFO, logger="zigma.selective_scan"):
        results = [selective_scan(*inputs) for _ in range(2)]
    assert torch.equal(results[0], selective_scan(*inputs, backend="torch"))
    (record,) = [r for r in caplog.records if "asked for" not in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert "python native/build.py" in record.getMessage()
    assert available_backends() == ("torch", "reference")
    with pytest.raises(RuntimeError, match=r"'native' .* cannot run: .* rebuild it"):
        selective_scan(*inputs, backend="native")


def test_why_there_is_none_is_said_anew_without_keeping_what_its_hearers_hold(monkeypatch):
    """One error raised again and again collects the frames that it passes, and their tensors."""
    monkeypatch.setattr(native_library, "_loaded", "it is missing")
    held = []
    for _ in range(2):
        tensor = torch.ones(1)
        held.append(weakref.ref(tensor))
        assert native.unavailable() == "it is missing"
        with pytest.raises(native_library.NativeUnavailable, match="it is missing"):
            _load_holding(tensor)
        del tensor
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def _load_holding(_tensor):
    native_library.load()


@pytest.mark.parametrize(("states", "taps"), [(257, 4), (4, 17)])
def test_what_is_too_large_for_the_kernel_goes_to_torch_and_says_so(library, states, taps, caplog):
    dispatch.forget_choices()
    inputs, x, weight = draw_inputs(1, 5, 3, states), torch.randn(1, 5, 3), torch.randn(3, 1, taps)
    with caplog.at_level(logging.INFO, logger="zigma.selective_scan"):
        out, conv = selective_scan(*inputs), ordered_conv1d_silu(x, weight)
    assert torch.allclose(out, selective_scan(*inputs, backend="reference"), atol=1e-4)
    assert torch.allclose(conv, ordered_conv1d_silu(x, weight, backend="reference"), atol=1e-5)
    sentence = "at most 256 states per channel, not 257" if states > 256 else "convolutions of at most 16 taps, not 17"
    assert f"runs on the torch backend: the native kernel takes {sentence}" in caplog.text
    with pytest.raises(RuntimeError, match=f"'native' .* cannot run: takes {sentence}"):
        selective_scan(*inputs, backend="native")
        ordered_conv1d_silu(x, weight, backend="native")


def test_another_platform_falls_back_to_torch(monkeypatch):
    monkeypatch.setattr(native_library, "_loaded", None)
    monkeypatch.setattr(native_library.platform, "machine", lambda: "riscv64")
    assert "riscv64" in native.unavailable()
    assert "native" not in available_backends()


def test_a_wrong_result_fails_the_self_test(library, monkeypatch):
    monkeypatch.setattr(native_library, "_loaded", None)
    forward = native.scan_forward

    def off(*arguments):
        out, states = forward(*arguments)
        return out * 1.001, states

    monkeypatch.setattr(native, "scan_forward", off)
    assert "failed its self-test" in native.unavailable()


def test_the_first_use_may_be_within_a_checkpointed_block(library, monkeypatch):
    """Whose hooks on saved tensors run it once more for whatever takes gradients within: the self-test does."""
    monkeypatch.setattr(native_library, "_loaded", None)
    monkeypatch.setattr(native_library, "_lock", threading.Lock())
    dispatch.forget_choices()
    inputs = draw_inputs(1, 8, 16, 16, requires_grad=True)
    done: list[torch.Tensor] = []

    def run() -> None:
        out = checkpoint(selective_scan, *inputs, use_reentrant=False)
        done.extend(torch.autograd.grad(out, inputs, torch.ones_like(out)))

    thread = threading.Thread(target=run, daemon=True)  # which would wait for itself
    thread.start()
    thread.join(60)
    assert len(done) == len(inputs)
    assert all(torch.equal(a, b) for a, b in zip(done, output_and_gradients(inputs)[1:], strict=True))


def test_nothing_is_loaded_at_import():
    code = (
        "import ctypes, sys; loaded = []; real = ctypes.CDLL.__init__\n"
        "def spy(self, name, *a, **k): loaded.append(str(name)); real(self, name, *a, **k)\n"
        "import torch; ctypes.CDLL.__init__ = spy; import zigma.selective_scan\n"
        "sys.exit(any('zigma' in name for name in loaded))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_structures_have_the_size_of_the_interface(library):
    """Field by field the two sides must agree; the C side states its sizes."""
    structures = (native_library.SCAN_ARGS, native_library.CONV_ARGS, native_library.NORM_ARGS)
    assert library.structure_sizes() == tuple(structure.size for structure in structures)
