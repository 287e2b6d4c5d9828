"""What surrounds a call is not its business: default dtypes and devices, transforms, exports; and what it cannot do
is said."""

from __future__ import annotations

import pytest
import torch
from test_model import inputs, tiny
from test_selective_scan_native import draw_inputs

from zigma import save_checkpoint
from zigma.checkpoint import load_bundle
from zigma.latent_format import LatentFormat
from zigma.sampling import sample
from zigma.selective_scan import (
    Stream,
    add_norm,
    available_backends,
    dispatch,
    native_library,
    ordered_conv1d_silu,
    selective_scan,
)


def gradients(model, x, t, y) -> list[torch.Tensor]:
    model.zero_grad()
    model(x, t, y).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing_in_a_float32_model(dtype, default_dtype, monkeypatch):
    """Loaders set another for a moment; kernels write float32 whatever it is."""
    model = tiny()
    given = inputs(model)
    expected = gradients(model, *given)
    default_dtype(dtype)
    monkeypatch.setattr(native_library, "_loaded", None)  # its self-test too
    dispatch.forget_choices()
    for got, want in zip(gradients(model, *given), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_default_device_changes_nothing_in_the_first_use_of_a_kernel(monkeypatch):
    monkeypatch.setattr(native_library, "_loaded", None)
    dispatch.forget_choices()
    x, weight = torch.randn(2, 5, 8), torch.randn(8, 4)
    expected = ordered_conv1d_silu(x, weight, backend="reference")
    with torch.device("meta"):
        out = ordered_conv1d_silu(x, weight)
    torch.testing.assert_close(out, expected)


def test_a_sign_that_is_not_yet_in_memory_counts():
    z, weight = torch.randn(1, 6, 1, dtype=torch.complex64).conj().imag, torch.randn(1, 3)
    assert z.is_neg()
    assert torch.equal(ordered_conv1d_silu(z, weight), ordered_conv1d_silu(z.clone(), weight))


META = torch.empty(8, device="meta")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda y: ordered_conv1d_silu(y, torch.empty(8, 4, device="meta")), "weight is on meta and x on cpu"),
        (lambda y: ordered_conv1d_silu(y, torch.ones(8, 4), META), "bias is on meta and x on cpu"),
        (lambda y: ordered_conv1d_silu(y, torch.ones(8, 0)), "no taps"),
        (lambda y: add_norm(Stream(y), META, eps=1e-5), "weight is on meta and base on cpu"),
        (lambda y: add_norm(Stream(y), torch.ones(4), eps=1e-5), r"weight has shape \(4,\)"),
        (lambda y: add_norm(Stream(y, y[:1]), eps=1e-5), r"mix has shape \(1, 5, 8\)"),
        (lambda y: add_norm(Stream(y, y, y[:1, :1]), eps=1e-5), r"gate has shape \(1, 1, 8\)"),
        (lambda y: add_norm(Stream(y), eps=1e-5, gather=torch.arange(5).int()), "the gather is torch.int32"),
        (lambda y: add_norm(Stream(y), eps=1e-5, gather=torch.arange(4)), "int64 permutation of 5 tokens"),
    ],
)  # fmt: skip
def test_what_a_kernel_would_read_beyond_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(2, 5, 8))


@pytest.mark.parametrize("backend", [name for name in available_backends() if name != "reference"])
def test_second_derivatives_are_refused_and_not_zero(backend):
    u, *rest = draw_inputs(1, 6, 4, 3, requires_grad=True)
    (first,) = torch.autograd.grad(selective_scan(u, *rest, backend=backend).square().sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives: use backend='reference'"):
        torch.autograd.grad(first.square().sum(), u)
    x, weight = torch.randn(1, 6, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    out = ordered_conv1d_silu(x, weight, backend=backend).square().sum()
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(first.square().sum(), weight)


def test_second_derivatives_are_refused_within_a_transform_too():
    model = tiny()
    x, t, y = inputs(model)

    def squares(x):
        return model(x, t, y).square().sum()

    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.func.grad(lambda x: torch.func.grad(squares)(x).square().sum())(x)


def test_a_first_use_within_a_transform_leaves_a_model_that_works():
    model = tiny(scan_type="zigzagN8")
    x, t, y = inputs(model)
    torch.func.grad(lambda x: model(x, t, y).square().sum())(x)
    got = gradients(model, x, t, y)
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(tiny(scan_type="zigzagN8"), x, t, y), strict=True))


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_a_fresh_model_can_be_exported():
    model = tiny(scan_type="zigzagN8").eval()
    x, t, _ = inputs(model)
    program = torch.export.export(model, (x, t))
    torch.testing.assert_close(program.module()(x, t), model(x, t), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_takes_another_batch_in_inference():
    model = tiny().eval()
    compiled = torch.compile(model, backend="eager")
    x, t, _ = inputs(model, batch=3)
    with torch.no_grad():
        for batch in (2, 3, 1):
            torch.testing.assert_close(compiled(x[:batch], t[:batch]), model(x[:batch], t[:batch]))


def test_a_compiled_training_does_not_compile_anew_for_every_batch():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny(drop_path_rate=0.0).train()
    compiled = torch.compile(model, backend=backend)
    x, t, _ = inputs(model, batch=7)
    for batch in range(2, 8):
        compiled(x[:batch], t[:batch]).square().sum().backward()
    assert len(graphs) <= 2  # for the first batch, and for any


def test_token_orders_set_anew_or_changed_are_read():
    model = tiny(scan_type="zigzagN8").eval()
    x, t, y = inputs(model)
    tokens = model.config.grid[0] * model.config.grid[1]
    with torch.no_grad():
        before = model(x, t, y)
        model.token_orders = [torch.randperm(tokens) for _ in range(model.config.depth)]
        drawn = model(x, t, y)
        assert not torch.equal(before, drawn)
        assert torch.equal(drawn, model(x, t, y, token_orders=[order.clone() for order in model.token_orders]))
        for order in model.token_orders:
            order.copy_(order.flip(0))
        assert not torch.equal(drawn, model(x, t, y))


def test_a_model_cast_with_gradients_goes_on_learning():
    model = tiny()
    gradients(model, *inputs(model))
    optimizer = torch.optim.AdamW(model.parameters())
    model.to(torch.bfloat16)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_bundle_of_any_dtype_samples(tmp_path, dtype):
    save_checkpoint(tiny(), tmp_path / "m.safetensors", latent=LatentFormat(3, downscale=1))
    pictures = sample(load_bundle(tmp_path / "m.safetensors", dtype=dtype), count=2)
    assert pictures.dtype == torch.float32 and pictures.isfinite().all()
