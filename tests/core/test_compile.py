"""torch.compile takes the whole model in one graph, and the operators obey the rules of torch.library."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from zigma import ZigMa, ZigMaConfig
from zigma.selective_scan import available_backends, custom_ops, ordered_conv1d_silu, selective_scan
from zigma.selective_scan.dispatch import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "text": {"has_text": True, "d_context": 12, "use_pe": 2},
    "class": {"num_classes": 3, "rms_norm": False},
    "both directions": {"scan_type": "v2"},
    "attention": {"mixer": "attention"},
    "video": {"scan_type": "video_st", "video_frames": 3, "tpe": True},
    "one ssm": {"share_ssm": True},
}


def model_and_inputs(options):
    torch.manual_seed(0)
    model = ZigMa(ZigMaConfig(in_channels=2, embed_dim=16, depth=2, img_dim=(4, 6), **options)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    frames = [model.config.video_frames] * (model.config.video_frames > 0)
    x, t = torch.randn(2, *frames, 2, 4, 6), torch.rand(2)
    y = {"text": torch.randn(2, 5, 12), "class": torch.tensor([0, 2])}.get(model.config.conditioning)
    return model, (x, t, y)


@pytest.mark.parametrize("name", MODELS)
def test_one_graph(name):
    """fullgraph=True raises at the first graph break; values and gradients stay those of the plain model."""
    torch.compiler.reset()
    model, inputs = model_and_inputs(MODELS[name])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        v = run(*inputs)
        v.square().mean().backward()
        results.append([v.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [name for name in available_backends() if name != "reference"])
def test_operators_obey_the_rules(backend):
    """Schema, shapes without data, autograd registration and tracing, as torch checks them."""
    b, l, d, n = 2, 6, 5, 3
    g = torch.Generator().manual_seed(0)
    sizes = ((b, l, d), (b, l, d), (d, n), (b, l, n), (b, l, n), (d,), (b, l, d), (d,))
    inputs = [torch.randn(size, generator=g) for size in sizes]
    inputs[2] = -inputs[2].exp()
    operators, order = getattr(torch.ops, custom_ops.NAMESPACE), torch.randperm(l, generator=g)
    leaves = [t.requires_grad_() for t in inputs]
    # Not "test_autograd_registration" of the states: they are no function to differentiate.
    checks = ("test_schema", "test_faketensor")
    for optional in (leaves, [*leaves[:5], None, None, None]):
        torch.library.opcheck(
            operators.selective_scan.default, (*optional, True, order, order, True, backend), test_utils=checks
        )
    if hasattr(BACKENDS[backend], "scan_over_delta"):
        operator = operators.selective_scan_over_delta.default
        torch.library.opcheck(operator, (*(t.detach() for t in inputs), True, backend), test_utils=checks)
    conv = (leaves[0], torch.randn(d, 4, generator=g), None, order, backend)
    torch.library.opcheck(operators.conv1d_silu.default, conv)


def test_the_pack_may_be_loaded_twice():
    """A host loads a pack under a name of its own, and again after a reload: the operators stay those of the first."""
    name = "ZigMa_again"
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "zigma" / "__init__.py", submodule_search_locations=[str(ROOT / "zigma")]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    again = importlib.import_module(f"{name}.selective_scan")
    assert again.selective_scan is not selective_scan
    x, weight = torch.randn(1, 8, 6), torch.randn(6, 4)
    assert torch.equal(again.ordered_conv1d_silu(x, weight), ordered_conv1d_silu(x, weight))
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]
    del again
    assert torch.isfinite(ordered_conv1d_silu(x, weight)).all()
