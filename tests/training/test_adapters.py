"""Adapters: nothing at their start, the same as merged weights after it, and nothing left when they are taken off."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from zigma.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from zigma.config import ZigMaConfig
from zigma.model import ZigMa
from zigma.training.adapter_layers import factorization
from zigma.training.adapters import AdapterSettings, add_adapters, load_adapters, save_adapters

LORA = AdapterSettings(rank=3, alpha=6.0)
LOKR = AdapterSettings(kind="lokr", rank=2, alpha=6.0, factor=4)
WHOLE = AdapterSettings(kind="lokr", rank=64, alpha=64.0)
EVERY_LINEAR = (
    "*.mixer.?*_proj*", "*.msa.*", "*.adaLN_modulation.1", "t_embedder.mlp.*", "y_embedder", "final_layer.linear",
)  # fmt: skip
KINDS = pytest.mark.parametrize("settings", [LORA, LOKR, WHOLE], ids=["lora", "lokr", "lokr-whole"])
MODELS = {
    "text": {"has_text": True, "d_context": 12},
    "plain": {},
    "class": {"num_classes": 5},
    "both ways": {"scan_type": "v2", "rms_norm": False},
    "shared": {"share_ssm": True, "bias": True, "has_text": True, "d_context": 12},
    "attention": {"mixer": "attention", "has_text": True, "d_context": 12},
    "video": {"scan_type": "video_sst", "video_frames": 2, "tpe": True, "has_text": True, "d_context": 12},
}
# One kind of adapter is like another to a model: each model meets one, and the text model all.
EVERYWHERE = pytest.mark.parametrize(
    ("name", "settings"),
    [("text", LORA), ("text", LOKR), ("text", WHOLE), ("plain", LORA), ("class", LOKR), ("both ways", LORA),
     ("shared", LOKR), ("attention", LORA), ("video", LOKR)],
)  # fmt: skip


def tiny(name: str = "text", **more) -> ZigMa:
    """Of random weights throughout, in evaluation mode."""
    fields = {"in_channels": 3, "embed_dim": 16, "depth": 2, "img_dim": (4, 6), "patch_size": 2, "use_pe": 2}
    torch.manual_seed(0)
    model = ZigMa(ZigMaConfig(**{**fields, **MODELS[name], **more}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                draw = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
                parameter.copy_(draw)
    return model.eval()


def inputs(model: ZigMa) -> tuple:
    config, generator = model.config, torch.Generator().manual_seed(2)
    frames = [config.video_frames] * (config.video_frames > 0)
    x = torch.randn(2, *frames, config.in_channels, *config.img_dim, generator=generator)
    y = {"none": None, "class": torch.tensor([1, 4]), "text": torch.randn(2, 5, 12, generator=generator)}
    return x, torch.tensor([0.2, 0.7]), y[config.conditioning]


def trained(model: ZigMa, settings: AdapterSettings, size: float = 0.2):
    """Adapters whose every factor is random."""
    adapters = add_adapters(model, settings, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return adapters


def close(got, expected, limit=1e-5):
    assert (got - expected).abs().max() < limit * max(1.0, expected.abs().max().item())


@EVERYWHERE
def test_new_ones_change_nothing_and_taken_off_leave_nothing(name, settings):
    model = tiny(name)
    x, t, y = inputs(model)
    before, state = model(x, t, y), {key: value.clone() for key, value in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    modules = [key for key, _ in model.named_modules()]
    adapters = add_adapters(model, settings, torch.Generator().manual_seed(0))
    assert torch.equal(model(x, t, y), before)
    assert list(model.state_dict()) == list(state) and [key for key, _ in model.named_modules()] == modules
    assert all(torch.equal(factor, torch.zeros_like(factor)) for factor in deltas(adapters))
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.fill_(0.3)
    assert (model(x, t, y) - before).abs().max() > 1e-3
    adapters.strength = 0.0
    assert torch.equal(model(x, t, y), before)
    adapters.remove()
    adapters.strength = 1.0
    assert torch.equal(model(x, t, y), before)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def deltas(adapters) -> list[torch.Tensor]:
    return [adapter.delta() for adapter in adapters.module]


@EVERYWHERE
def test_adapters_equal_merged_weights_in_a_plain_model(name, settings):
    model = tiny(name)
    plain = copy.deepcopy(model)
    x, t, y = inputs(model)
    before = model(x, t, y)
    adapters = trained(model, settings)
    for strength in (1.0, -0.4):
        adapters.strength = strength
        plain.load_state_dict(adapters.merged_state_dict())
        got = model(x, t, y)
        close(got, plain(x, t, y))
        assert (got - before).abs().max() > 1e-3, "the adapters do nothing"


@pytest.mark.parametrize("settings", [LORA, LOKR], ids=["lora", "lokr"])
@pytest.mark.parametrize("name", ["text", "shared", "both ways"])
def test_every_linear_layer_can_have_one(name, settings):
    """No path of the model reads the weights of a layer without going through it."""
    model = tiny(name)
    targets = [target for target in EVERY_LINEAR if model.config.has_text or target not in ("*.msa.*", "y_embedder")]
    if model.config.share_ssm:
        targets.append("ssm.*_proj*")
    plain = copy.deepcopy(model)
    adapters = trained(model, dataclasses.replace(settings, targets=targets))
    assert set(adapters.names) == {key for key, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    plain.load_state_dict(adapters.merged_state_dict())
    close(model(*inputs(model)), plain(*inputs(model)))


@KINDS
def test_keys_and_values_made_beforehand_have_them_too(settings):
    model = tiny()
    plain = copy.deepcopy(model)
    x, t, y = inputs(model)
    adapters = trained(model, settings)
    condition = model.encode_condition(y)
    assert torch.equal(model(x, t, condition), model(x, t, y))
    plain.load_state_dict(adapters.merged_state_dict())
    close(condition.keys_values[1][0], plain.encode_condition(y).keys_values[1][0])
    adapters.strength = 0.0
    assert (condition.keys_values[1][0] - model.encode_condition(y).keys_values[1][0]).abs().max() > 1e-3


def test_the_default_targets_are_what_mixes_tokens():
    kinds = {name.partition(".mixer.")[2] or name.partition(".msa.")[2] for name in trained(tiny(), LORA).names}
    assert kinds == {"in_proj", "out_proj", "x_proj", "to_q", "to_k", "to_v", "to_out.0"}
    assert "ssm.x_proj" in trained(tiny("shared"), LORA).names
    assert "blocks.1.mixer.x_proj_b" in trained(tiny("both ways"), LORA).names
    assert "blocks.0.mixer.qkv" in trained(tiny("attention"), LORA).names


@KINDS
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_merged_weights_and_of_adapters_alone(settings, recompute):
    model = tiny(use_checkpoint=recompute, drop_path_rate=0.0).train()
    x, t, y = inputs(model)
    adapters = trained(model, settings)
    parameters = adapters.parameters()
    model(x, t, y).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    got = [parameter.grad.clone() for parameter in parameters]

    adapters.remove()
    weights = {
        f"{name}.weight": model.get_submodule(name).weight + adapter.delta()
        for name, adapter in zip(adapters.names, adapters.module, strict=True)
    }
    plain = tiny(drop_path_rate=0.0).train().requires_grad_(False)  # to recompute it would need the weights again
    loss = torch.func.functional_call(plain, weights, (x, t, y)).square().sum()
    for ours, theirs in zip(got, torch.autograd.grad(loss, parameters), strict=True):
        assert theirs.abs().max() > 0
        close(ours, theirs, 1e-4)


@KINDS
def test_gradients_flow_in_bfloat16(settings):
    model = tiny(drop_path_rate=0.0)
    x, t, y = inputs(model)
    wide = trained(model, settings)
    model(x, t, y).square().sum().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in wide.parameters()])
    wide.module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, t, y).float().square().sum()
    loss.backward()
    got = torch.cat([parameter.grad.flatten() for parameter in wide.parameters()])
    assert got.dtype == torch.float32 and torch.cosine_similarity(got, expected, dim=0) > 0.99

    half = tiny(drop_path_rate=0.0).to(torch.bfloat16)
    narrow = trained(half, settings)
    assert all(parameter.dtype == torch.float32 for parameter in narrow.parameters())
    half(x.bfloat16(), t, y.bfloat16()).float().square().sum().backward()
    got = torch.cat([parameter.grad.flatten() for parameter in narrow.parameters()])
    assert torch.cosine_similarity(got, expected, dim=0) > 0.95
    merged = narrow.merged_state_dict()
    assert {key: value.dtype for key, value in merged.items()} == {
        key: value.dtype for key, value in half.state_dict().items()
    }


@pytest.mark.parametrize("settings", [LORA, LOKR, WHOLE], ids=["lora", "lokr", "lokr-whole"])
def test_a_step_of_training_lowers_the_loss_from_the_start(settings):
    """Where both factors were zero no gradient would ever come."""
    model = tiny(drop_path_rate=0.0)
    x, t, y = inputs(model)
    target = model(x, t, y).detach() + 1
    adapters = add_adapters(model, settings, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(adapters.parameters(), lr=3e-2)
    losses = []
    for _ in range(6):
        loss = (model(x, t, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def test_dropout_is_of_training_only_and_of_the_adapter_only():
    model = tiny(drop_path_rate=0.0)
    x, t, y = inputs(model)
    before = model(x, t, y)
    adapters = add_adapters(model, dataclasses.replace(LORA, dropout=0.5), torch.Generator().manual_seed(0))
    assert torch.equal(model.train()(x, t, y), before), "without a change there is nothing to drop"
    trained_ones = trained(model, dataclasses.replace(LORA, dropout=0.5))
    assert not torch.equal(model(x, t, y), model(x, t, y))
    assert torch.equal(model.eval()(x, t, y), model(x, t, y))
    trained_ones.remove()
    adapters.remove()


def test_a_generator_says_how_they_start():
    first, again, other = (
        add_adapters(tiny(), LORA, torch.Generator().manual_seed(seed)).parameters() for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    adapters = add_adapters(tiny(embed_dim=64), LORA, torch.Generator().manual_seed(0))
    down = adapters.state_dict()["diffusion_model.blocks.0.mixer.in_proj.lora_down.weight"]
    assert 0.9 < down.abs().max() * math.sqrt(64) <= 1  # kaiming_uniform(a=sqrt(5)) of 64 columns
    model, state = tiny(), torch.get_rng_state()
    add_adapters(model, LORA, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_inside_a_hosts_inference_mode_they_can_be_trained():
    model = tiny(drop_path_rate=0.0)
    with torch.inference_mode():
        adapters = add_adapters(model, LORA, torch.Generator().manual_seed(0))
    model(*inputs(model)).square().sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in adapters.parameters())


@KINDS
def test_a_saved_file_is_what_was_saved(tmp_path, settings):
    model, path = tiny(), tmp_path / "style.safetensors"
    adapters = trained(model, settings)
    save_adapters(adapters, path, {"note": "mine"})
    want = model(*inputs(model))
    other = tiny()
    loaded = load_adapters(other, path)
    assert loaded.settings == settings and loaded.names == adapters.names and loaded.strength == 1
    assert torch.equal(other(*inputs(other)), want)
    got, expected = loaded.state_dict(), adapters.state_dict()
    assert got.keys() == expected.keys() == load_file(path).keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["note"] == "mine" and json.loads(metadata["zigma.adapter"])["rank"] == settings.rank
    assert list(tmp_path.iterdir()) == [path]


def from_stock_keys(weight, state, stem):
    """What a host makes of one layer's keys (its lora.py and lokr.py), written out."""
    part = {key.removeprefix(f"{stem}."): value for key, value in state.items() if key.startswith(f"{stem}.")}
    alpha = part.pop("alpha").item()
    if "lora_up.weight" in part:
        return weight + alpha / len(part["lora_down.weight"]) * part["lora_up.weight"] @ part["lora_down.weight"]
    if "lokr_w2" in part:  # no thin factor: alpha is not looked at
        return weight + torch.kron(part["lokr_w1"], part["lokr_w2"])
    scale = alpha / len(part["lokr_w2_b"])
    return weight + scale * torch.kron(part["lokr_w1"], part["lokr_w2_a"] @ part["lokr_w2_b"])


@KINDS
def test_the_keys_mean_to_a_host_what_they_mean_here(settings):
    model = tiny()
    plain = model.state_dict()
    adapters = trained(model, settings)
    merged, state = adapters.merged_state_dict(), adapters.state_dict()
    assert {key.partition(".")[0] for key in state} == {"diffusion_model"}
    for key, weight in plain.items():
        name = key.removesuffix(".weight")
        if name in adapters.names:
            close(merged[key], from_stock_keys(weight, state, f"diffusion_model.{name}"), 1e-6)
        else:
            assert torch.equal(merged[key], weight)
    used = {name.rpartition(".")[2] for name in state}
    if settings is WHOLE:
        assert used == {"lokr_w1", "lokr_w2", "alpha"}
    if settings is LOKR:
        assert {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"} <= used


def test_a_thin_factor_counts_by_layer_and_an_alpha_without_effect_is_said(caplog):
    mixed = dataclasses.replace(LOKR, rank=4, alpha=1.0, factor=-1)  # the longer parts of sides are 8 to 32
    adapters = trained(tiny(), mixed)
    thin = [adapter.low_rank for adapter in adapters.module]
    assert any(thin) and not all(thin)
    assert f"has no effect on {thin.count(False)} of {len(thin)} layers" in caplog.text
    test_the_keys_mean_to_a_host_what_they_mean_here(mixed)


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    inputs=st.integers(1, 48), outputs=st.integers(1, 48), rank=st.integers(1, 9), alpha=st.floats(0.1, 30),
    factor=st.sampled_from([-1, 1, 2, 3, 8]), kind=st.sampled_from(["lora", "lokr"]),
    rows=st.sampled_from([(), (3,), (2, 5)]),
)  # fmt: skip
def test_the_product_in_steps_is_the_product_with_the_delta(inputs, outputs, rank, alpha, factor, kind, rows):
    from zigma.training.adapter_layers import LAYERS

    settings = AdapterSettings(kind=kind, rank=rank, alpha=alpha, factor=factor)
    adapter = LAYERS[kind](nn.Linear(inputs, outputs), settings, torch.Generator().manual_seed(0)).double()
    for parameter in adapter.parameters():
        nn.init.uniform_(parameter, -1, 1, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(*rows, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(adapter(x, 0.5, True), 0.5 * x @ adapter.delta().T)


@given(size=st.integers(1, 400), factor=st.sampled_from([-1, 1, 2, 4, 7, 16, 500]))
def test_a_factorization_is_one_and_the_squarest_within_its_bound(size, factor):
    m, n = factorization(size, factor)
    assert m * n == size and m <= n and (factor < 0 or m <= factor)
    assert not any(size % k == 0 for k in range(m + 1, math.isqrt(size) + 1) if factor < 0 or k <= factor)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["*.mixer.inproj"], ["'*.mixer.inproj'", "did you mean blocks.*.mixer.in_proj?", "blocks.*.msa.to_q"]),
        (["*.in_proj", "nothing"], ["'nothing'", "matches no layer", "use "]),
        (["*.A_log"], ["blocks.0.mixer.A_log", "never onto A_log, D"]),
        (["*.mixer.D"], ["blocks.0.mixer.D", "never onto A_log, D"]),
        (["blocks.0.mixer.*"], ["blocks.0.mixer.A_log"]),
        (["*.mixer"], ["blocks.0.mixer, a Mamba", "linear layers only"]),
        (["pos_embed"], ["the parameter pos_embed"]),
        (["*.conv1d"], ["blocks.0.mixer.conv1d, a Conv1d", "linear layers only"]),
        (["x_embedder.proj"], ["a Conv2d"]),
        (["*.norm"], ["a RMSNorm"]),
        ([], ["none of which this model has"]),
        (["*.mixer.qkv"], ["none of which this model has"]),
    ],
)
def test_targets_that_mean_nothing_are_a_sentence_and_the_model_stays_as_it_is(targets, words):
    model = tiny()
    with pytest.raises(ValueError) as error:
        add_adapters(model, AdapterSettings(targets=targets))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "loha"}, "'loha', expected one of lora, lokr"), ({"rank": 0}, "rank 0"), ({"rank": 1.5}, "rank 1.5"),
        ({"alpha": 0}, "alpha 0"), ({"factor": 0}, "factor 0"), ({"dropout": 1.0}, "dropout 1.0"),
        ({"targets": "*.in_proj"}, "a list of patterns"),
    ],
)  # fmt: skip
def test_impossible_settings_are_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        AdapterSettings(**fields)


@pytest.mark.parametrize("settings", [LORA, LOKR], ids=["lora", "lokr"])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"embed_dim": 32}, r"another model or rank: diffusion_model\.blocks\.0\.mixer\.x_proj"),
        ({"depth": 1}, r"changes blocks\.1\.m.* and \d+ more, which is not among the 7 layers"),
        ({"depth": 3}, r"has nothing for blocks\.2\.m.* and \d+ more of the 21 layers"),
        ({"has_text": False, "d_context": 0}, r"changes blocks\.0\.msa\.to_"),
    ],
)
def test_one_of_another_model_is_refused_and_the_model_stays_as_it_is(tmp_path, settings, other, words):
    path, model = tmp_path / "other.safetensors", tiny(**other)
    save_adapters(trained(tiny(), settings), path)
    with pytest.raises(ValueError, match=words) as error:
        load_adapters(model, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_targets_that_another_model_lacks_are_a_sentence_too(tmp_path):
    path = tmp_path / "text.safetensors"
    save_adapters(trained(tiny(), dataclasses.replace(LORA, targets=("y_embedder",))), path)
    with pytest.raises(ValueError, match="an adapter of another model: got the target 'y_embedder'"):
        load_adapters(tiny("plain"), path)


def test_a_model_of_the_same_shapes_but_another_order_is_warned_of(tmp_path, caplog):
    path = tmp_path / "zigzag.safetensors"
    save_adapters(trained(tiny(), LORA), path)
    load_adapters(tiny(use_checkpoint=True, drop_path_rate=0.0), path)
    assert not caplog.records
    load_adapters(tiny(scan_type="hilbertN8"), path)
    assert "differs in more than its weights" in caplog.text


def test_damaged_and_foreign_files_are_a_sentence(tmp_path):
    model, path = tiny(), tmp_path / "it.safetensors"

    def refused(words: str, kind=ValueError):
        with pytest.raises(kind, match=words) as error:
            load_adapters(model, path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), error.value
        assert not any(module._forward_hooks for module in model.modules())

    refused("no such file", FileNotFoundError)
    path.write_bytes(b"<html>")
    refused("it is a web page")
    path.write_bytes(b"\x00" * 64)
    refused("cannot be read as safetensors")
    save_checkpoint(model, path)
    refused("seems to be a model")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, path)
    refused("seems to be a LoRA without the settings")
    save_file({"a": torch.zeros(1)}, path)
    refused("a file of another kind")
    save_adapters(trained(model, LORA), path)
    model = tiny()
    state, (metadata) = load_file(path), {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    stem = "diffusion_model.blocks.0.mixer.in_proj"
    for change, words in (
        (lambda: state.pop(f"{stem}.alpha"), "lacks diffusion_model.blocks.0.mixer.in_proj.alpha .1 keys missing"),
        (lambda: state.update({f"{stem}.alpha": torch.tensor(5.0)}), r"in_proj\.alpha = 5, expected 6"),
        (lambda: state.update({f"{stem}.alpha": torch.tensor(6.0), f"{stem}.lokr_w1": state[f"{stem}.alpha"]}),
         r"the unknown diffusion_model\.blocks\.0\.mixer\.in_proj\.lokr_w1"),
        (lambda: state.update({"strange": torch.zeros(1)}), "it changes strange"),
    ):  # fmt: skip
        change()
        save_file(state, path, metadata)
        refused(words)
    for text, words in (("{", "its metadata is wrong"), ("3", "its metadata is wrong"),
                        ('{"rank": 0}', "rank 0"), ('{"newer": 1}', "unknown fields newer")):  # fmt: skip
        save_file(state, path, {"zigma.adapter": text})
        refused(words)
    with pytest.raises(CheckpointError, match="a LoRA and not a ZigMa"):
        load_checkpoint(path)


def test_a_state_that_does_not_fit_changes_nothing():
    adapters = trained(tiny(), LORA)
    before = {key: value.clone() for key, value in adapters.state_dict().items()}
    zeros = {key: torch.zeros_like(value) for key, value in before.items()}
    with pytest.raises(ValueError, match="alpha = 0, expected 6"):
        adapters.load_state_dict(zeros)
    assert all(torch.equal(value, before[key]) for key, value in adapters.state_dict().items())


def test_what_cannot_be_saved_is_a_sentence(tmp_path):
    adapters = trained(tiny(), LORA)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        save_adapters(adapters, tmp_path / "it.pt")
    with pytest.raises(ValueError, match=r"got the metadata zigma\.adapter"):
        save_adapters(adapters, tmp_path / "it.safetensors", {"zigma.adapter": "{}"})
    with pytest.raises(FileNotFoundError, match="make it first"):
        save_adapters(adapters, tmp_path / "none" / "it.safetensors")
    assert not list(tmp_path.iterdir())
