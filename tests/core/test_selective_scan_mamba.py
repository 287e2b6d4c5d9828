"""The adapter to mamba-ssm, run against a stand-in for its extension.

The stand-in has the extension's functions, demands what the extension demands of every tensor (layout, dtype,
contiguity, alignment, at least one block to launch) and computes with plain loops. No GPU takes part.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from zigma.selective_scan import dispatch, mamba_backend, reference

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
HALF = (torch.float32, torch.float16, torch.bfloat16)


def demand(t, shape, dtype):
    assert isinstance(t, torch.Tensor)
    assert tuple(t.shape) == tuple(shape)
    assert t.dtype == dtype
    assert t.stride(-1) == 1 or t.shape[-1] == 1
    assert t.data_ptr() % 16 == 0, "vectorised loads need whole 16 bytes"
    assert t.numel(), "a launch of no blocks fails"


def demand_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    assert u.dtype in HALF
    (b, d, l), n = u.shape, A.shape[1]
    assert n <= 256
    assert type(delta_softplus) is bool
    demand(A, (d, n), torch.float32)
    for t in (u, delta) + (() if z is None else (z,)):
        demand(t, (b, d, l), u.dtype)
    for t in (B, C):
        demand(t, (b, 1, n, l), u.dtype)
    for t in (D, delta_bias):
        if t is not None:
            demand(t, (d,), torch.float32)


class Extension(types.ModuleType):
    """selective_scan_cuda of mamba-ssm 1.0 to 2.3, on the CPU; `calls` counts, `chunk` is 2048 in the original."""

    def __init__(self, chunk):
        super().__init__("selective_scan_cuda")
        self.__spec__ = importlib.machinery.ModuleSpec("selective_scan_cuda", None)
        self.chunk, self.calls = chunk, {"fwd": 0, "bwd": 0}

    def scan(self, u, delta, A, B, C, D, delta_bias, delta_softplus):
        """y (b, d, l) before the gate and x (b, d, chunks, 2 n): products of decays and states, interleaved."""
        u, dt, B, C = u.float(), delta.float(), B.float()[:, 0], C.float()[:, 0]
        dt = dt if delta_bias is None else dt + delta_bias[:, None]
        dt = F.softplus(dt) if delta_softplus else dt
        s, product = torch.zeros(*u.shape[:2], A.shape[1]), torch.ones(*u.shape[:2], A.shape[1])
        ys, xs = [], []
        for k in range(u.shape[2]):
            decay = torch.exp(dt[:, :, k, None] * A)
            s = decay * s + (dt * u)[:, :, k, None] * B[:, None, :, k]
            product = product * decay
            ys.append((s * C[:, None, :, k]).sum(-1) + (0 if D is None else D * u[:, :, k]))
            if k % self.chunk == self.chunk - 1 or k == u.shape[2] - 1:
                xs.append(torch.stack((product, s), -1).flatten(-2))
        return torch.stack(ys, -1), torch.stack(xs, 2)

    def fwd(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        demand_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        self.calls["fwd"] += 1
        y, x = self.scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
        gated = [] if z is None else [(y * F.silu(z.float())).to(u.dtype)]
        return [y.to(u.dtype), x, *gated]

    def bwd(self, u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
        demand_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        self.calls["bwd"] += 1
        demand(dout, u.shape, u.dtype)
        assert dz is None
        assert recompute_out_z is False
        chunks = -(-u.shape[2] // self.chunk)
        assert chunks == 1 or x is not None
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().float().requires_grad_() for t in (u, delta, A, B, C, D)]
            bias = None if delta_bias is None else delta_bias.detach().requires_grad_()
            y, states = self.scan(*leaves, bias, delta_softplus)
            if x is not None:
                assert x.is_contiguous()
                demand(x, (*u.shape[:2], chunks, 2 * A.shape[1]), torch.float32)
                assert torch.equal(x, states), "not the states that fwd returned"
            d_y, rest = dout.float(), []
            if z is not None:
                demand(out, u.shape, u.dtype)
                assert torch.equal(out, y.to(out.dtype)), "not the output that fwd returned"
                gate = z.detach().float().requires_grad_()
                rest = list(torch.autograd.grad(F.silu(gate), gate, d_y * out.float()))
                d_y = d_y * F.silu(z.float())
            present = [t for t in (*leaves, bias) if t is not None]
            grads = iter(torch.autograd.grad(y, present, d_y))
        found = [None if t is None else next(grads) for t in (*leaves, bias)]
        dtypes = (u, delta, A, B, C, D, delta_bias)
        found = [g if g is None else g.to(t.dtype) for g, t in zip(found, dtypes, strict=True)]
        return [*found, *(g.to(u.dtype) for g in rest)]


def conv_module():
    """causal_conv1d.cpp_functions of causal-conv1d 1.5.1 to 1.6."""

    def demand_conv(x, weight, bias, *others):
        d = x.shape[1]
        assert x.dtype in HALF
        assert x.numel()
        assert weight.shape[0] == d
        assert 2 <= weight.shape[1] <= 4
        assert bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1 and bias.shape == (d,))
        for t in (x, *others):
            assert t.shape == x.shape
            assert t.stride(2) == 1 or t.stride(1) == 1
            if t.stride(1) == 1 and t.stride(2) > 1:
                assert d % 8 == t.stride(2) % 8 == t.stride(0) % 8 == 0

    def formula(x, weight, bias):
        k = weight.shape[1]
        y = F.conv1d(F.pad(x.float(), (k - 1, 0)), weight[:, None], bias, groups=len(weight))
        return F.silu(y)

    def forward(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
        demand_conv(x, weight, bias)
        assert (seq_idx, initial_states, final_states_out, silu_activation) == (None, None, None, True)
        module.calls += 1
        out = torch.empty_like(x)
        return out.copy_(formula(x, weight, bias))

    def backward(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial, silu_activation):
        demand_conv(x, weight, bias, dout)
        assert dout.dtype == x.dtype
        assert (seq_idx, initial_states, dfinal_states, dx) == (None,) * 4
        assert (return_dinitial, silu_activation) == (False, True)
        module.calls += 1
        with torch.enable_grad():
            leaves = [t.detach().float().requires_grad_() for t in (x, weight, bias) if t is not None]
            out = formula(*leaves, *([None] if bias is None else []))
            d_x, d_weight, *d_bias = torch.autograd.grad(out, leaves, dout.float())
        return torch.empty_like(x).copy_(d_x), d_weight, d_bias[0] if d_bias else None, None

    module = types.ModuleType("causal_conv1d.cpp_functions")
    module.causal_conv1d_fwd_function, module.causal_conv1d_bwd_function, module.calls = forward, backward, 0
    return module


@pytest.fixture
def extension(monkeypatch):
    """The stand-in in place of the extension, with chunks of 16 steps; the caches of the adapter emptied."""
    module = Extension(16)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", module)
    monkeypatch.setattr(mamba_backend, "CHUNK", 16)
    monkeypatch.setattr(mamba_backend, "_test_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    clear_caches()
    yield module
    clear_caches()


@pytest.fixture
def conv(monkeypatch):
    module = conv_module()
    monkeypatch.setitem(sys.modules, "causal_conv1d", types.ModuleType("causal_conv1d"))
    monkeypatch.setitem(sys.modules, "causal_conv1d.cpp_functions", module)
    clear_caches()
    yield module
    clear_caches()


def clear_caches():
    mamba_backend._conv_functions.cache_clear()
    mamba_backend._fault.cache_clear()


def draw(b, l, d, n, dtype=torch.float32, without=()):
    g = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(("u", "delta", "z"), (b, l, d)) | dict.fromkeys(("B", "C"), (b, l, n))
    inputs = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    inputs["A"] = -torch.randn(d, n, generator=g).exp()
    inputs["D"], inputs["delta_bias"] = (torch.randn(d, generator=g) for _ in range(2))
    return [None if name in without else inputs[name] for name in NAMES]


def permutation(l, seed=0):
    return torch.randperm(l, generator=torch.Generator().manual_seed(seed))


def gradient(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)


@torch.no_grad()
def run(inputs, softplus=True, input_order=None, output_order=None):
    options = softplus, input_order, output_order
    out, states = mamba_backend.scan_forward(*inputs, *options, True)
    assert states.dtype == torch.float32
    assert states.shape == mamba_backend.states_shape(*inputs[0].shape, inputs[2].shape[1])
    again, nothing = mamba_backend.scan_forward(*inputs, *options, False)
    assert torch.equal(again, out)
    assert nothing.shape == (0,)
    grads = mamba_backend.scan_backward(gradient(out), *inputs, *options, states)
    return dict(zip(("out", *NAMES), (out, *grads), strict=True))


def expect(inputs, softplus=True, input_order=None, output_order=None):
    """From the definition of the orders, the reference loop and autograd."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    u, delta, A, B, C, D, z, bias = leaves
    if input_order is not None:
        u, delta, B, C = (t[:, input_order] for t in (u, delta, B, C))
    if z is not None and output_order is not None:
        z = z[:, output_order]
    out = reference.scan(u, delta, A, B, C, D, z, bias, softplus, None, None)
    if output_order is not None:
        out = out[:, output_order.argsort()]
    present = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(out, present, gradient(out), materialize_grads=True))
    found = {name: None if t is None else next(grads) for name, t in zip(NAMES, leaves, strict=True)}
    return {"out": out.detach(), **found}


def assert_agree(got, want):
    """dtype and shape are the input's; the difference is rounding in proportion to the largest element."""
    for name, expected in want.items():
        if expected is None:
            assert got[name] is None, name
            continue
        result = got[name]
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape), name
        if expected.numel():
            # in half precision the kernel rounds the output before the gate, and the gradient of that is seen in d_z
            tolerance = {torch.bfloat16: 2**-6, torch.float16: 2**-8}.get(expected.dtype, 1e-5)
            error, scale = (result.double() - expected.double()).abs().max(), expected.double().abs().max()
            assert error <= tolerance * scale + 1e-12, f"{name}: {float(error):.2e} against {float(scale):.2e}"


ORDERS = {
    "none": lambda l: (None, None),
    "both": lambda l: (permutation(l), permutation(l)),
    "gathered": lambda l: (None, permutation(l)),
    "two": lambda l: (permutation(l, 1), permutation(l, 2)),
}


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("l", [1, 13, 16, 37])
@pytest.mark.parametrize("without", [(), ("z",), ("D", "z", "delta_bias")])
def test_the_eight_gradients(extension, kind, l, without):
    """One chunk and several, through layouts, gathers and scatters."""
    inputs, options = draw(2, l, 5, 3, without=without), (True, *ORDERS[kind](l))
    want = expect(inputs, *options)
    if l == 1:
        want["A"] = want["A"] * 0  # the state before the only step is zero
    assert_agree(run(inputs, *options), want)
    assert extension.calls == {"fwd": 2, "bwd": 1}


def test_without_softplus(extension):
    inputs = draw(1, 20, 4, 2)
    inputs[1], inputs[7] = inputs[1].abs() * 0.1, inputs[7].abs() * 0.1
    assert_agree(run(inputs, False), expect(inputs, False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reaches_the_kernel_as_it_is(extension, dtype, monkeypatch):
    seen = []
    fwd = extension.fwd
    monkeypatch.setattr(extension, "fwd", lambda *arguments: seen.append(arguments[0].dtype) or fwd(*arguments))
    inputs, options = draw(2, 37, 6, 4, dtype), (True, *ORDERS["both"](37))
    assert_agree(run(inputs, *options), expect(inputs, *options))
    assert set(seen) == {dtype}


def test_mixed_dtypes_run_in_float32(extension):
    u, delta, A, B, C, D, z, bias = draw(2, 20, 6, 3)
    inputs = [u.bfloat16(), delta, A, B.half(), C, D, z.bfloat16(), bias]
    assert_agree(run(inputs), expect(inputs))


def test_strided_and_expanded_inputs(extension):
    inputs, wide = draw(2, 40, 12, 6), torch.randn(2, 40, 50)
    u, delta, z, B, C = (wide[..., i : i + w] for i, w in ((0, 12), (12, 12), (24, 12), (36, 6), (43, 6)))
    A, D = torch.full((1, 1), -0.5).expand(12, 6), torch.ones(1).expand(12)
    inputs = [u, delta, A, B, C[:, :1].expand(2, 40, 6), D, z, inputs[7]]
    for kind in ("none", "gathered"):
        options = True, *ORDERS[kind](40)
        assert_agree(run(inputs, *options), expect([t.contiguous() for t in inputs], *options))


@pytest.mark.parametrize("b, l, d, n", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
def test_nothing_to_launch(extension, b, l, d, n):
    inputs, options = draw(b, l, d, n), (True, *ORDERS["two"](l))
    assert_agree(run(inputs, *options), expect(inputs, *options))
    assert extension.calls == {"fwd": 0, "bwd": 0}


def test_a_nan_stays_in_its_batch_item(extension):
    inputs = draw(3, 37, 4, 2)
    clean = run(inputs)["out"]
    inputs[0][1, 20] = torch.nan
    out, _ = mamba_backend.scan_forward(*inputs, True, None, None, False)
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert out[1, 20:].isnan().all()


def test_too_many_states_are_refused():
    kind = dispatch._Kind(torch.device("cuda"), torch.float32)
    assert dispatch._unsupported(mamba_backend, (257, 4), (kind,)) == "takes at most 256 states per channel, not 257"
    assert dispatch._unsupported(mamba_backend, (256, 4), (kind,)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("l, d, k", [(1, 8, 4), (20, 16, 4), (20, 5, 3), (1, 1, 2), (20, 8, 5), (20, 8, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_convolution(extension, conv, dtype, l, d, k, with_bias, ordered):
    """causal-conv1d where it takes the shape, torch elsewhere; both layouts of channels."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, l, 2 * d + 1, generator=g).to(dtype)[..., :d]
    weight, bias = torch.randn(d, k, generator=g), torch.randn(d, generator=g) if with_bias else None
    order = permutation(l) if ordered else None
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    want = reference.conv1d_silu(leaves[0], leaves[1], leaves[2] if with_bias else None, order)
    d_out = gradient(want)
    wanted = torch.autograd.grad(want, leaves, d_out)
    wanted = dict(zip(("x", "weight", "bias"), wanted, strict=False))
    out = mamba_backend.conv_forward(x, weight, bias, order)
    assert out.is_contiguous()
    grads = mamba_backend.conv_backward(d_out, x, weight, bias, order)
    assert (grads[2] is None) == (bias is None)
    assert_agree({"out": out, **dict(zip(wanted, grads, strict=False))}, {"out": want.detach(), **wanted})
    assert conv.calls == (2 if 2 <= k <= 4 else 0)


def test_convolution_of_nothing(extension, conv):
    x, weight = torch.zeros(2, 0, 8), torch.ones(8, 4)
    assert mamba_backend.conv_forward(x, weight, None, None).shape == x.shape
    d_x, d_weight, _ = mamba_backend.conv_backward(x, x, weight, None, None)
    assert d_x.shape == x.shape
    assert not d_weight.any()
    assert conv.calls == 0


def test_convolution_without_causal_conv1d(extension, monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    x, weight = torch.randn(1, 9, 8), torch.randn(8, 4)
    torch.testing.assert_close(
        mamba_backend.conv_forward(x, weight, None, None), reference.conv1d_silu(x, weight, None, None)
    )
    assert "the convolution by torch" in mamba_backend.describe()


def test_available_when_the_self_test_passes(extension, conv):
    assert mamba_backend.unavailable() is None
    calls = dict(extension.calls)
    assert calls["fwd"] and calls["bwd"] and conv.calls
    assert mamba_backend.unavailable() is None
    assert extension.calls == calls, "the self-test runs once"
    assert mamba_backend.describe().startswith("mamba-ssm ")


def test_a_wrong_kernel_is_found(extension, conv, monkeypatch):
    fwd = extension.fwd
    monkeypatch.setattr(extension, "fwd", lambda *arguments: [*fwd(*arguments)[:2], fwd(*arguments)[2] * 1.01])
    assert "failed its self-test (relative error" in mamba_backend.unavailable()


def test_a_kernel_for_another_gpu_is_found(extension, monkeypatch):
    def fwd(*arguments):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(extension, "fwd", fwd)
    reason = mamba_backend.unavailable()
    assert "no kernel image is available" in reason
    assert "\n" not in reason


def test_running_out_of_memory_says_nothing_about_the_kernel(extension, monkeypatch):
    def fwd(*arguments):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(extension, "fwd", fwd)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        mamba_backend.unavailable()


def test_what_is_missing_is_said_with_the_remedy(monkeypatch):
    present = set()
    monkeypatch.setattr(mamba_backend.importlib.util, "find_spec", lambda name: name if name in present else None)
    clear_caches()
    install = "pip install mamba-ssm causal-conv1d --no-build-isolation"
    assert install in mamba_backend.unavailable()
    present.add("mamba_ssm")
    assert "without its CUDA extension" in mamba_backend.unavailable()
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in mamba_backend.unavailable()
    present.add("selective_scan_cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in mamba_backend.unavailable()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in mamba_backend.unavailable()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    assert "does not load" in mamba_backend.unavailable()
    clear_caches()


def test_unsupported_tensors_are_named():
    assert mamba_backend.unsupported(torch.zeros(1)) == "works on CUDA devices, not on cpu"
    assert mamba_backend.unsupported(None) is None
    fake = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float64)
    assert mamba_backend.unsupported(fake) == "takes float32, bfloat16 and float16, not torch.float64"
    fake.dtype = torch.bfloat16
    assert mamba_backend.unsupported(None, fake) is None
