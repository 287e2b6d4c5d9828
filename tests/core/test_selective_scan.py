"""Laws of the selective scan: every backend computes what the reference computes, forward and backward."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from zigma.selective_scan import (
    available_backends,
    dispatch,
    native_library,
    ordered_conv1d_silu,
    selective_scan,
    selective_scan_gathered,
)

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
BACKENDS = ("torch", "native-zen4", "native-avx512", "native-avx2", "native-sse2", "native-neon")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every backend, and the native one once for each instruction set of this CPU."""
    name, _, instruction_set = request.param.partition("-")
    if instruction_set:
        try:
            library = native_library.load()
        except native_library.NativeUnavailable as error:
            pytest.skip(f"NOT TESTED: the native kernel: {error}")
        if instruction_set not in library.instruction_sets():
            pytest.skip(f"NOT TESTED: {instruction_set}, which this CPU lacks")
        monkeypatch.setattr(library, "instruction_set", instruction_set)
    return name


def draw_inputs(b, l, d, n, dtype=torch.float32, seed=0, without=()):
    g = torch.Generator().manual_seed(seed)
    shapes = {"u": (b, l, d), "delta": (b, l, d), "B": (b, l, n), "C": (b, l, n), "z": (b, l, d)}
    inputs = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs["A"] = -torch.randn(d, n, generator=g).exp().to(state_dtype)
    inputs["D"], inputs["delta_bias"] = (torch.randn(d, generator=g).to(state_dtype) for _ in range(2))
    return {name: None if name in without else inputs[name] for name in NAMES}


def run(scan, inputs, **options):
    """Output and the gradient of every input, for a gradient of the output drawn from a fixed seed."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    out = scan(**{name: leaves.get(name) for name in inputs}, **options)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(out.dtype)
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), d_out), strict=True)),
    }


def assert_agree(got, want, inputs, rtol=None, floor=0.0):
    """Each result has its input's dtype and differs by rounding only, in proportion to the largest element."""
    for name, expected in want.items():
        result = got[name]
        assert result.dtype == (inputs["u"] if name == "out" else inputs[name]).dtype, name
        assert result.shape == expected.shape, name
        tolerance = rtol or {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(expected.dtype, 3e-6)
        error = (result.double() - expected.double()).abs().max() if result.numel() else torch.zeros(())
        scale = expected.double().abs().max().clamp(min=floor) if result.numel() else torch.ones(())
        # d_A of a single token is exactly zero: the state before it is.
        assert error <= tolerance * scale + 1e-12, f"{name}: {float(error):.2e} against {float(scale):.2e}"


@pytest.mark.parametrize("scan", [selective_scan, selective_scan_gathered])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("delta_softplus", [True, False])
@pytest.mark.parametrize("without", [(), ("z",), ("D",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_backends_compute_the_reference(backend, scan, ordered, delta_softplus, without):
    inputs = draw_inputs(2, 35, 21, 16, without=without)
    if not delta_softplus:
        inputs["delta"] = inputs["delta"].abs() * 0.1
        if inputs["delta_bias"] is not None:
            inputs["delta_bias"] = inputs["delta_bias"].abs() * 0.1
    order = torch.randperm(35, generator=torch.Generator().manual_seed(3)) if ordered else None
    options = {"delta_softplus": delta_softplus, "order": order}
    want = run(scan, inputs, backend="reference", **options)
    assert_agree(run(scan, inputs, backend=backend, **options), want, inputs)


@pytest.mark.parametrize("scan", [selective_scan, selective_scan_gathered])
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("channels", [37, 150, 256])  # units of 128 channels have a kernel of their own, and rests
def test_bfloat16_differs_from_the_reference_by_one_rounding(backend, scan, without, channels):
    inputs = draw_inputs(2, 35, channels, 16, torch.bfloat16, without=without)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(3))
    want = run(scan, inputs, backend="reference", order=order)
    assert_agree(run(scan, inputs, backend=backend, order=order), want, inputs)


def test_each_tensor_may_have_its_own_dtype(backend):
    """Under autocast u may be bfloat16 and z float32, or the other way round."""
    for names, channels in itertools.product((("u", "B"), ("delta", "C"), ("z",)), (20, 128)):
        inputs = draw_inputs(1, 20, channels, 16)
        mixed = {name: t.bfloat16() if name in names else t for name, t in inputs.items()}
        want = run(selective_scan, mixed, backend="reference")
        assert_agree(run(selective_scan, mixed, backend=backend), want, mixed)


def test_float16_and_float64_run_on_torch():
    for dtype, rtol in ((torch.float16, None), (torch.float64, 1e-12)):
        inputs = draw_inputs(2, 20, 5, 4, dtype)
        want = run(selective_scan, inputs, backend="reference")
        assert_agree(run(selective_scan, inputs), want, inputs, rtol)


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 50), st.integers(1, 150), st.integers(1, 35))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=SHAPES, seed=st.integers(0, 1000), gathered=st.booleans())
def test_any_shape(backend, shape, seed, gathered):
    inputs = draw_inputs(*shape, seed=seed)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    scan = selective_scan_gathered if gathered else selective_scan
    want = run(scan, inputs, backend="reference", order=order)
    # With one or two channels a sum over all tokens (d_D, d_delta_bias) may cancel: then its rounding, that of summands
    # of about 1, is large beside it.
    assert_agree(run(scan, inputs, backend=backend, order=order), want, inputs, rtol=1e-5, floor=1.0)


@pytest.mark.parametrize("b, l, d, n", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2)])
def test_empty_tensors(backend, b, l, d, n):
    inputs = draw_inputs(b, l, d, n)
    got = run(selective_scan, inputs, backend=backend)
    assert got["out"].shape == (b, l, d)
    assert all(got[name].shape == inputs[name].shape and not got[name].any() for name in NAMES)
    assert ordered_conv1d_silu(inputs["u"], torch.ones(d, 4), backend=backend).shape == (b, l, d)


def test_gradcheck_of_the_torch_backend():
    for order in (None, torch.tensor([3, 0, 18, *range(4, 18), 2, 1])):
        inputs = draw_inputs(1, 19, 2, 3, torch.float64)
        leaves = [t.requires_grad_() for t in inputs.values()]
        for scan in (selective_scan, selective_scan_gathered):
            assert torch.autograd.gradcheck(lambda *t: scan(*t, order=order, backend="torch"), leaves)  # noqa: B023
        x, weight, bias = torch.randn(1, 19, 2).double(), torch.randn(2, 1, 4).double(), torch.randn(2).double()
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        assert torch.autograd.gradcheck(lambda *t: ordered_conv1d_silu(*t, order=order, backend="torch"), leaves)  # noqa: B023


def test_order_law(backend):
    """Scanning by an order is scanning what the order gathers, put back by its inverse: bit for bit."""
    inputs = draw_inputs(2, 48, 20, 16)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    walked = {name: t[:, order] if name in ("u", "delta", "B", "C", "z") else t for name, t in inputs.items()}
    in_raster = selective_scan(**inputs, order=order, backend=backend)
    in_scan_order = selective_scan(**walked, backend=backend)
    assert torch.equal(in_raster, in_scan_order[:, order.argsort()])
    half = {**walked, "z": inputs["z"]}
    assert torch.equal(selective_scan_gathered(**half, order=order, backend=backend), in_raster)


def test_strided_inputs(backend):
    """Halves of a projection are read where they are, other strides are copied; the kernel gives the same bits."""
    inputs = draw_inputs(2, 33, 24, 16)
    strided = dict(inputs)
    for name in ("u", "delta", "B", "C", "z"):
        wide = torch.randn(2, 33, 3 * inputs[name].shape[2])
        wide[..., 5 : 5 + inputs[name].shape[2]] = inputs[name]
        strided[name] = wide[..., 5 : 5 + inputs[name].shape[2]]
    transposed = {name: t.mT.contiguous().mT if t.ndim == 3 else t for name, t in inputs.items()}
    want = run(selective_scan, inputs, backend=backend)
    for other in (strided, transposed):
        got = run(selective_scan, other, backend=backend)
        if backend == "native":
            assert all(torch.equal(got[name], t) for name, t in want.items())
        assert_agree(got, want, inputs)


def test_output_gradient_of_any_strides(backend):
    inputs = draw_inputs(2, 20, 24, 16)
    u = inputs["u"].requires_grad_()
    out = selective_scan(**inputs, backend=backend)
    (expanded,) = torch.autograd.grad(out.sum(), u, retain_graph=True)
    (plain,) = torch.autograd.grad(out, u, torch.ones_like(out))
    assert torch.equal(expanded, plain)


def test_large_steps_stay_finite(backend):
    """softplus is linear for large arguments and never overflows; a huge decay is zero, not a NaN."""
    inputs = draw_inputs(1, 40, 20, 16)
    inputs["delta"] = inputs["delta"] * 1000
    inputs["z"] = inputs["z"] * 1000
    inputs["A"] = inputs["A"] * 100
    want = run(selective_scan, inputs, backend="reference")
    got = run(selective_scan, inputs, backend=backend)
    assert all(bool(t.isfinite().all()) for t in got.values())
    assert_agree(got, want, inputs)


def test_a_nan_is_not_hidden(backend):
    inputs = draw_inputs(1, 9, 20, 16)
    inputs["u"][0, 4, 7] = torch.nan
    out = selective_scan(**inputs, backend=backend)
    expected = torch.zeros(1, 9, 20, dtype=torch.bool)
    expected[0, 4:, 7] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("steps", ["constant", "varying"])
def test_long_memory(backend, steps):
    """Decays close to 1 compound over thousands of steps: a bias of the exponential drifts, and where the step size
    stays the same so does every rounding, of which the native kernel has more (docs/performance.md).
    """
    inputs = draw_inputs(1, 4096, 16, 4, without=("z", "D", "delta_bias"))
    generator = torch.Generator().manual_seed(0)
    factor = 1.0 if steps == "constant" else 0.5 + torch.rand(inputs["delta"].shape, generator=generator)
    inputs["delta"] = torch.full_like(inputs["delta"], 1e-3) * factor
    inputs["A"] = -torch.rand(16, 4, generator=generator)
    exact = {name: None if t is None else t.double() for name, t in inputs.items()}
    got = selective_scan(**inputs, delta_softplus=False, backend=backend)
    want = selective_scan(**exact, delta_softplus=False, backend="torch")
    error = ((got - want).abs().max() / want.abs().max()).item()
    limit = 2e-5 if steps == "varying" else 2e-4 if backend == "native" else 6e-5
    assert error <= limit, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("l, d, k", [(1, 3, 4), (30, 37, 4), (20, 256, 4), (17, 140, 3), (5, 16, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_computes_the_reference(backend, dtype, l, d, k, with_bias):
    g = torch.Generator().manual_seed(0)
    xz = torch.randn(2, l, 2 * d, generator=g).to(dtype)
    inputs = {"u": xz[..., :d], "weight": torch.randn(d, 1, k, generator=g)}
    if with_bias:
        inputs["bias"] = torch.randn(d, generator=g)
    for order in (None, torch.randperm(l, generator=g)):

        def conv(u, weight, bias=None, backend=None):
            return ordered_conv1d_silu(u, weight, bias, order, backend)  # noqa: B023

        want = run(conv, inputs, backend="reference")
        assert_agree(run(conv, inputs, backend=backend), want, inputs)


def test_convolution_is_causal_along_the_order(backend):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    x, weight = torch.randn(1, 20, 8), torch.randn(8, 4)
    before = ordered_conv1d_silu(x, weight, order=order, backend=backend)
    x[0, order[9]] += 1
    changed = (ordered_conv1d_silu(x, weight, order=order, backend=backend) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [9, 10, 11, 12]


def test_inference_mode_autocast_and_checkpointing(backend):
    inputs = draw_inputs(1, 20, 20, 16)
    order = torch.randperm(20)
    want = run(selective_scan, inputs, order=order, backend=backend)
    with torch.inference_mode():
        assert torch.equal(selective_scan(**inputs, order=order, backend=backend), want["out"])
        assert torch.equal(selective_scan(**inputs, order=order.clone(), backend=backend), want["out"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(selective_scan, inputs, order=order, backend=backend)

    def checkpointed(**arguments):
        return checkpoint(selective_scan, **arguments, use_reentrant=False)

    again = run(checkpointed, inputs, order=order, backend=backend)
    for name, t in want.items():
        assert torch.equal(cast[name], t), name
        assert torch.equal(again[name], t), name


def test_only_the_wanted_gradients(backend):
    """Frozen inputs (a LoRA, a probe of one tensor) neither fail nor change the others' gradients."""
    inputs = draw_inputs(1, 20, 20, 16)
    want = run(selective_scan, inputs, backend=backend)
    for name in NAMES:
        one = {key: t.detach().requires_grad_(key == name) for key, t in inputs.items()}
        out = selective_scan(**one, backend=backend)
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(99))
        (grad,) = torch.autograd.grad(out, one[name], d_out)
        assert torch.equal(grad, want[name]), name


@pytest.mark.parametrize(
    "order, message",
    [
        (torch.arange(9), r"expected an int64 permutation of 8 tokens"),
        (torch.arange(7), r"expected an int64 permutation of 8 tokens"),
        (torch.arange(8).int(), r"torch\.int32"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]), r"not a permutation of 0 to 7"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 8]), r"not a permutation of 0 to 7"),
        (torch.tensor([-1, 1, 2, 3, 4, 5, 6, 7]), r"not a permutation of 0 to 7"),
    ],
)
def test_orders_that_do_not_fit_are_refused(backend, order, message):
    inputs = draw_inputs(1, 8, 4, 2)
    for scan in (selective_scan, selective_scan_gathered):
        with pytest.raises(ValueError, match=message):
            scan(**inputs, order=order, backend=backend)
    with pytest.raises(ValueError, match=message):
        ordered_conv1d_silu(inputs["u"], torch.ones(4, 4), order=order, backend=backend)


def test_an_order_changed_in_place_is_checked_again(backend):
    inputs, order = draw_inputs(1, 8, 4, 2), torch.arange(8)
    selective_scan(**inputs, order=order, backend=backend)
    order[3] = 4
    with pytest.raises(ValueError, match="not a permutation"):
        selective_scan(**inputs, order=order, backend=backend)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("u", "A")])
def test_shapes_that_do_not_fit_are_named(name):
    inputs = draw_inputs(2, 8, 4, 3)
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(ValueError, match=rf"{name} has shape .*, expected"):
        selective_scan(**inputs)


def test_an_unknown_backend_is_refused(monkeypatch):
    inputs = draw_inputs(1, 4, 4, 2)
    with pytest.raises(ValueError, match=r"'cuda9' \(asked for by the caller\) is unknown, choose from .*native, "):
        selective_scan(**inputs, backend="cuda9")
    monkeypatch.setenv("ZIGMA_SCAN_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"'fastest' \(set by ZIGMA_SCAN_BACKEND\) is unknown"):
        selective_scan(**inputs)


def test_forcing_a_backend_on_inputs_it_cannot_take_is_an_error():
    with pytest.raises(RuntimeError, match=r"'native' .* cannot run: .*float64"):
        selective_scan(**draw_inputs(1, 4, 4, 2, torch.float64), backend="native")


def test_the_choice_is_said_once(monkeypatch, caplog, fresh_choices):
    inputs = draw_inputs(1, 4, 4, 2)
    with caplog.at_level(logging.INFO, logger="zigma.selective_scan"):
        for _ in range(3):
            selective_scan(**inputs)
    assert len(caplog.records) == 1
    assert "selective scan runs on the" in caplog.text


def test_the_environment_forces_a_backend(monkeypatch, caplog, fresh_choices):
    monkeypatch.setenv("ZIGMA_SCAN_BACKEND", "torch")
    with caplog.at_level(logging.INFO, logger="zigma.selective_scan"):
        selective_scan(**draw_inputs(1, 4, 4, 2))
    assert "runs on the torch backend: set by ZIGMA_SCAN_BACKEND" in caplog.text


def test_available_backends_are_those_that_run():
    names = available_backends()
    assert {"torch", "reference"} <= set(names) <= set(dispatch.BACKENDS)
    inputs = draw_inputs(1, 4, 4, 2)
    for a, b in itertools.pairwise(selective_scan(**inputs, backend=name) for name in names):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [1, 2, 7, 17, 64])
def test_any_number_of_states(backend, n):
    inputs = draw_inputs(1, 20, 19, n)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(n))
    want = run(selective_scan, inputs, backend="reference", order=order)
    assert_agree(run(selective_scan, inputs, backend=backend, order=order), want, inputs, rtol=1e-5)


def test_expanded_inputs(backend):
    """Strides of 0, as broadcasting leaves them: one sample for the batch, one step for all, one channel for all."""
    inputs = draw_inputs(1, 1, 24, 16)
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].expand(3, 9, -1)
    inputs["D"] = torch.ones(1).expand(24)
    dense = {name: t.contiguous() for name, t in inputs.items()}
    assert_agree(run(selective_scan, inputs, backend=backend), run(selective_scan, dense, backend=backend), inputs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_what_is_not_finite_stays_in_its_batch_item(backend, name, bad):
    inputs = draw_inputs(3, 20, 20, 16)
    clean = run(selective_scan, inputs, backend=backend)
    inputs[name][1, 7, 5] = bad
    dirty = run(selective_scan, inputs, backend=backend)
    for key in ("out", "u", "delta", "B", "C", "z"):
        assert torch.equal(dirty[key][[0, 2]], clean[key][[0, 2]]), key
    vanishes = bad < 0 and name in ("delta", "z")  # softplus(-inf) = silu(-inf) = 0
    assert vanishes or not dirty["out"][1].isfinite().all()


def test_the_same_result_twice(backend):
    inputs = draw_inputs(2, 70, 90, 16)
    first, second = (run(selective_scan, inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class TestChoice:
    """Which backend a device gets, also devices that are not here: decided from devices, dtypes and reasons alone."""

    FLOAT, HALF = (torch.float32,), (torch.float16, torch.bfloat16)

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch, fresh_choices):
        self.reasons = dict.fromkeys(("mamba-ssm", "triton", "native"))
        for name in self.reasons:
            module = dispatch.BACKENDS[name]
            monkeypatch.setattr(module, "unavailable", lambda name=name: self.reasons[name])
            monkeypatch.setattr(module, "describe", lambda: "as on that machine")

    def choose(self, device, dtypes=FLOAT):
        return dispatch._select(None, (0, 0), *((torch.device(device), dtype) for dtype in dtypes))

    def test_cuda_takes_mamba_ssm_then_triton_then_torch(self, caplog):
        caplog.set_level(logging.INFO, logger="zigma.selective_scan")
        assert self.choose("cuda:0") == "mamba-ssm"
        dispatch.forget_choices()
        self.reasons["mamba-ssm"] = "mamba-ssm is not installed; pip install it"
        assert self.choose("cuda:0") == "triton"
        assert "mamba-ssm is not installed" in caplog.records[-1].getMessage()
        assert caplog.records[-1].levelno == logging.INFO
        dispatch.forget_choices()
        self.reasons["triton"] = "triton is not installed; pip install it"
        assert self.choose("cuda:0") == "torch"
        assert caplog.records[-1].levelno == logging.WARNING and "pip install it" in caplog.records[-1].getMessage()
        assert "several times faster" in caplog.records[-1].getMessage()

    def test_cpus_take_native_and_others_torch(self):
        assert self.choose("cpu") == "native"
        assert self.choose("cpu", (torch.float32, torch.bfloat16)) == "native"
        assert self.choose("cpu", (torch.float64,)) == "torch"
        assert self.choose("mps") == self.choose("xpu") == "torch"

    def test_what_is_forced_and_cannot_run_is_an_error_with_the_remedy(self, monkeypatch):
        self.reasons["triton"] = "triton is not installed; pip install it"
        monkeypatch.setenv("ZIGMA_SCAN_BACKEND", "triton")
        with pytest.raises(RuntimeError, match=r"'triton' \(set by ZIGMA_SCAN_BACKEND\) cannot run: .* pip install it"):
            self.choose("cuda:0")
