"""ZigMa: the recorded outputs of the published implementation, and laws that any model has to keep."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from unittest import mock

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st

from zigma.config import ZigMaConfig
from zigma.embedders import TimestepEmbedder
from zigma.mixer import read_weights
from zigma.model import ZigMa
from zigma.scan_orders import inverse_order, scan_order
from zigma.selective_scan import available_backends, native

TEXT = {"has_text": True, "d_context": 6}
CONDITIONS = {"none": {}, "class": {"num_classes": 3}, "text": TEXT}


def tiny(condition: str = "none", seed: int = 0, **fields) -> ZigMa:
    """A small model whose every weight matters: at their initial zeros the gates would hide the mixers."""
    config = {"in_channels": 3, "embed_dim": 16, "depth": 3, "img_dim": (4, 6), "use_pe": 2, **CONDITIONS[condition]}
    torch.manual_seed(seed)
    model = ZigMa(ZigMaConfig(**{**config, **fields}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "t_embedder" in name or "y_embedder" in name or name == "pos_embed":
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(model: ZigMa, batch: int = 2, sides: tuple[int, int] | None = None, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    x = torch.randn(batch, config.in_channels, *(sides or config.img_dim), generator=generator)
    t = torch.rand(batch, generator=generator)
    y = {
        "none": None,
        "class": torch.arange(batch) % max(config.num_classes, 1),
        "text": torch.randn(batch, 5, config.d_context, generator=generator) if config.has_text else None,
    }[config.conditioning]
    return x, t, y


@pytest.mark.parametrize("condition", CONDITIONS)
@settings(max_examples=10, deadline=None)
@given(patch=st.integers(1, 3), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_any_rectangle_and_patch_size_keeps_its_shape(condition, patch, rows, columns):
    model = tiny(condition, img_dim=(patch * rows, patch * columns), patch_size=patch)
    x, t, y = inputs(model)
    assert model(x, t, y).shape == x.shape


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_batch_is_its_pictures_one_by_one(condition):
    model = tiny(condition)
    x, t, y = inputs(model, batch=3)
    with torch.no_grad():
        one_by_one = [model(x[i : i + 1], t[i : i + 1], None if y is None else y[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(model(x, t, y), torch.cat(one_by_one), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_the_condition_and_the_time_are_looked_at(condition):
    model = tiny(condition)
    x, t, y = inputs(model)
    assert not torch.allclose(model(x, t, y), model(x, t, y.flip(0)), atol=1e-3)
    assert not torch.allclose(model(x, t, y), model(x, 1 - t, y), atol=1e-3)


def test_orders_given_at_construction_or_to_a_call_are_the_same_thing():
    plain = tiny()
    orders = [scan_order("hilbert", i, height=4, width=6) for i in range(3)]
    given_orders = ZigMa(plain.config, orders).eval()
    given_orders.load_state_dict(plain.state_dict())  # orders are no part of it
    x, t, _ = inputs(plain)
    assert torch.equal(plain(x, t, token_orders=orders), given_orders(x, t))
    assert not torch.allclose(plain(x, t), given_orders(x, t), atol=1e-3)
    zigzag = [scan_order("zigzag", i, height=4, width=6) for i in range(3)]
    assert torch.equal(plain(x, t, token_orders=zigzag), plain(x, t))


def test_a_turned_picture_in_turned_orders_gives_the_turned_velocity():
    """Reading order apart, a ZigMa without positions does not know where a token lies."""
    model = tiny(use_pe=0, img_dim=(4, 4), depth=3)
    x, t, _ = inputs(model)
    orders = [scan_order("zigzag", i, height=4, width=4) for i in range(3)]
    turned = torch.arange(16).view(4, 4).rot90().reshape(-1)  # where the token at a place of the turned picture was
    moved = [inverse_order(turned)[order] for order in orders]
    v = model(x, t, token_orders=orders)
    turned_v = model(x.rot90(dims=(2, 3)), t, token_orders=moved)
    torch.testing.assert_close(turned_v, v.rot90(dims=(2, 3)), atol=1e-5, rtol=0)


def test_another_grid_gets_its_own_orders_and_resampled_positions(caplog):
    model = tiny()
    x, t, _ = inputs(model, sides=(6, 8))
    with torch.no_grad():
        v, again = model(x, t), model(x, t)
    assert v.shape == x.shape and torch.equal(v, again)
    assert caplog.text.count("resampled to 6 x 8") == 1
    explicit = [scan_order("zigzag", i, height=6, width=8) for i in range(3)]
    assert torch.equal(model(x, t, token_orders=explicit), v)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_recomputed_activations_give_the_same_gradients(condition):
    plain = tiny(condition)
    saving = ZigMa(dataclasses.replace(plain.config, use_checkpoint=True)).eval()
    saving.load_state_dict(plain.state_dict())
    x, t, y = inputs(plain)
    for model in (plain, saving):
        model(x, t, y).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6, rtol=1e-4), name


def test_every_parameter_has_a_gradient():
    for condition in CONDITIONS:
        model = tiny(condition)
        model(*inputs(model)).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_at_the_start_the_condition_is_not_felt_and_the_steps_are_mambas():
    model = ZigMa(ZigMaConfig(in_channels=3, embed_dim=32, depth=4, img_dim=4, num_classes=3))
    x, t, _ = inputs(model)
    assert torch.equal(model(x, t, torch.tensor([0, 1])), model(x, t, torch.tensor([2, 2])))  # gates at zero
    mixer = model.blocks[0].mixer
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert steps.min() >= 1e-3 * 0.99 and steps.max() <= 0.1 * 1.01
    torch.testing.assert_close(mixer.A_log[0].exp(), torch.arange(1.0, 17.0))
    bound = math.sqrt(1 / 64) / math.sqrt(4)  # kaiming_uniform(sqrt 5) over sqrt(depth)
    assert 0.9 * bound < mixer.out_proj.weight.abs().max() <= bound


def test_stochastic_depth_drops_in_training_only():
    model = tiny(drop_path_rate=0.5)
    x, t, _ = inputs(model, batch=4)
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_bfloat16_is_near_float32(condition):
    model = tiny(condition)
    x, t, y = inputs(model)
    expected = model(x, t, y)
    half = tiny(condition).to(torch.bfloat16)
    v = half(x.to(torch.bfloat16), t, y.to(torch.bfloat16) if condition == "text" else y)
    assert v.dtype == torch.bfloat16
    assert (v.float() - expected).norm() < 0.05 * expected.norm()


def test_a_hosts_accessor_is_asked_for_weights_that_kernels_read():
    class Operations:
        Linear, Conv1d, Conv2d, Embedding, RMSNorm = (
            torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Embedding, torch.nn.RMSNorm,
        )  # fmt: skip

        @staticmethod
        def read_weights(layer, like):
            weight, bias = read_weights(layer, like)
            return 2 * weight, bias

    plain = tiny()
    patched = ZigMa(plain.config, operations=Operations).eval()
    patched.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for block in plain.blocks:
            block.mixer.conv1d.weight.mul_(2)
            block.mixer.dt_proj.weight.mul_(2)
            block.norm.weight.mul_(2)
        plain.norm_f.weight.mul_(2)
        plain.x_embedder.proj.weight.mul_(2)
    x, t, _ = inputs(plain)
    torch.testing.assert_close(patched(x, t), plain(x, t))


def test_a_batch_of_none_stays_one():
    model = tiny()
    x, t, _ = inputs(model)
    assert model(x[:0], t[:0]).shape == x[:0].shape


class NotedLinear(torch.nn.Linear):
    """A layer that somebody put in the place of another."""

    def forward(self, x):
        return 2 * super().forward(x)


class NotedConv2d(torch.nn.Conv2d):
    """As NotedLinear."""

    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer, inputs, output):
    return 2 * output


def changed(layer, how):
    """What adapters of other packages make of a layer: one in its place, a hook on it, or another forward."""
    if how == "replaced" and isinstance(layer, torch.nn.Linear):
        layer.__class__ = NotedLinear
    elif how == "replaced":
        layer.__class__ = NotedConv2d
    elif how == "hooked":
        layer.register_forward_hook(doubled)
    else:
        plain = layer.forward
        layer.forward = lambda x: 2 * plain(x)


@pytest.mark.parametrize("how", ["replaced", "hooked", "forward"])
@pytest.mark.parametrize("name", ["x_embedder.proj", "blocks.1.mixer.dt_proj"])
def test_a_layer_that_was_changed_is_called_as_it_stands(name, how):
    expected, model = tiny(), tiny()
    x, t, _ = inputs(model)
    plain = model(x, t)
    with torch.no_grad():
        for parameter in expected.get_submodule(name).parameters():
            parameter.mul_(2)
    changed(model.get_submodule(name), how)
    torch.testing.assert_close(model(x, t), expected(x, t))
    assert not torch.allclose(model(x, t), plain)


@torch.no_grad()
def test_what_a_hook_has_seen_of_the_step_sizes_stays(monkeypatch):
    """A scan may write its result over them, but not over what others keep."""
    model, kept = tiny(), []
    x, t, _ = inputs(model)
    over = mock.Mock(wraps=native.scan_over)
    monkeypatch.setattr(native, "scan_over", over)
    plain = model(x, t)
    for block in model.blocks:
        block.mixer.dt_proj.register_forward_hook(lambda _layer, _inputs, out: kept.append((out, out.clone())))
    calls = over.call_count
    places = [call.args[0].data_ptr() for call in over.call_args_list]
    step_sizes = [call.args[2].data_ptr() for call in over.call_args_list]
    torch.testing.assert_close(model(x, t), plain)
    assert over.call_count == calls
    assert len(kept) == len(model.blocks)
    assert all(torch.equal(now, then) for now, then in kept)
    if "native" in available_backends():
        assert calls == len(model.blocks)
        assert places == step_sizes


@pytest.mark.parametrize(
    ("condition", "change", "sentence"),
    [
        ("none", {"x": torch.zeros(2, 4, 4, 6)}, r"got latents of shape \(2, 4, 4, 6\), expected \(batch, 3, height"),
        ("none", {"x": torch.zeros(3, 4, 6)}, "got latents of shape"),
        ("none", {"x": torch.zeros(2, 3, 0, 6)}, r"got latents of shape \(2, 3, 0, 6\), expected at least one token"),
        ("none", {"t": torch.zeros(3)}, r"got times of shape \(3,\), expected one for each of 2"),
        ("text", {"y": None}, r"got text features of none, expected \(2, tokens, 6\)"),
        ("text", {"y": torch.zeros(2, 5, 7)}, r"shape \(2, 5, 7\), expected \(2, tokens, 6\)"),
        ("class", {"y": torch.zeros(2)}, "expected 2 whole numbers from 0 to 2"),
        ("none", {"token_orders": [torch.arange(24)]}, "got 1 token orders, but this model has 3 layers"),
        ("none", {"token_orders": [torch.arange(20)] * 3}, "has 20 entries, but the input has 24 tokens"),
        ("none", {"token_orders": [torch.zeros(24, dtype=torch.long)] * 3}, "no permutation of 0 to 23"),
    ],
)
def test_mistakes_are_named(condition, change, sentence):
    model = tiny(condition)
    x, t, y = inputs(model)
    with pytest.raises(ValueError, match=sentence):
        model(**{"x": x, "t": t, "y": y, **change})


@pytest.mark.parametrize("condition", ["class", "text"])
def test_an_encoded_condition_is_the_condition(condition):
    """What a sampling run computes once gives the same velocity, bit for bit."""
    model = tiny(condition)
    x, t, y = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(x, t, model.encode_condition(y)), model(x, t, y))
    with pytest.raises(ValueError, match="encoded conditions, expected one for each of 1 latents"):
        model(x[:1], t[:1], model.encode_condition(y))
    assert tiny().encode_condition(None) is None


def test_given_orders_are_prepared_once_and_again_when_they_change(monkeypatch):
    """A sampling run gives the same tensors at every step; one that changed in place, or another, is looked at anew."""
    model = tiny()
    x, t, _ = inputs(model)
    orders = [scan_order("hilbert", i, height=4, width=6) for i in range(3)]
    prepared, as_scans = [], model._as_scans
    monkeypatch.setattr(model, "_as_scans", lambda *arguments: prepared.append(1) or as_scans(*arguments))
    with torch.no_grad():
        v = model(x, t, token_orders=orders)
        assert torch.equal(model(x, t, token_orders=list(orders)), v) and len(prepared) == 1
        fresh = [order.clone() for order in orders]
        assert torch.equal(model(x, t, token_orders=fresh), v) and len(prepared) == 2
        fresh[1].copy_(orders[1].flip(0))
        changed = model(x, t, token_orders=fresh)
        assert len(prepared) == 3 and not torch.equal(changed, v)
        with torch.inference_mode():
            assert torch.equal(model(x, t, token_orders=[order.clone() for order in orders]), v)
        with pytest.raises(ValueError, match="is no permutation"):
            fresh[1].zero_()
            model(x, t, token_orders=fresh)


def test_time_frequencies_are_the_same_bits_on_every_machine():
    """The last bit of an exponential moves published outputs by more than their limit; no processor may decide it."""
    frequencies = torch.tensor(TimestepEmbedder(16)._frequencies, dtype=torch.float32)
    exponents = (-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).double()
    step = torch.nextafter(frequencies, torch.full((128,), 2.0)) - frequencies
    ulps = (frequencies.double() - exponents.exp()) / step
    assert ulps.abs().max() < 0.53 and (ulps.abs() > 0.5).nonzero().flatten().tolist() == [12]
    digest = hashlib.sha256(frequencies.numpy().tobytes()).hexdigest()
    assert digest.startswith("1fbe4f4713b7efd5"), digest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 2.0}, "ZigMaConfig.depth is 2.0, expected int"),
        ({"depth": "2"}, "ZigMaConfig.depth is '2', expected int"),
        ({"patch_size": True}, "ZigMaConfig.patch_size is True, expected int"),
        ({"norm_epsilon": "1e-5"}, "ZigMaConfig.norm_epsilon is '1e-5', expected float"),
        ({"scan_type": None}, "ZigMaConfig.scan_type is None, expected str"),
        ({"rms_norm": "False"}, "ZigMaConfig.rms_norm is 'False', expected bool"),
        ({"dt_rank": "auto"}, "ZigMaConfig.dt_rank is 'auto', expected int | None"),
        ({"img_dim": "32"}, "ZigMaConfig.img_dim is '32', expected a whole number or two"),
        ({"img_dim": (4.0, 6)}, r"ZigMaConfig.img_dim is \(4.0, 6\), expected a whole number or two"),
        ({"img_dim": None}, "ZigMaConfig.img_dim is None, expected a whole number or two"),
        ({"img_dim": (4, 6, 8)}, "has to be a height and a width"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        ZigMaConfig(**{"in_channels": 3, "embed_dim": 16, "depth": 2, "img_dim": 4, **fields})


def test_numbers_of_other_libraries_and_switches_as_numbers_are_fields():
    numpy = pytest.importorskip("numpy")
    config = ZigMaConfig(in_channels=numpy.int64(3), embed_dim=16, depth=2, img_dim=[4, 6], rms_norm=1, norm_epsilon=1)
    assert config.in_channels == 3 and config.img_dim == (4, 6)


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_that_the_model_lacks_is_refused_by_name(label):
    model = tiny("class")
    x, t, _ = inputs(model)
    labels = torch.tensor([1, label])
    for ask in (lambda: model(x, t, labels), lambda: model.encode_condition(labels)):
        with pytest.raises(ValueError, match=f"got the label {label}, but this model has 3: expected 0 to 2"):
            ask()
    assert model(x[:0], t[:0], labels[:0]).shape == x[:0].shape


READ_LAYERS = ("blocks.1.norm", "norm_f", "blocks.1.mixer.conv1d")  # whose weights a kernel takes, not they themselves


@pytest.mark.parametrize("fields", [{}, {"rms_norm": False}, {"scan_type": "v2"}, {"share_ssm": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", READ_LAYERS)
def test_hooks_run_where_kernels_read_the_weights(name, dtype, fields):
    """What a hook sees is what the kernel computes, and what it returns counts."""
    if "conv1d" in name and "share_ssm" in fields:
        name = "ssm.conv1d"
    model = tiny(scan_type="zigzagN8", **fields) if "scan_type" not in fields else tiny(**fields)
    model = model.to(dtype)
    x, t, y = inputs(model)
    x, want, seen = x.to(dtype), model(x.to(dtype), t, y), []
    layer = model.get_submodule(name)
    with layer.register_forward_hook(lambda _layer, given, out: seen.append((given[0], out))):
        got = model(x, t, y)
    assert seen and seen[0][0].dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 1e-1}
    torch.testing.assert_close(got, want, **tolerance)
    with layer.register_forward_hook(lambda _layer, _given, out: out.flip(-1)):  # the last LayerNorm sees no factor
        assert not torch.allclose(model(x, t, y), want, **tolerance)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", READ_LAYERS)
def test_weights_that_a_hook_makes_follow_what_it_makes_them_of(name):
    """Pruning, and the weight_norm of old, compute the weight in a hook before each call."""
    model = tiny()
    x, t, y = inputs(model)
    layer = model.get_submodule(name)
    if "conv1d" in name:
        torch.nn.utils.weight_norm(layer)
        made_of = layer.weight_g
    else:
        torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5)
        made_of = layer.weight_orig
    before = model(x, t, y)
    before.square().mean().backward()
    assert made_of.grad is not None and made_of.grad.any()
    with torch.no_grad():
        made_of.mul_(torch.rand_like(made_of) + 1)
    assert not torch.allclose(model(x, t, y), before, atol=1e-3)


@pytest.mark.parametrize("fields", [{}, {"rms_norm": False}, {"scan_type": "v2"}, {"mixer": "attention"}], ids=str)
def test_a_float64_model_computes_in_float64(fields):
    """Slopes by differences of 1e-6: of sums or decays in float32 nothing of them would be left."""
    model = tiny("text", embed_dim=8, depth=2, img_dim=(2, 2), **fields).double()
    x, t, y = (None if v is None else v.double() for v in inputs(model))
    assert torch.autograd.gradcheck(lambda x, y: model(x, t, y), (x.requires_grad_(), y.requires_grad_()))
    ends = ("0.mixer.A_log", "0.mixer.dt_proj.bias", "0.norm.weight")
    for parameter in (p for name, p in model.named_parameters() if name.endswith(ends)):
        direction, eps = torch.randn_like(parameter), 1e-6
        slope = torch.autograd.grad((model(x, t, y) ** 2).sum(), parameter)[0].mul(direction).sum()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(sign * eps * direction)
                values.append((model(x, t, y) ** 2).sum())
                parameter.sub_(sign * eps * direction)
        torch.testing.assert_close((values[0] - values[1]) / (2 * eps), slope, rtol=1e-5, atol=1e-6)
