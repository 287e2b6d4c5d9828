"""Laws of the Triton kernels on the CPU, in Triton's interpreter: run by test_selective_scan_triton.py in a process of
its own, since TRITON_INTERPRET holds for all of a process. The interpreter runs a scan number by number: tiny shapes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zigma.selective_scan import reference, triton_self_test
from zigma.selective_scan import triton_backend as backend

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
ONE_PASS, SPLIT = 1, backend.PROGRAMS
CHUNK, backend.CHUNK = backend.CHUNK, 4  # in this process alone: several chunks to a problem of a few steps


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(dtype)


def draw_order(l, seed=3):
    return torch.randperm(l, generator=torch.Generator().manual_seed(seed))


def draw_inputs(b, l, d, n, dtype=torch.float32, seed=0, without=()):
    shapes = {"u": (b, l, d), "delta": (b, l, d), "B": (b, l, n), "C": (b, l, n), "z": (b, l, d)}
    inputs = {name: draw(*shape, seed=10 * i + seed, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    inputs |= {"A": -draw(d, n, seed=seed).exp(), "D": draw(d, seed=seed), "delta_bias": draw(d, seed=seed + 1)}
    return {name: None if name in without else inputs[name] for name in NAMES}


def expected(inputs, delta_softplus, input_order, output_order, d_out):
    """Output and gradients of the reference, through autograd and plain indexing."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    read = {name: leaves.get(name) for name in NAMES}
    if input_order is not None:
        read |= {name: read[name][:, input_order] for name in ("u", "delta", "B", "C")}
    if output_order is not None and read["z"] is not None:
        read["z"] = read["z"][:, output_order]
    out = reference.scan(*read.values(), delta_softplus, None, None)
    out = out if output_order is None else out[:, output_order.argsort()]
    grads = torch.autograd.grad(out, list(leaves.values()), d_out)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def computed(inputs, delta_softplus, input_order, output_order, d_out, programs=SPLIT):
    arguments = (*inputs.values(), delta_softplus, input_order, output_order)
    out, states = backend.scan_forward(*arguments, True, programs=programs)
    assert states.shape == backend.states_shape(*inputs["u"].shape, inputs["A"].shape[1])
    assert states.dtype == torch.float32
    grads = backend.scan_backward(d_out, *arguments, states, programs=programs)
    assert [g is None for g in grads] == [t is None for t in inputs.values()]
    return {"out": out, **{name: g for name, g in zip(NAMES, grads, strict=True) if g is not None}}


def assert_agree(got, want, inputs):
    """Each result has its input's dtype and differs by rounding only, in proportion to the largest element."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        result = got[name]
        assert result.dtype == (inputs["u"] if name == "out" else inputs[name]).dtype, name
        assert result.shape == exact.shape, name
        if exact.numel():
            tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(exact.dtype, 3e-6)
            error, scale = (result.double() - exact.double()).abs().max(), exact.double().abs().max()
            assert error <= tolerance * scale + 1e-12, f"{name}: {float(error):.2e} against {float(scale):.2e}"


def check(inputs, delta_softplus=True, input_order=None, output_order=None, programs=SPLIT):
    d_out = draw(*inputs["u"].shape, seed=99, dtype=inputs["u"].dtype)
    options = (delta_softplus, input_order, output_order, d_out)
    assert_agree(computed(inputs, *options, programs), expected(inputs, *options), inputs)


@pytest.mark.parametrize("programs, split", [(ONE_PASS, (1, 3)), (2, (2, 2)), (SPLIT, (3, 1))])
def test_one_pass_and_split_compute_the_reference(programs, split):
    assert backend._split(1, 10, 2, 3, programs) == split
    check(draw_inputs(1, 10, 2, 3), True, draw_order(10), draw_order(10), programs)


def test_chunks_of_the_real_size(monkeypatch):
    monkeypatch.setattr(backend, "CHUNK", CHUNK)
    check(draw_inputs(1, CHUNK + 3, 3, 2), True, draw_order(CHUNK + 3), draw_order(CHUNK + 3))


@pytest.mark.parametrize("programs", [ONE_PASS, SPLIT])
@pytest.mark.parametrize(
    "without, delta_softplus, orders",
    [
        ((), True, "none"),
        ((), False, "gathered"),
        (("z",), True, "both"),
        (("D",), True, "gathered"),
        (("delta_bias",), False, "both"),
        (("D", "z", "delta_bias"), True, "none"),
    ],
)
def test_any_input_may_be_absent(programs, without, delta_softplus, orders):
    inputs = draw_inputs(2, 6, 2, 2, without=without)
    if not delta_softplus:
        inputs["delta"] = inputs["delta"].abs() * 0.1
        if inputs["delta_bias"] is not None:
            inputs["delta_bias"] = inputs["delta_bias"].abs() * 0.1
    order = draw_order(6)
    input_order, output_order = {"none": (None, None), "gathered": (None, order), "both": (order, order)}[orders]
    check(inputs, delta_softplus, input_order, output_order, programs)


def test_input_and_output_orders_are_independent():
    check(draw_inputs(1, 6, 2, 2), True, draw_order(6, seed=1), draw_order(6, seed=2))


SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 13), st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=6, deadline=None, database=None, derandomize=True)
@given(shape=SHAPES, programs=st.sampled_from([ONE_PASS, 2, SPLIT]))
def test_any_shape(shape, programs):
    check(draw_inputs(*shape), True, draw_order(shape[1]), draw_order(shape[1]), programs)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 18, 1), (1, 4, 1, 16), (1, 5, 1, 17), (1, 3, 1, 256)])
def test_blocks_at_their_edges(shape):
    check(draw_inputs(*shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_from_the_reference_by_one_rounding(dtype):
    check(draw_inputs(1, 10, 3, 2, dtype), True, draw_order(10), draw_order(10))


def test_each_tensor_may_have_its_own_dtype():
    inputs = draw_inputs(1, 5, 2, 2)
    for names in (("u", "B"), ("delta", "C"), ("z",)):
        check({name: t.bfloat16() if name in names else t for name, t in inputs.items()})


def test_strides_are_followed():
    """Halves of a wider projection, expanded batches, channels that are not contiguous."""
    inputs = draw_inputs(2, 6, 3, 2)
    wide = draw(2, 6, 6, seed=5)
    inputs["u"], inputs["z"] = wide.chunk(2, dim=-1)
    inputs["delta"] = draw(1, 6, 3).expand(2, 6, 3)
    inputs["B"] = draw(2, 2, 6).transpose(1, 2)
    inputs["A"] = -draw(2, 3).exp().T
    check(inputs, True, draw_order(6), draw_order(6))


@pytest.mark.parametrize("programs", [ONE_PASS, SPLIT])
def test_without_keep_only_the_output_is_computed(programs):
    inputs = draw_inputs(1, 10, 2, 2)
    out, states = backend.scan_forward(*inputs.values(), True, None, None, False, programs=programs)
    assert states.shape == (0,)
    kept, _ = backend.scan_forward(*inputs.values(), True, None, None, True, programs=programs)
    assert torch.equal(out, kept)


@pytest.mark.parametrize("b, l, d, n", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (1, 4, 2, 0)])
def test_empty_tensors(b, l, d, n):
    inputs = draw_inputs(b, l, d, n)
    d_out = torch.ones(b, l, d)
    got = computed(inputs, True, None, None, d_out)
    if n == 0:
        torch.testing.assert_close(got["out"], inputs["D"] * inputs["u"] * F.silu(inputs["z"]))
    assert all(got[name].shape == inputs[name].shape for name in NAMES)
    weight, bias = torch.ones(d, 4), torch.ones(d)
    assert backend.conv_forward(inputs["u"], weight, bias, None).shape == (b, l, d)
    grads = backend.conv_backward(d_out, inputs["u"], weight, bias, None)
    assert [g.shape for g in grads] == [(b, l, d), (d, 4), (d,)]


@pytest.mark.parametrize("programs", [ONE_PASS, SPLIT])
def test_the_same_inputs_give_the_same_bits(programs):
    inputs, d_out = draw_inputs(2, 6, 3, 2), draw(2, 6, 3)
    first, second = (computed(inputs, True, None, None, d_out, programs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("programs", [ONE_PASS, SPLIT])
def test_nan_stays_in_its_batch_item_and_after_its_step(programs):
    inputs, d_out = draw_inputs(2, 10, 2, 2), draw(2, 10, 2)
    clean = computed(inputs, True, None, None, d_out, programs)
    inputs["u"][1, 6] = torch.nan
    got = computed(inputs, True, None, None, d_out, programs)
    assert got["out"][1, 6:].isnan().all()
    assert torch.equal(got["out"][1, :6], clean["out"][1, :6])
    assert all(torch.equal(got[name][0], clean[name][0]) for name in ("out", "u", "delta", "B", "C", "z"))


@pytest.mark.parametrize("shift", [-14.0, 25.0])
def test_tiny_and_huge_steps_keep_their_precision(shift):
    """1 + exp(-14) has three digits of exp(-14); exp(25 A) is zero."""
    inputs = draw_inputs(1, 10, 2, 2)
    inputs["delta"] += shift
    check(inputs)


@pytest.mark.parametrize(
    "width, ordered, with_bias, dtype",
    [
        (1, False, True, torch.float32),
        (2, True, False, torch.float32),
        (4, True, True, torch.float32),
        (7, False, False, torch.bfloat16),
        (4, True, True, torch.bfloat16),
        (4, True, True, torch.float16),
    ],
)
def test_convolution_is_the_reference(width, ordered, with_bias, dtype):
    b, l, d = 2, 35, 5
    x = draw(b, l, 2 * d, dtype=dtype)[..., :d]
    inputs = {"x": x, "weight": draw(d, width), "bias": draw(d) if with_bias else None}
    order, d_out = draw_order(l) if ordered else None, draw(b, l, d, seed=9, dtype=dtype)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    out = reference.conv1d_silu(leaves["x"], leaves["weight"], leaves.get("bias"), order)
    grads = torch.autograd.grad(out, list(leaves.values()), d_out)
    got = {"out": backend.conv_forward(*inputs.values(), order)}
    got |= dict(zip(inputs, backend.conv_backward(d_out, *inputs.values(), order), strict=True))
    assert (got["bias"] is None) == (not with_bias)
    got = {name: t for name, t in got.items() if t is not None}
    want = {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
    assert_agree(got, want, {**inputs, "u": x})


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    "parts, dtype",
    [
        ("all", torch.float32),
        ("all", torch.bfloat16),
        ("base", torch.float32),
        ("no gate", torch.float32),
        ("no total", torch.bfloat16),
    ],
)
def test_rows_are_added_normed_and_modulated(parts, dtype, layer_norm):
    b, l, d, eps = 2, 3, 7, 1e-5
    base, mix = draw(b, l, d, dtype=dtype), draw(b, l, 2 * d, seed=1, dtype=dtype)[..., d:]
    gate, shift, scale = draw(b, 1, 3 * d, dtype=dtype).chunk(3, dim=-1)
    residual, weight, bias, gather = draw(b, l, d, seed=2), draw(d), draw(d, seed=1), draw_order(l)
    total = None if parts == "no total" else torch.float32
    if parts == "base":
        mix = gate = residual = weight = bias = shift = scale = gather = None
    if parts == "no gate":
        gate = None
    x = base.float()
    if mix is not None:
        x = x + mix.float() * (1 if gate is None else gate.float()) + residual
        x = x[:, gather]
    u = F.layer_norm(x, (d,), weight, None, eps) if layer_norm else F.rms_norm(x, (d,), weight, eps)
    u = u if bias is None else u + bias
    m = None if scale is None else (u * (1 + scale.float()) + shift.float()).to(dtype)
    got = backend.norm_forward(
        base, mix, gate, residual, weight, bias, shift, scale, gather, eps, layer_norm, total, parts != "no total"
    )
    x, u = (None, None) if total is None else (x, u.to(dtype))
    for result, exact in zip(got, (x, u, m), strict=True):
        assert (result is None) == (exact is None)
        if exact is not None:
            assert result.dtype == exact.dtype
            torch.testing.assert_close(result, exact, rtol=1e-2 if exact.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_the_self_test_finds_what_goes_wrong(monkeypatch):
    small = {"b": 1, "l": 6, "d": 2, "n": 2}
    cpu = torch.device("cpu")
    assert triton_self_test.self_test(cpu, **small) is None
    with monkeypatch.context() as patch:
        conv = backend.conv_forward
        patch.setattr(backend, "conv_forward", lambda *arguments: conv(*arguments) * 1.001)
        assert "of the convolution against the reference" in triton_self_test.self_test(cpu, **small)
    scan = backend.scan_forward

    def off(*arguments, **options):
        out, states = scan(*arguments, **options)
        return out * 1.001, states

    monkeypatch.setattr(backend, "scan_forward", off)
    assert "of the scan against the reference" in triton_self_test.self_test(cpu, **small)

    def broken(*arguments, **options):
        raise RuntimeError("no C compiler\nof many lines")

    monkeypatch.setattr(backend, "scan_forward", broken)
    assert triton_self_test.self_test(cpu, **small) == "RuntimeError: no C compiler"


def test_the_interpreter_takes_tensors_of_the_cpu():
    assert backend.unavailable() is None
    assert backend.unsupported(torch.ones(1), None, torch.ones(1).bfloat16(), torch.ones(1).half()) is None
    assert "not torch.float64" in backend.unsupported(torch.ones(1).double())
    assert "interpreted" in backend.describe()
