"""Laws of the torch backend's own functions: forward and backward written out = autograd through the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from zigma.selective_scan import reference, torch_backend

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@pytest.fixture(params=["cpu", "other devices"])
def path(request, monkeypatch):
    """The way that work is cut on the CPU, and the way of other devices, here on the CPU."""
    if request.param == "other devices":
        monkeypatch.setattr(torch_backend, "_on_cpu", lambda t: False)
    return request.param


def draw(b, l, d, n, dtype=torch.float32, seed=0, without=()):
    """The eight inputs, None for those in `without`."""
    g = torch.Generator().manual_seed(seed)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = dict.fromkeys(("u", "delta", "z"), (b, l, d)) | dict.fromkeys(("B", "C"), (b, l, n))
    inputs = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    inputs["A"] = -torch.randn(d, n, generator=g).exp().to(state)
    inputs["D"], inputs["delta_bias"] = (torch.randn(d, generator=g).to(state) for _ in range(2))
    return [None if name in without else inputs[name] for name in NAMES]


def permutation(l, seed=0):
    return torch.randperm(l, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(inputs, softplus=True, input_order=None, output_order=None, d_out=None):
    """Output and the eight gradients of the backend's functions."""
    out, states = torch_backend.scan_forward(*inputs, softplus, input_order, output_order, True)
    (b, l, d), n = inputs[0].shape, inputs[2].shape[1]
    assert states.shape == torch_backend.states_shape(b, l, d, n)
    assert states.dtype == inputs[2].dtype
    again, nothing = torch_backend.scan_forward(*inputs, softplus, input_order, output_order, False)
    assert torch.equal(again, out) or out.isnan().any()
    assert nothing.shape == (0,)
    d_out = gradient(out) if d_out is None else d_out
    grads = torch_backend.scan_backward(d_out, *inputs, softplus, input_order, output_order, states)
    return dict(zip(("out", *NAMES), (out, *grads), strict=True))


def gradient(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)


def expect(inputs, softplus=True, input_order=None, output_order=None, d_out=None):
    """The same from the definition of the orders, the reference loop and autograd."""
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
    d_out = gradient(out) if d_out is None else d_out
    grads = iter(torch.autograd.grad(out, present, d_out, materialize_grads=True))
    return {"out": out.detach()} | {
        name: None if t is None else next(grads) for name, t in zip(NAMES, leaves, strict=True)
    }


def assert_agree(got, want, rtol=None):
    """dtype and shape are the input's, and the difference is rounding in proportion to the largest element."""
    for name, expected in want.items():
        result = got[name]
        if expected is None:
            assert result is None, name
            continue
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape), name
        if not expected.numel():
            continue
        tolerance = rtol or {torch.bfloat16: 2**-7, torch.float16: 2**-9}.get(expected.dtype, 3e-6)
        error, scale = (result.double() - expected.double()).abs().max(), expected.double().abs().max()
        assert error <= tolerance * scale + 1e-12, f"{name}: {float(error):.2e} against {float(scale):.2e}"


class Recorder(TorchDispatchMode):
    """Every operation that makes or fills a tensor: its name and the tensor."""

    VIEWS = (
        "view",
        "slice",
        "select",
        "transpose",
        "t.",
        "unsqueeze",
        "squeeze",
        "expand",
        "unbind",
        "alias",
        "detach",
    )

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.__name__
        if not name.startswith(self.VIEWS):
            self.made += [(name, t) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result

    @property
    def launches(self):
        return sum(not name.startswith(("empty", "new_empty")) for name, _ in self.made)


@torch.no_grad()
def record(inputs, *options):
    """What forward and backward do, apart."""
    with Recorder() as forward:
        out, states = torch_backend.scan_forward(*inputs, *options, True)
    d_out = gradient(out)
    with Recorder() as backward:
        torch_backend.scan_backward(d_out, *inputs, *options, states)
    return forward, backward


def orders(kind, l):
    return {
        "none": (None, None),
        "both": (permutation(l), permutation(l)),
        "gathered": (None, permutation(l)),
        "input": (permutation(l), None),
        "two": (permutation(l, 1), permutation(l, 2)),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "both", "gathered", "input", "two"])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("without", [(), ("z",), ("D",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_the_eight_gradients(path, kind, softplus, without):
    inputs = draw(2, 37, 21, 5, without=without)
    if not softplus:
        inputs[1] = inputs[1].abs() * 0.1
        inputs[7] = None if inputs[7] is None else inputs[7].abs() * 0.1
    options = softplus, *orders(kind, 37)
    assert_agree(run(inputs, *options), expect(inputs, *options))


@pytest.mark.parametrize("dtype, rtol", [(torch.bfloat16, None), (torch.float16, None), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["none", "two"])
def test_every_dtype(path, dtype, rtol, kind):
    inputs = draw(2, 150, 9, 4, dtype)
    options = True, *orders(kind, 150)
    assert_agree(run(inputs, *options), expect(inputs, *options), rtol)


def test_each_tensor_may_have_its_own_dtype():
    u, delta, A, B, C, D, z, bias = draw(2, 20, 7, 3)
    inputs = [u.bfloat16(), delta, A, B.half(), C, D, z.bfloat16(), bias]
    assert_agree(run(inputs), expect(inputs))


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(1, 40), st.integers(1, 17))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=SHAPES, seed=st.integers(0, 1000), kind=st.sampled_from(["none", "both", "gathered", "two"]))
def test_any_shape(path, shape, seed, kind):
    inputs, options = draw(*shape, seed=seed), (True, *orders(kind, shape[1]))
    assert_agree(run(inputs, *options), expect(inputs, *options), 1e-5)


@pytest.mark.parametrize("b, l, d, n", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
@pytest.mark.parametrize("kind", ["none", "two"])
def test_empty_tensors(path, b, l, d, n, kind):
    inputs, options = draw(b, l, d, n), (True, *orders(kind, l))
    assert_agree(run(inputs, *options), expect(inputs, *options))
    x, weight = inputs[0], torch.ones(d, 4)
    assert torch_backend.conv_forward(x, weight, None, options[1]).shape == x.shape
    d_x, d_weight, d_bias = torch_backend.conv_backward(x, x, weight, torch.ones(d), options[1])
    assert (d_x.shape, d_weight.shape, d_bias.shape) == (x.shape, weight.shape, (d,))
    assert not d_weight.any() or x.numel()


def test_strided_and_expanded_inputs(path):
    inputs = draw(2, 40, 12, 6)
    wide = torch.randn(2, 40, 40)
    u, delta, z, B, C = wide[..., :12], wide[..., 12:24], wide[..., 24:36], wide[..., 30:36], wide[..., 34:40]
    inputs = [u, delta, inputs[2], B, C, inputs[5], z, inputs[7]]
    transposed = [t.mT.contiguous().mT if t.ndim == 3 else t for t in inputs]
    A = inputs[2][:1].expand(12, 6)
    expanded = [u[:1].expand(2, 40, 12), delta, A, B[:, :1].expand(2, 40, 6), C, A[0, :1].expand(12), z, inputs[7]]
    for strange in (inputs, transposed, expanded):
        d_out = torch.ones(()).expand(2, 40, 12)
        options = True, permutation(40), permutation(40, 1), d_out
        assert_agree(run(strange, *options), expect([t.contiguous() for t in strange], *options))
        assert_agree(run(strange), expect([t.contiguous() for t in strange]))


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_a_nan_stays_in_its_batch_item(path, name):
    inputs = draw(3, 70, 24, 4)
    clean = run(inputs)
    inputs[NAMES.index(name)][1, 30] = torch.nan
    got = run(inputs)
    assert got["out"][1].isnan().any()
    assert not got["out"][1, :30].isnan().any()
    for key in ("out", "u", "delta", "B", "C", "z"):
        assert torch.equal(got[key][[0, 2]], clean[key][[0, 2]]), key


def test_the_same_result_twice_and_for_every_batch():
    """Bit for bit, and an item alone gives what it gives in a batch."""
    inputs = draw(3, 140, 65, 4)
    first, second = run(inputs), run(inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = run([t[1:2] if t.ndim == 3 else t for t in inputs], d_out=gradient(inputs[0])[1:2])
    for name in ("out", "u", "delta", "B", "C", "z"):
        torch.testing.assert_close(alone[name], first[name][1:2], rtol=1e-5, atol=1e-5)


def test_large_steps_stay_finite(path):
    inputs = draw(1, 40, 20, 16)
    for name in ("delta", "z"):
        inputs[NAMES.index(name)] *= 1000
    inputs[2] *= 100
    got = run(inputs)
    assert all(bool(t.isfinite().all()) for t in got.values())
    assert_agree(got, expect(inputs))


def test_the_gradient_of_an_open_gate():
    """silu(z) = z for large z: the slope is one, exactly, and zero on the other side."""
    inputs = draw(1, 20, 3, 2)
    for size, slope in ((30.0, 1), (1e5, 1), (1e30, 1), (-200.0, 0)):
        inputs[6] = torch.full((1, 20, 3), size)
        y = run([*inputs[:6], None, inputs[7]])["out"]
        assert_agree({"z": run(inputs)["z"]}, {"z": slope * gradient(y) * y}, 1e-6)


@pytest.mark.parametrize("kind", ["none", "both", "gathered"])
def test_gradcheck(kind):
    """Against finite differences, without the reference: every input, in float64."""

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.options = True, *orders(kind, 19)
            out, states = torch_backend.scan_forward(*inputs, *ctx.options, True)
            ctx.save_for_backward(*inputs, states)
            return out

        @staticmethod
        def backward(ctx, d_out):
            *inputs, states = ctx.saved_tensors
            return torch_backend.scan_backward(d_out, *inputs, *ctx.options, states)

    assert torch.autograd.gradcheck(Scan.apply, [t.requires_grad_() for t in draw(1, 19, 2, 3, torch.float64)])


def test_autocast_and_inference_mode_change_nothing():
    inputs = draw(2, 40, 20, 16)
    want = run(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(inputs)
    with torch.inference_mode():
        inferred = run(inputs)
    for name, t in want.items():
        assert torch.equal(cast[name], t), name
        assert torch.equal(inferred[name], t), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("l, k", [(1, 4), (30, 4), (3, 5), (17, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_convolution(path, dtype, l, k, with_bias, ordered):
    g = torch.Generator().manual_seed(0)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, l, 18, generator=g).to(dtype)[..., :9]
    weight = torch.randn(9, k, generator=g).to(state)
    bias = torch.randn(9, generator=g).to(state) if with_bias else None
    order = permutation(l) if ordered else None
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = reference.conv1d_silu(leaves[0], leaves[1], leaves[2] if with_bias else None, order)
    d_out = gradient(out)
    grads = torch.autograd.grad(out, leaves, d_out)
    want = dict(zip(("x", "weight", "bias"), grads, strict=False))
    got = torch_backend.conv_backward(d_out, x, weight, bias, order)
    assert (got[2] is None) == (bias is None)
    got = {"out": torch_backend.conv_forward(x, weight, bias, order)} | dict(zip(want, got, strict=False))
    assert_agree(got, {"out": out.detach(), **want}, 1e-12 if dtype == torch.float64 else None)


def test_tiles_change_nothing(monkeypatch):
    """Channels and batch items cut to the cache, evenly or not, give what the whole gives."""
    inputs = draw(3, 40, 22, 4)
    want = run(inputs)
    for size in (4, 20, 22 * 4 * 2):
        monkeypatch.setattr(torch_backend, "TILE", size)
        got = run(inputs)
        for name, t in want.items():
            torch.testing.assert_close(got[name], t, rtol=1e-5, atol=1e-5)
        assert torch.equal(got["out"], want["out"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_devices_get_nothing_they_may_lack(monkeypatch, dtype):
    """MPS has no float64 and few writes by index; a float64 scalar tensor would already fail there."""
    monkeypatch.setattr(torch_backend, "_on_cpu", lambda t: False)
    x, weight, bias, order = torch.randn(1, 40, 6).to(dtype), torch.randn(6, 4), torch.randn(6), permutation(40)
    with Recorder() as conv, torch.no_grad():
        torch_backend.conv_forward(x, weight, bias, order)
        torch_backend.conv_backward(x, x, weight, bias, order)
    for recorder in (*record(draw(2, 300, 6, 4, dtype), True, *orders("two", 300)), conv):
        assert recorder.made
        for name, t in recorder.made:
            assert t.dtype != torch.float64, name
            assert not name.startswith(("index_put", "index_copy", "index_add", "index_fill", "scatter", "masked")), (
                name
            )


def test_other_devices_get_few_launches(monkeypatch):
    """At most one for every four steps forward, and three for five steps backward."""
    monkeypatch.setattr(torch_backend, "_on_cpu", lambda t: False)
    forward, backward = record(draw(2, 1024, 6, 4), True, *orders("gathered", 1024))
    assert forward.launches < 1024 / 4
    assert backward.launches < 1024 * 0.6


def test_memory_beyond_the_results_does_not_grow_with_the_length(path):
    """Of what is made, only the results (twice where rows are put back at the end) are as long as the sequence."""
    b, d, n, copies = 2, 3, 2, 1 if path == "cpu" else 2
    largest = []
    for l in (700, 1400):
        forward, backward = record(draw(b, l, d, n, torch.bfloat16), True, *orders("two", l))
        for recorder, results in ((forward, {(b, l, d): 1}), (backward, {(b, l, d): 3, (b, l, n): 2})):
            own = [t for name, t in recorder.made if name.startswith(("new_empty", "empty", "index_select", "index."))]
            for shape, count in results.items():
                assert sum(t.shape == shape for t in own) == count * copies
            states = torch_backend.states_shape(b, l, d, n)
            rest = [t for _, t in recorder.made if t.ndim > 1 and t.shape not in (*results, states)]
            largest.append(max(t.numel() for t in rest))
    assert largest[0] == largest[2]
    assert largest[1] == largest[3]
