"""Laws of the memory that layers share in inference: the same results, and nothing that others have seen changes."""

from __future__ import annotations

import pytest
import torch

from zigma import scratch as scratch_module
from zigma.block import is_private
from zigma.config import ZigMaConfig
from zigma.mixer import is_plain
from zigma.model import ZigMa
from zigma.scratch import Scratch
from zigma.selective_scan import Stream, native

KINDS = {
    "plain": {},
    "text": {"has_text": True, "d_context": 6, "n_context_token": 5},
    "one SSM": {"share_ssm": True},
    "two directions": {"scan_type": "v2"},
    "biases": {"bias": True},
    "video": {"video_frames": 3, "scan_type": "zzvideo_sst"},
}

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="NOT TESTED: no native kernel on this machine")


@pytest.fixture(autouse=True)
def _however_small(monkeypatch):
    monkeypatch.setattr(scratch_module, "WORTH_IT_FROM", 0)


def model_and_inputs(kind: str, dtype: torch.dtype = torch.float32, batch: int = 2, **others):
    torch.manual_seed(0)
    fields = {"in_channels": 3, "embed_dim": 16, "depth": 4, "img_dim": (4, 6), "use_pe": 2, **KINDS[kind], **others}
    model = ZigMa(ZigMaConfig(**fields), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "A_b_log")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    frames = (3,) if kind == "video" else ()
    x = torch.randn(batch, *frames, 3, 4, 6, dtype=dtype)
    y = torch.randn(batch, 5, 6, dtype=dtype) if kind == "text" else None
    return model, (x, torch.rand(batch, dtype=dtype), y)


def without_scratch(monkeypatch, model, inputs):
    with monkeypatch.context() as patch:
        patch.setattr(Scratch, "for_inference", classmethod(lambda cls, *_: None))
        return model(*inputs)


def taken(monkeypatch) -> list:
    """Names of the pieces as they are taken from now on."""
    names, take = [], Scratch._take
    monkeypatch.setattr(Scratch, "_take", lambda self, name, *rest: names.append(name) or take(self, name, *rest))
    return names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_gives_what_it_gives_without(monkeypatch, kind, dtype):
    model, inputs = model_and_inputs(kind, dtype)
    want = without_scratch(monkeypatch, model, inputs)
    names = taken(monkeypatch)
    got = model(*inputs)
    assert names
    torch.testing.assert_close(
        got, want, rtol=0 if dtype == torch.float32 else None, atol=1e-6 if dtype == torch.float32 else None
    )
    assert torch.equal(model(*inputs), got)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns", "products"), [(6, 23, 3), (6, 16, 2), (6, 15, 1), (5, 23, 1)])
@torch.no_grad()
def test_a_large_bfloat16_product_is_taken_in_pieces(monkeypatch, rows, columns, products, biased):
    monkeypatch.setattr(scratch_module, "PIECES_FROM_ROWS", 6)
    monkeypatch.setattr(scratch_module, "PIECE_COLUMNS", 8)
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(columns, 5, generator=g), torch.randn(columns, generator=g) if biased else None
    x, calls = torch.randn(1, rows, 5, generator=g), []
    product = torch.addmm if biased else torch.mm

    def counted(*given, out):
        calls.append(out.shape)
        return product(*given, out=out)

    monkeypatch.setattr(torch, product.__name__, counted)
    for dtype, count in ((torch.bfloat16, products), (torch.float32, 1)):
        inputs = [None if t is None else t.to(dtype) for t in (x, weight, bias)]
        calls.clear()
        torch.testing.assert_close(Scratch().linear(*inputs), torch.nn.functional.linear(*inputs))
        assert len(calls) == count


LAYERS = [
    *("blocks.0", "blocks.1", "blocks.3", "blocks.1.mixer", "blocks.1.mixer.in_proj", "blocks.1.mixer.x_proj"),
    *("blocks.1.mixer.dt_proj", "blocks.1.mixer.out_proj", "blocks.1.msa", "blocks.1.msa.to_q"),
    *("blocks.1.msa.to_out.0", "blocks.1.norm", "norm_f", "final_layer", "final_layer.linear"),
]


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("name", [*LAYERS, "every module"])
@pytest.mark.parametrize("mixer", ["mamba", "attention"])
@torch.no_grad()
def test_what_a_hook_has_seen_stays(monkeypatch, name, mixer, before):
    if mixer == "attention":
        name = name.replace("in_proj", "qkv").replace("out_proj", "proj")
    model, inputs = model_and_inputs("text", mixer=mixer)
    if mixer == "attention" and ("x_proj" in name or "dt_proj" in name):
        pytest.skip("attention has no such layer")
    want, kept = model(*inputs), []

    def keep(_layer, given, out=()):
        given = (*given, *(out if isinstance(out, tuple) else (out,)))
        given += tuple(t for stream in given if isinstance(stream, Stream) for t in stream)
        kept.extend((t, t.clone()) for t in given if isinstance(t, torch.Tensor))

    if name == "every module":
        kinds = torch.nn.modules.module
        handle = (kinds.register_module_forward_pre_hook if before else kinds.register_module_forward_hook)(keep)
    else:
        layer = model.get_submodule(name)
        handle = (layer.register_forward_pre_hook if before else layer.register_forward_hook)(keep)
    try:
        torch.testing.assert_close(model(*inputs), want)
    finally:
        handle.remove()
    assert kept
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("kind", ["plain", "two directions"])
def test_gradients_and_those_who_look_at_operators_have_memory_of_their_own(monkeypatch, kind):
    model, inputs = model_and_inputs(kind)
    names = taken(monkeypatch)
    model(*inputs).sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(*inputs)
    with torch.no_grad(), torch.profiler.profile():
        model(*inputs)
    assert not names
    refused = []
    with torch.no_grad():
        torch.func.vmap(lambda x: refused.append(Scratch.for_inference(x)) or x)(inputs[0])
    assert refused == [None]


@torch.no_grad()
def test_few_tokens_are_not_worth_it(monkeypatch):
    monkeypatch.setattr(scratch_module, "WORTH_IT_FROM", 2**20)
    assert Scratch.for_inference(torch.empty(2, 1024, 128)) is not None
    assert Scratch.for_inference(torch.empty(2, 1023, 128)) is None
    assert Scratch.for_inference(torch.empty(2, 1024, 128, dtype=torch.bfloat16)) is None


@torch.no_grad()
def test_layers_share_pieces_and_evaluations_do_not(monkeypatch):
    """Each wide result is made once or twice for all layers; and what one call returns is not the next one's."""
    model, inputs = model_and_inputs("text")
    pieces, take = set(), Scratch._take

    def noted(self, name, *rest):
        out = take(self, name, *rest)
        if name is not None:
            pieces.add((name, out.data_ptr()))
        return out

    monkeypatch.setattr(Scratch, "_take", noted)
    first = model(*inputs)
    assert sorted(name for name, _ in pieces) == [
        *("attended", "mixed", "normed 0", "normed 1", "queries", "residual 0", "residual 1", "step sizes", "tokens"),
        "x and z",
    ]
    copy = first.clone()
    model(torch.randn_like(inputs[0]), *inputs[1:])
    assert torch.equal(first, copy)


@pytest.mark.parametrize("kind", ["plain", "text"])
@torch.no_grad()
def test_one_layer_that_is_looked_at_leaves_the_others_their_inner_memory(monkeypatch, kind):
    model, inputs = model_and_inputs(kind)
    names = taken(monkeypatch)
    model.blocks[2].register_forward_hook(lambda *_: None)
    model(*inputs)
    assert "x and z" in names
    assert not {"mixed", "tokens", "attended", "normed 0", "residual 0"} & set(names)


@torch.no_grad()
def test_a_layer_of_another_kind_is_not_private():
    class Other(torch.nn.Linear):
        pass

    model, _ = model_and_inputs("text")
    assert all(is_private(block) for block in model.blocks)
    model.blocks[1].mixer.in_proj = Other(16, 64)
    model.blocks[2].msa.to_q = Other(16, 512)
    model.blocks[3].mixer = torch.nn.Identity()
    assert [is_private(block) for block in model.blocks] == [True, False, False, False]


@torch.no_grad()
def test_a_forward_that_was_put_back_is_the_layers_own():
    """As hosts leave a layer whose call they wrapped for a training."""
    model, inputs = model_and_inputs("text")
    want = model(*inputs)
    layers = (model.norm_f, model.blocks[1], model.blocks[1].norm, model.blocks[1].mixer.conv1d)
    for layer in layers:
        own, calls = layer.forward, []
        layer.forward = lambda *given, own=own, calls=calls: calls.append(given) or own(*given)
        assert not is_plain(layer, type(layer))
        model(*inputs)
        assert calls
        layer.forward = own
        assert is_plain(layer, type(layer))
    model.blocks[2].norm.forward = model.blocks[1].norm.forward  # of another layer
    assert not is_plain(model.blocks[2].norm, type(model.blocks[2].norm))
    model.blocks[2].norm.forward = model.blocks[2].norm.__class__.forward.__get__(model.blocks[2].norm)
    assert torch.equal(model(*inputs), want)


class Patched(torch.nn.Linear):
    """A host's layer: it computes with other weights than it holds."""

    def forward(self, x):
        return torch.nn.functional.linear(x, 2 * self.weight, self.bias)


class Operations:
    Linear, Conv1d, Conv2d, Embedding, RMSNorm = (
        Patched, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Embedding, torch.nn.RMSNorm,
    )  # fmt: skip

    @staticmethod
    def read_weights(layer, like):
        return 2 * layer.weight, getattr(layer, "bias", None)


@pytest.mark.parametrize("kind", ["text", "one SSM", "biases"])
@torch.no_grad()
def test_a_hosts_accessor_is_asked_for_every_weight(monkeypatch, kind):
    plain, inputs = model_and_inputs(kind)
    model = ZigMa(plain.config, operations=Operations).eval()
    model.load_state_dict(plain.state_dict())
    want = without_scratch(monkeypatch, model, inputs)
    names = taken(monkeypatch)
    torch.testing.assert_close(model(*inputs), want, rtol=1e-5, atol=1e-5)
    assert names
    assert not torch.allclose(plain(*inputs), want, atol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "one SSM", "biases"])
@torch.no_grad()
def test_a_mixer_with_an_order_gives_what_it_gives_without(monkeypatch, kind):
    """The rows move within it, so that other memory serves."""
    model, _ = model_and_inputs(kind)
    mixer, ssm = model.blocks[0].mixer, model.ssm if kind == "one SSM" else None
    tokens, order = torch.randn(2, 40, 16), torch.randperm(40)
    for given in (order, None):
        with monkeypatch.context() as patch:
            patch.setattr(Scratch, "for_inference", classmethod(lambda cls, *_: None))
            want = mixer(tokens, given, ssm)
        before = tokens.clone()
        torch.testing.assert_close(mixer(tokens, given, ssm), want, rtol=0, atol=1e-6)
        assert torch.equal(tokens, before)


@torch.no_grad()
def test_a_piece_grows_and_changes_its_dtype():
    scratch, weight = Scratch(), torch.randn(5, 3)
    for rows, dtype in ((2, torch.float32), (7, torch.float32), (3, torch.bfloat16), (0, torch.float32)):
        x, w = torch.randn(2, rows, 3).to(dtype), weight.to(dtype)
        for bias in (None, torch.randn(5).to(dtype)):
            got = scratch.linear(x, w, bias, place="one")
            torch.testing.assert_close(got, torch.nn.functional.linear(x, w, bias))


@torch.no_grad()
def test_a_weight_of_another_kind_brings_its_own_product():
    class Noted(torch.Tensor):
        pass

    weight = torch.randn(5, 3).as_subclass(Noted)
    assert isinstance(Scratch().linear(torch.randn(2, 4, 3), weight, place="one"), Noted)
