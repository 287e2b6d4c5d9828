"""torch.func sees through a model: mapped calls, gradients of each picture alone, products with Jacobians."""

from __future__ import annotations

import pytest
import torch
from test_model import inputs, tiny
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from zigma.selective_scan import available_backends, dispatch, native_library, selective_scan

# Of torch's own operators under vmap; of ours it would be a rule that is missing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*performance drop:UserWarning", "error:.*batching rule for zigma:UserWarning",
    "ignore:.*torch.jit.script.*:DeprecationWarning",
)  # fmt: skip
MODELS = {
    "orders": ("none", {"scan_type": "zigzagN8"}),
    "text": ("text", {}),
    "class": ("class", {"rms_norm": False}),
    "both directions": ("none", {"scan_type": "v2"}),
    "one ssm": ("none", {"share_ssm": True}),
}


def model_and_inputs(which: str):
    condition, fields = MODELS[which]
    model = tiny(condition, **fields)
    return model, inputs(model, batch=3)


def of_one(model, parameters, x, t, y):
    """The velocity of one picture, which a model takes as a batch."""
    arguments = (x[None], t[None], None if y is None else y[None])
    return functional_call(model, parameters, arguments)[0]


@pytest.fixture(params=MODELS)
def problem(request):
    model, given = model_and_inputs(request.param)
    return model, {name: p.detach() for name, p in model.named_parameters()}, given


def mapped(y):
    return 0, 0, None if y is None else 0


def test_a_mapped_model_is_the_batch(problem):
    model, parameters, (x, t, y) = problem
    with torch.no_grad():
        got = vmap(lambda *one: of_one(model, parameters, *one), in_dims=mapped(y))(x, t, y)
        torch.testing.assert_close(got, model(x, t, y), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_autograd(problem):
    model, parameters, given = problem
    got = grad(lambda p: functional_call(model, p, given).square().sum())(parameters)
    model(*given).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()), msg=name)


def test_gradients_of_each_picture(problem):
    """What per-sample clipping or influence need: one gradient of all parameters for each entry of the batch."""
    model, parameters, (x, t, y) = problem

    def loss(p, *one):
        return of_one(model, p, *one).square().sum()

    got = vmap(grad(loss), in_dims=(None, *mapped(y)))(parameters, x, t, y)
    for i in range(len(x)):
        want = grad(loss)(parameters, x[i], t[i], None if y is None else y[i])
        for name, g in want.items():
            torch.testing.assert_close(got[name][i], g, rtol=1e-4, atol=1e-5 * float(g.abs().max()), msg=name)


def test_products_with_the_jacobian(problem):
    """Whose trace the likelihood of a flow is the integral of (Hutchinson's estimator: FFJORD, arXiv 1810.01367)."""
    model, _parameters, (x, t, y) = problem
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    got = vjp(lambda x: model(x, t, y), x)[1](v)[0]
    x = x.clone().requires_grad_()
    want = torch.autograd.grad(model(x, t, y), x, v)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_whole_jacobian():
    model, (x, t, y) = model_and_inputs("orders")
    jacobian = jacrev(lambda x: model(x[None], t[:1], y)[0, 0, 0])(x[0])  # of six values
    for i in range(6):
        leaf = x[0].clone().requires_grad_()
        (want,) = torch.autograd.grad(model(leaf[None], t[:1], y)[0, 0, 0, i], leaf)
        torch.testing.assert_close(jacobian[i], want, rtol=1e-4, atol=1e-5)


def test_forward_mode_with_the_reference(monkeypatch):
    """<w, J v> = <w J, v>."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    model, (x, t, y) = model_and_inputs("orders")
    v, w = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1))
    forward = jvp(lambda x: model(x, t, y), (x,), (v,))[1]
    reverse = vjp(lambda x: model(x, t, y), x)[1](w)[0]
    torch.testing.assert_close((w * forward).sum(), (reverse * v).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("native" not in available_backends(), reason="no native kernel on this machine")
@pytest.mark.parametrize("transform", [grad, vmap])
def test_a_kernel_may_be_used_first_within_a_transform(transform, monkeypatch):
    """Its self-test takes gradients of its own."""
    monkeypatch.setattr(native_library, "_loaded", None)
    dispatch.forget_choices()
    delta, A, B, C = torch.ones(2, 5, 6), -torch.rand(6, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    u = torch.randn(3, 2, 5, 6) if transform is vmap else torch.randn(2, 5, 6)
    transform(lambda u: selective_scan(u, delta, A, B, C).sum())(u)
    assert native_library._loaded is not None
