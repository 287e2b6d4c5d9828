"""torch.compile takes the whole model in one graph, and the operators obey the rules of torch.library."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from zigma import ZigMa, ZigMaConfig, scratch
from zigma.selective_scan import (
    available_backends,
    custom_ops,
    native_library,
    ordered_conv1d_silu,
    selective_scan,
    selective_scan_gathered,
)

# torch's own use of it, when its tables of decompositions are read.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
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


@pytest.mark.parametrize("part", ["blocks.0", "blocks.1.mixer", "blocks.0.msa"])
def test_a_part_alone(part, monkeypatch):
    """One graph of a part within a model that runs as it stands, whose layers share memory in inference."""
    torch.compiler.reset()
    monkeypatch.setattr(scratch, "WORTH_IT_FROM", 0)
    monkeypatch.setattr(native_library, "HUGE_PAGES_FROM", 0)  # as for large sizes: a call that no compiler traces
    model, inputs = model_and_inputs(MODELS["text"])
    with torch.no_grad():
        want = model(*inputs)
        model.get_submodule(part).compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(*inputs), want)


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
    g = torch.Generator().manual_seed(0)
    leaves = [t.requires_grad_() for t in scan_inputs()]
    l, d = leaves[0].shape[1:]
    operators, order = getattr(torch.ops, custom_ops.NAMESPACE), torch.randperm(l, generator=g)
    # Not "test_autograd_registration" of the states: they are no function to differentiate.
    checks = ("test_schema", "test_faketensor")
    for optional in (leaves, [*leaves[:5], None, None, None]):
        torch.library.opcheck(
            operators.selective_scan.default, (*optional, True, order, order, True, backend), test_utils=checks
        )
    conv = (leaves[0], torch.randn(d, 4, generator=g), None, order, backend)
    torch.library.opcheck(operators.conv1d_silu.default, conv)


def scan_inputs(b=2, l=6, d=5, n=3):
    g = torch.Generator().manual_seed(0)
    sizes = ((b, l, d), (b, l, d), (d, n), (b, l, n), (b, l, n), (d,), (b, l, d), (d,))
    inputs = [torch.randn(size, generator=g) for size in sizes]
    inputs[2] = -inputs[2].exp()
    return inputs


class Seen(TorchDispatchMode):
    """The names of this project's operators that run within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == custom_ops.NAMESPACE:
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


def convolve_and_scan(u, *others):
    weight = torch.ones(u.shape[2], 2)
    return selective_scan_gathered(ordered_conv1d_silu(u, weight), *others, overwrite_delta=True)


@torch.no_grad()
def test_inference_calls_the_backend_at_once(monkeypatch):
    """And gets the very bits that an operator gives, which somebody who looks at operators sees."""
    u, delta, *others = scan_inputs()
    with Seen() as seen:
        want = convolve_and_scan(u, delta.clone(), *others)
    assert seen.names == ["conv1d_silu", "selective_scan"]
    monkeypatch.setattr(custom_ops, "NAMESPACE", "nowhere")
    assert torch.equal(convolve_and_scan(u, delta.clone(), *others), want)
    with torch.enable_grad(), pytest.raises(AttributeError):
        convolve_and_scan(u.clone().requires_grad_(), delta.clone(), *others)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_who_traces_or_profiles_sees_the_operators():
    inputs = scan_inputs()
    names = [f"{custom_ops.NAMESPACE}{{}}{name}" for name in ("conv1d_silu", "selective_scan")]
    drawn = [str(node.target) for node in make_fx(convolve_and_scan)(*inputs).graph.nodes]
    traced = str(torch.jit.trace(convolve_and_scan, tuple(scan_inputs()), check_trace=False).graph)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        convolve_and_scan(*scan_inputs())
    profiled = [event.key for event in profile.key_averages()]
    for name in names:
        assert name.format(".") + ".default" in drawn
        assert name.format("::") in traced
        assert name.format("::") in profiled
    with FakeTensorMode() as mode:
        fake = convolve_and_scan(*(mode.from_tensor(t) for t in inputs))
    assert fake.shape == inputs[0].shape


@pytest.mark.parametrize("backend", [name for name in available_backends() if name != "reference"])
def test_a_tangent_is_refused(backend):
    """In either kind of forward mode: an operator without a rule for it would drop it without a word."""
    u, *others = scan_inputs()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="use reverse mode"):
        selective_scan(forward_ad.make_dual(u, u), *others, backend=backend)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda x: selective_scan(x, *others, backend=backend), (u,), (u,))
    with forward_ad.dual_level():
        out = selective_scan(forward_ad.make_dual(u, u), *others, backend="reference")
        assert forward_ad.unpack_dual(out).tangent is not None


@torch.no_grad()
def test_a_batch_of_torch_func_is_the_batch():
    u, *others = scan_inputs()
    want = torch.stack([convolve_and_scan(x, *(t.clone() for t in others)) for x in (u, 2 * u)])
    got = torch.func.vmap(lambda x: convolve_and_scan(x, *others))(torch.stack([u, 2 * u]))
    torch.testing.assert_close(got, want)


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
