"""Laws of what lies between two mixers: the fused passes compute what torch's own operations do, gradients too."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zigma.layer_scans import relative_scans
from zigma.scan_orders import LayerSchedule, scan_order
from zigma.selective_scan import Stream, add_norm, gather_rows, native_library, stream

# From 5 on, for narrower slopes are cancellation. Wide rows have blocks of four vectors, then vectors, then a rest.
WIDTHS = st.integers(5, 70) | st.sampled_from([96, 128, 203, 208])
INPUTS = ("base", "mix", "gate", "residual", "weight", "bias", "shift", "scale")


@pytest.fixture(params=native_library.INSTRUCTION_SETS)
def native(request, monkeypatch):
    """The native kernels, once for each instruction set of this CPU."""
    try:
        library = native_library.load()
    except native_library.NativeUnavailable as error:
        pytest.skip(f"NOT TESTED: the native kernel: {error}")
    if request.param not in library.instruction_sets():
        pytest.skip(f"NOT TESTED: {request.param}, which this CPU lacks")
    monkeypatch.setattr(library, "instruction_set", request.param)
    monkeypatch.delenv("ZIGMA_SCAN_BACKEND", raising=False)


def draw(b, l, d, dtype=torch.float32, seed=0, without=()):
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(b, 1, 3 * d, generator=g).to(dtype)  # gate, shift and scale are parts of one projection
    tensors = {
        "base": torch.randn(b, l, d, generator=g).to(dtype), "mix": torch.randn(b, l, d, generator=g).to(dtype),
        "gate": wide[..., :d], "residual": torch.randn(b, l, d, generator=g), "weight": torch.randn(d, generator=g),
        "bias": torch.randn(d, generator=g), "shift": wide[..., d : 2 * d], "scale": wide[..., 2 * d :],
    }  # fmt: skip
    return {name: None if name in without else t for name, t in tensors.items()}


def results(function, tensors, *settings):
    """Outputs and the gradient of every input, for gradients of the outputs drawn from a fixed seed."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = [t for t in function(*leaves.values(), *settings) if t is not None]
    g = torch.Generator().manual_seed(7)
    given = [torch.randn(t.shape, generator=g).to(t.dtype) for t in outputs]
    present = [t for t in leaves.values() if t is not None]
    grads = torch.autograd.grad(outputs, present, given, allow_unused=True)
    return [t.detach() for t in outputs], dict(zip([n for n, t in leaves.items() if t is not None], grads, strict=True))


def fused(base, mix, gate, residual, weight, bias, shift, scale, gather, eps, layer_norm, total, keep_norm):
    return add_norm(
        Stream(base, mix, gate, residual), weight, bias, eps=eps, layer_norm=layer_norm, gather=gather, total=total,
        keep_norm=keep_norm, modulation=None if scale is None else (shift, scale),
    )  # fmt: skip


def assert_agree(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if b.numel():
            error, scale = (a.double() - b.double()).abs().max(), b.double().abs().max()
            assert error <= tolerance * scale + 1e-12, f"{float(error):.2e} against {float(scale):.2e}"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), WIDTHS),
    absent=st.sets(st.sampled_from(["mix", "gate", "residual", "weight", "bias", "modulation"])),
    layer_norm=st.booleans(), ordered=st.booleans(), total=st.sampled_from([None, torch.float32]),
    keep_norm=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_fused_is_composed(native, shape, absent, layer_norm, ordered, total, keep_norm, seed):
    without = (absent - {"modulation"}) | ({"shift", "scale"} if "modulation" in absent else set())
    without |= {"gate"} if "mix" in absent else set()
    if "modulation" in absent:
        keep_norm = True
    tensors = draw(*shape, seed=seed, without=without)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed)) if ordered else None
    options = (order, 1e-5, layer_norm, total, keep_norm)
    (outs, grads), (want, wanted) = (results(f, tensors, *options) for f in (fused, stream.composed))
    assert_agree(outs, want, 3e-6)
    assert_agree(grads.values(), wanted.values(), 2e-5)


@pytest.mark.parametrize("width", [37, 40, 64, 208])
@pytest.mark.parametrize("float32", [(), ("gate",), ("mix", "shift"), ("base",)], ids=",".join)
def test_bfloat16_differs_by_one_rounding(native, width, float32):
    """Whether all rows are bfloat16, which has a kernel of its own, or not all."""
    tensors = draw(2, 50, width, torch.bfloat16)
    tensors = {name: t.float() if name in float32 else t for name, t in tensors.items()}
    options = (torch.randperm(50), 1e-6, True, torch.bfloat16, True)
    (outs, grads), (want, wanted) = (results(f, tensors, *options) for f in (fused, stream.composed))
    assert_agree(outs, want, 2**-7)
    assert_agree(grads.values(), wanted.values(), 2**-6)


def test_any_strides_empty_batches_and_threads(native):
    tensors = draw(3, 500, 700)
    options = (torch.randperm(500), 1e-5, False, torch.float32, True)
    want = results(fused, tensors, *options)
    turned = {n: t.mT.contiguous().mT if t.ndim == 3 else t for n, t in tensors.items()}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for other in (tensors, turned):
            got = results(fused, other, *options)
            assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
            assert all(torch.equal(got[1][name], want[1][name]) for name in INPUTS)
    finally:
        torch.set_num_threads(before)
    for empty in ((0, 5, 8), (2, 0, 8)):
        outs, grads = results(fused, draw(*empty), None, 1e-5, False, torch.float32, True)
        assert all(t.shape == empty for t in outs) and not any(g.any() for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [21, 64])
@torch.no_grad()
def test_results_may_take_places(native, dtype, width):
    """Bit for bit the same: with a gather in memory apart, without one also in that of the summands."""
    tensors, order = draw(2, 40, width, dtype), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    base, mix, gate, residual, weight, bias, shift, scale = tensors.values()
    options = {"eps": 1e-5, "modulation": (shift, scale), "total": torch.float32}
    for gather, layer_norm in itertools.product((None, order), (False, True)):
        options |= {"gather": gather, "layer_norm": layer_norm}
        want = add_norm(Stream(base, mix, gate, residual), weight, bias, **options)
        for kind in ("apart", "one apart") if gather is not None else ("apart", "one apart", "summands"):
            b, m, r = base.clone(), mix.clone(), residual.clone()
            places = (r, b, m) if kind == "summands" else tuple(torch.full_like(t, torch.nan) for t in (r, b, m))
            places = (None, places[1], None) if kind == "one apart" else places
            got = add_norm(Stream(b, m, gate, r), weight, bias, places=places, **options)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
            assert all(p is None or p.data_ptr() == t.data_ptr() for p, t in zip(places, got, strict=True))


def test_places_are_left_alone_where_gradients_are_wanted(native):
    tensors = draw(1, 9, 20)
    base = tensors["base"].clone().requires_grad_()
    places = tuple(torch.zeros_like(base) for _ in range(3))
    add_norm(Stream(base, tensors["mix"]), eps=1e-5, total=torch.float32, places=places)
    assert not any(place.any() for place in places)


def test_a_nan_stays_in_its_row(native):
    tensors = draw(2, 9, 20)
    tensors["mix"][1, 4, 7] = torch.nan
    order = scan_order("zigzag", 0, height=3, width=3)
    total, normed, modulated = fused(*tensors.values(), order, 1e-5, False, torch.float32, True)
    row = torch.zeros(2, 9, dtype=torch.bool)
    row[1, order == 4] = True
    assert torch.equal(total.isnan().any(-1), row)
    assert torch.equal(normed.isnan().all(-1), row) and torch.equal(modulated.isnan().all(-1), row)


def test_a_gather_that_is_no_permutation_is_refused(native):
    tensors = draw(1, 4, 8)
    for bad in ([0, 1, 2, 4], [0, 1, 2, 2], [-1, 1, 2, 3]):
        with pytest.raises(ValueError, match="not a permutation of 0 to 3"):
            fused(*tensors.values(), torch.tensor(bad), 1e-5, False, None, True)


def test_the_gradient_of_a_gather_is_the_inverse_gather():
    x, order = torch.randn(2, 6, 3, dtype=torch.double, requires_grad=True), torch.randperm(6)
    assert torch.equal(gather_rows(x, order), x[:, order])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, order), x)


@settings(max_examples=30, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5)), frames=st.integers(0, 4), depth=st.integers(1, 9),
    pattern=st.sampled_from(["s", "t", "st", "sst", "tts"]),
)  # fmt: skip
def test_relative_orders_add_up(sides, frames, depth, pattern):
    """Row k of every layer is the token that the layer's own order reads at step k, and the end is the raster."""
    scan_type = f"video_{pattern}" if frames else "hilbertN8"
    schedule = LayerSchedule(scan_type, depth, video=frames > 0)
    orders = schedule.orders(*sides, frames)
    scans, to_raster = relative_scans(orders, schedule.axes, sides, frames, torch.device("cpu"))
    f, places = max(frames, 1), sides[0] * sides[1]
    tokens = torch.arange(f * places)
    stream = tokens
    for scan, order, axis in zip(scans, orders, schedule.axes, strict=True):
        stream = stream if scan.gather is None else stream[scan.gather]
        apart = tokens.view(f, places)
        segments = {"s": apart, "t": apart.T, "a": tokens[None]}[axis]
        assert scan.segments == len(segments)
        assert torch.equal(stream.view(len(segments), -1), segments[:, order])
    assert torch.equal(stream if to_raster is None else stream[to_raster], tokens)
