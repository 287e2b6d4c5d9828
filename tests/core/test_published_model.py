"""Every option of the published model: recorded outputs, the formulas written out, and laws of space and time."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from written_out import zigma as written_out

from zigma.config import PRESETS, ZigMaConfig, published_arguments
from zigma.embedders import sine_positions
from zigma.model import ZigMa
from zigma.scan_orders import is_order, order_schedule, scan_order

EXTRAS = {"none": ["legacy_permutation"], "video": ["corrected_time_order"]}
RECORDED = ["none", "text", "class", "v2", "hilbert", "video"]


def loud(config: ZigMaConfig, seed: int = 0, **options) -> ZigMa:
    """A model whose every weight matters."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = ZigMa(config, generator=generator, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith(("A_log", "A_b_log")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(config: ZigMaConfig, batch: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    frames = [config.video_frames] * (config.video_frames > 0)
    x = torch.randn(batch, *frames, config.in_channels, *config.img_dim, generator=generator)
    t = torch.rand(batch, generator=generator)
    y = None
    if config.has_text:
        y = torch.randn(batch, 3, config.d_context, generator=generator)
    elif config.num_classes > 0:
        y = torch.randint(config.num_classes, (batch,), generator=generator)
    return x, t, y


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("grad", [False, True])
def test_outputs_equal_those_of_the_published_implementation(root, name, grad):
    with safe_open(root / f"tests/data/published_{name}.safetensors", framework="pt") as file:
        recorded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        arguments = json.loads(file.metadata()["arguments"])
    for switch in [None, *EXTRAS.get(name, [])]:
        model = ZigMa(ZigMaConfig.from_published(**arguments, **({switch: True} if switch else {}))).eval()
        model.load_state_dict({k.removeprefix("model."): v for k, v in recorded.items() if k.startswith("model.")})
        with torch.set_grad_enabled(grad):  # attention takes another way where gradients are wanted
            v = model(recorded["input.x"], recorded["input.t"], recorded.get("input.y"))
        expected = recorded[f"output.{switch}" if switch else "output"]
        torch.testing.assert_close(v, expected, atol=1e-4, rtol=0)


def test_parameter_names_and_shapes_are_those_of_the_published_files(root):
    for name, recorded in json.loads((root / "tests/data/published_shapes.json").read_text()).items():
        model = ZigMa(ZigMaConfig.from_published(**recorded["config"]), device="meta")
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == recorded["shapes"], name
        assert sum(p.numel() for p in model.parameters()) == recorded["params"]


# (4 channels, 32x32, no position embedding) in millions: plain, with text of width 768, bidirectional.
PUBLISHED_SIZES = {
    "S": (31.3, 59.5, 33.1), "B": (133.8, 214.7, 139.4), "M": (266.9, 428.1, 278.0), "L": (472.5, 725.1, 490.5),
    "H": (1058.7, 1550.9, 1095.1),
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", range(3))
def test_presets_have_the_published_sizes(preset, kind):
    fields = ({}, {"has_text": True, "d_context": 768}, {"scan_type": "v2"})[kind]
    model = ZigMa(ZigMaConfig.preset(f"{preset}/1", in_channels=4, img_dim=32, **fields), device="meta")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED_SIZES[preset][kind], abs=0.06)


@st.composite
def configurations(draw):
    """Any model: every option drawn on its own, the sizes small."""
    patch, frames = draw(st.integers(1, 2)), draw(st.sampled_from([0, 0, 2, 3]))
    sides = (patch * draw(st.integers(1, 3)), patch * draw(st.integers(1, 4)))
    fields = {
        "in_channels": draw(st.integers(1, 3)), "embed_dim": 4 * draw(st.integers(1, 5)),
        "depth": draw(st.integers(1, 5)), "img_dim": sides, "patch_size": patch, "video_frames": frames,
        "rms_norm": draw(st.booleans()), "norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "d_state": draw(st.integers(1, 5)), "d_conv": draw(st.integers(2, 4)), "expand": draw(st.integers(1, 2)),
        "dt_rank": draw(st.sampled_from([None, 3])), "conv_bias": draw(st.booleans()), "bias": draw(st.booleans()),
    }  # fmt: skip
    if frames:
        fields["scan_type"] = draw(
            st.sampled_from(["v2", "video_sst", "zzvideo_sst", "video_st", "video_ts", "video_tts"])
        )
        fields |= {"tpe": draw(st.booleans()), "use_pe": draw(st.sampled_from([0, 2]))}
        fields["corrected_time_order"] = draw(st.booleans())
    else:
        fields["scan_type"] = draw(st.sampled_from(["v2", "zigzagN1", "zigzagN4", "zigzagN8", "randomN2", "hilbertN3"]))
        fields["use_pe"] = draw(st.sampled_from([0, 1, 2]))
        fields["legacy_permutation"] = fields["scan_type"] != "v2" and draw(st.booleans())
    condition = draw(st.sampled_from([{}, {"num_classes": 3}, {"has_text": True, "d_context": 4}]))
    return ZigMaConfig(**fields, **condition)


@settings(max_examples=60, deadline=None)
@given(config=configurations(), seed=st.integers(0, 99))
def test_any_model_computes_the_formulas_written_out(config, seed):
    model = loud(config, seed)
    x, t, y = inputs(config, seed=seed)
    orders = None
    if not config.scan_type.startswith(("zigzag", "v2", "video", "zz")):
        orders = model.layer_orders(*config.grid)
    with torch.no_grad():
        expected = written_out(config, model.state_dict(), x, t, y, orders)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(model(x, t, y) / scale, expected / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scan_type", ["video_s", "video_ss"])
def test_frames_do_not_see_each_other_in_spatial_layers(scan_type):
    config = ZigMaConfig(2, 16, 3, (4, 6), 2, scan_type=scan_type, video_frames=3, tpe=True, use_pe=2)
    model = loud(config)
    x, t, _ = inputs(config)
    v = model(x, t)
    other = x.clone()
    other[:, 1] += 1
    changed = (model(other, t) - v).abs().amax((0, 2, 3, 4))
    assert changed[1] > 1e-2 and changed[0] == changed[2] == 0


def test_places_do_not_see_each_other_in_temporal_layers():
    config = ZigMaConfig(2, 16, 2, (4, 6), 2, scan_type="video_t", video_frames=3, corrected_time_order=True)
    model = loud(config)
    x, t, _ = inputs(config)
    other = x.clone()
    other[:, 0, :, :2, :2] += 1
    changed = (model(other, t) - model(x, t)).abs().amax((0, 2))
    assert changed[0, :2, :2].min() > 1e-3 and changed[2, :2, :2].max() > 1e-4  # both ways through time
    assert changed[:, 2:].max() == changed[:, :, 2:].max() == 0


def test_published_temporal_layers_write_frames_backwards():
    """One temporal layer: what the corrected model writes for frame f, the published one writes for frame T-1-f."""
    config = ZigMaConfig(2, 16, 1, (2, 2), scan_type="video_t", video_frames=4, corrected_time_order=True)
    corrected = loud(config)
    published = ZigMa(ZigMaConfig.from_json(config.to_json().replace('"corrected_time_order": true', '"bias": false')))
    published.eval().load_state_dict(corrected.state_dict())
    tokens, frames = torch.randn(1, 16, 16), []
    for model in (corrected, published):
        (scan,), to_raster = model._scans((2, 2), 4, torch.device("cpu"), None)
        mixed = model.blocks[0]._mix(tokens[:, scan.gather], scan, None)
        frames.append(mixed[:, to_raster].view(1, 4, 4, 16))
    assert torch.equal(frames[1], frames[0].flip(1))


def transposed(order, height, width):
    """The same walk over the transposed grid: token (row, column) has become (column, row)."""
    return (order % width) * height + order // width


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(["zigzag", "hilbert", "sweep", "diagonal", "random"]), patch=st.integers(1, 2),
       height=st.integers(1, 4), width=st.integers(1, 5), use_pe=st.sampled_from([0, 2]))  # fmt: skip
def test_a_transposed_input_in_transposed_orders_gives_the_transposed_velocity(kind, patch, height, width, use_pe):
    config = ZigMaConfig(2, 12, 3, (patch * height, patch * width), patch, use_pe=use_pe)
    model = loud(config)
    flipped = ZigMaConfig(2, 12, 3, (patch * width, patch * height), patch, use_pe=use_pe)
    state = dict(model.state_dict())
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].transpose(2, 3)
    for key in ("weight", "bias"):
        name = f"final_layer.linear.{key}"
        features = state[name].unflatten(0, (patch, patch, 2))
        state[name] = features.transpose(0, 1).flatten(0, 2)
    if use_pe:
        state["pos_embed"] = state["pos_embed"].unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)
    other = ZigMa(flipped).eval()
    other.load_state_dict(state)
    generator = torch.Generator().manual_seed(0)
    orders = [scan_order(kind, i, height=height, width=width, generator=generator) for i in range(3)]
    x, t, _ = inputs(config)
    with torch.no_grad():
        v = model(x, t, token_orders=orders)
        v_t = other(x.transpose(2, 3), t, token_orders=[transposed(order, height, width) for order in orders])
    scale = float(v.abs().max())
    torch.testing.assert_close(v_t.transpose(2, 3) / scale, v / scale, atol=1e-5, rtol=0)


OPTIONS = [
    {"scan_type": "v2"}, {"share_ssm": True}, {"share_ssm": True, "scan_type": "v2"}, {"mixer": "attention"},
    {"rms_norm": False}, {"video_frames": 3, "scan_type": "video_sst", "tpe": True},
    {"video_frames": 3, "scan_type": "video_st", "mixer": "attention"}, {"video_frames": 2, "scan_type": "v2"},
    {"video_frames": 3, "scan_type": "video_tts", "share_ssm": True}, {"legacy_permutation": True},
    {"scan_type": "bidirectionalN2"}, {"scan_type": "hilbert-walkN8"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_keeps_the_laws_of_a_model(options):
    config = ZigMaConfig(**{"in_channels": 3, "embed_dim": 16, "depth": 4, "img_dim": (4, 6), "patch_size": 2,
                            "use_pe": 2, "num_classes": 3, "drop_path_rate": 0.3, **options})  # fmt: skip
    model = loud(config)
    x, t, y = inputs(config, batch=3)
    with torch.no_grad():
        v = model(x, t, y)
        singles = [model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)]
    assert v.shape == x.shape
    torch.testing.assert_close(v, torch.cat(singles), atol=1e-5, rtol=1e-5)
    model.train()
    model(x, t, y).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert ZigMaConfig.from_json(config.to_json()) == config


def test_shared_parameters_are_there_once():
    config = ZigMaConfig(4, 32, 6, 8)
    own, shared = (ZigMa(ZigMaConfig(4, 32, 6, 8, share_ssm=share), device="meta") for share in (False, True))
    part = sum(
        p.numel() for n, p in own.blocks[0].mixer.named_parameters() if "in_proj" not in n and "out_proj" not in n
    )
    total, less = (sum(p.numel() for p in model.parameters()) for model in (own, shared))
    assert total - less == part * (config.depth - 1)
    assert [n for n in shared.state_dict() if "A_log" in n] == ["ssm.A_log"]


def test_layers_that_share_their_parameters_equal_layers_that_have_equal_ones():
    shared = loud(ZigMaConfig(2, 16, 3, (3, 4), share_ssm=True))
    own = ZigMa(ZigMaConfig(2, 16, 3, (3, 4))).eval()
    state = {k: v for k, v in shared.state_dict().items() if not k.startswith("ssm.")}
    for key, value in shared.ssm.state_dict().items():
        state |= {f"blocks.{i}.mixer.{key}": value for i in range(3)}
    own.load_state_dict(state)
    x, t, _ = inputs(own.config)
    assert torch.equal(own(x, t), shared(x, t))


def test_attention_does_not_know_the_order():
    config = ZigMaConfig(2, 16, 2, (3, 4), mixer="attention", use_pe=1)
    model = loud(config)
    x, t, _ = inputs(config)
    assert torch.equal(model(x, t), model(x, t, token_orders=[scan_order("hilbert", height=3, width=4)] * 2))


def test_a_bidirectional_mixer_reads_any_order_both_ways():
    config = ZigMaConfig(2, 16, 2, (3, 4), scan_type="v2")
    model = loud(config)
    x, t, _ = inputs(config)
    plain = model(x, t).detach()
    assert torch.equal(plain, model(x, t, token_orders=[torch.arange(12)] * 2))
    assert not torch.allclose(plain, model(x, t, token_orders=[scan_order("hilbert", height=3, width=4)] * 2))
    # Backwards, with the two directions' parameters exchanged, it is the same layer.
    state = model.state_dict()
    names = {"conv1d": "conv1d_b", "x_proj": "x_proj_b", "dt_proj": "dt_proj_b", "A_log": "A_b_log", "D": "D_b"}
    names |= {b: a for a, b in names.items()}
    swapped = {
        ".".join(names.get(part, part) for part in key.split(".")): value.clone() for key, value in state.items()
    }
    model.load_state_dict(swapped)
    v = model(x, t, token_orders=[torch.arange(12).flip(0)] * 2)
    torch.testing.assert_close(v, plain, atol=1e-5, rtol=1e-5)


def test_random_orders_are_drawn_once_and_stay_with_the_model():
    config = ZigMaConfig(2, 16, 5, (3, 4), scan_type="randomN2")
    first, again = (ZigMa(config, generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert len(first.token_orders) == 5 and first.token_orders[0] is first.token_orders[4]
    assert all(
        is_order(o, 12) and torch.equal(o, p) for o, p in zip(first.token_orders, again.token_orders, strict=True)
    )
    with pytest.raises(ValueError, match=r"draws its token orders, but there is nothing to draw from: pass generator="):
        ZigMa(config)
    with pytest.raises(ValueError, match="token orders are random"):
        ZigMa(config, device="meta").layer_orders(3, 4)


def test_fixed_positions_are_the_recorded_formula_and_follow_the_grid():
    """Column before row, sines before cosines, frequencies from 1 down to almost 1/10000."""
    table = sine_positions(2, 3, 8)[0].double()
    w = torch.tensor([1.0, 10000**-0.5], dtype=torch.float64)
    row, column = 1, 2
    expected = torch.cat([(column * w).sin(), (column * w).cos(), (row * w).sin(), (row * w).cos()])
    torch.testing.assert_close(table[row * 3 + column], expected, atol=1e-6, rtol=0)
    model = loud(ZigMaConfig(2, 16, 2, 4, use_pe=1))
    assert torch.equal(model.pos_embed, sine_positions(4, 4, 16)) and not model.pos_embed.requires_grad
    wide = ZigMa(ZigMaConfig(2, 16, 2, (4, 6), use_pe=1)).eval()
    wide.load_state_dict({**model.state_dict(), "pos_embed": wide.pos_embed})
    x, t, _ = inputs(wide.config)
    assert torch.equal(model(x, t), wide(x, t))


def test_another_length_of_video_gets_resampled_embeddings(caplog):
    config = ZigMaConfig(2, 16, 3, (4, 4), 2, scan_type="video_sst", video_frames=3, tpe=True, use_pe=2)
    model = loud(config)
    v = model(torch.randn(1, 5, 2, 4, 8), torch.rand(1))
    assert v.shape == (1, 5, 2, 4, 8) and "resampled" in caplog.text
    # Constant embeddings stay what they are, so resampling moves nothing.
    with torch.no_grad():
        model.pos_embed.fill_(0.3)
        model.temporal_pos_embedding.fill_(-0.1)
    tokens = torch.zeros(1, 5 * 2 * 4, 16)
    torch.testing.assert_close(model._add_positions(tokens, (2, 4), 5), torch.full_like(tokens, 0.2))


def test_initial_values_are_the_published_ones():
    config = ZigMaConfig(4, 64, 4, 4, scan_type="v2", dt_init="constant", dt_scale=2.0, use_pe=2)
    torch.manual_seed(0)
    model = ZigMa(config)
    mixer = model.blocks[1].mixer
    assert (mixer.dt_proj.weight == 2 * 4**-0.5).all() and (mixer.dt_proj_b.bias == 0).all()
    assert mixer.dt_proj_b.weight.std() > 0.1 and torch.equal(mixer.A_log, mixer.A_b_log)
    assert (mixer.D_b == 1).all() and (model.pos_embed == 0).all()
    assert (model.final_layer.linear.weight != 0).all()  # an untrained model answers with something
    plain = ZigMa(ZigMaConfig(4, 64, 4, 4, rescale_prenorm_residual=False))
    torch.manual_seed(0)
    twice = ZigMa(ZigMaConfig(4, 64, 4, 4, n_residuals_per_layer=4))
    ratio = twice.blocks[0].mixer.out_proj.weight.detach().std() / plain.blocks[0].mixer.out_proj.weight.detach().std()
    assert ratio == pytest.approx(1 / 4, rel=0.05)  # sqrt(4 * depth 4)


SMALL = {"in_channels": 4, "embed_dim": 64, "depth": 4, "img_dim": 8}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"use_pe": 3}, "neither trained nor saved.*set it to 0"),
        ({"use_pe": 1, "video_frames": 2, "scan_type": "video_st"}, "made for images only"),
        ({"use_pe": 1, "embed_dim": 66}, "divisible by 4"),
        ({"tpe": True}, "there are no frames"),
        ({"scan_type": "parallelN4"}, "makes parameters and has no computation"),
        ({"scan_type": "zigzagN9"}, "asks for 9 orders: zigzag has 1 to 8"),
        ({"scan_type": "sweep"}, "names no token orders"),
        ({"scan_type": "video_sst"}, "video_frames is 0"),
        ({"scan_type": "video_xy", "video_frames": 2}, "names no token orders"),
        ({"scan_type": "zigzagN8", "video_frames": 2}, "expected video_ and a word of s and t"),
        ({"scan_type": "v2", "legacy_permutation": True}, "leave it False"),
        ({"mixer": "lstm"}, "expected 'mamba' or 'attention'"),
        ({"mixer": "attention", "share_ssm": True}, "concern state-space layers"),
        ({"dt_init": "zero"}, "expected 'random' or 'constant'"),
        ({"video_frames": -1}, "expected 0 for images"),
    ],
)
def test_impossible_models_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ZigMaConfig(**{**SMALL, **fields})


def test_published_arguments_are_all_understood():
    config = ZigMaConfig.from_published(
        **SMALL, ssm_cfg={"d_state": 8, "dt_rank": "auto", "dt_min": 0.01}, fused_add_norm=False, device="cuda",
        use_jit=True, initializer_cfg={"initializer_range": 0.02, "n_residuals_per_layer": 2}, m_init=True,
        n_context_token=77,
    )  # fmt: skip
    assert config.scan_type == "v2" and config.d_state == 8 and config.dt_rank == 4 and config.dt_min == 0.01
    assert config.n_residuals_per_layer == 2 and config.n_context_token == 77
    with pytest.raises(ValueError, match=r"unknown argument colour"):
        ZigMaConfig.from_published(**SMALL, colour=1)
    with pytest.raises(ValueError, match=r"unknown argument seed"):
        ZigMaConfig.from_published(**SMALL, initializer_cfg={"seed": 1})


def test_published_yaml_files_are_read(tmp_path):
    path = tmp_path / "3d_zigzag8sst_b2.yaml"
    path.write_text(
        "name: 3d_zigzag8sst_b2\ntarget: model_zigma.ZigMa\nparams:\n    img_dim: 32\n    in_channels: 4\n"
        "    patch_size: 2\n    embed_dim: 768\n    depth: 24 \n    num_classes: 101\n"
        "    video_frames: ${data.video_frames}\n    scan_type: zzvideo_sst\n    use_pe: 2 # learned\n"
    )
    config = ZigMaConfig.from_published_yaml(path, video_frames=16)
    assert config.video_frames == 16 and config.scan_type == "zzvideo_sst" and config.num_classes == 101
    with pytest.raises(ValueError, match=r"leaves video_frames to another file .*: give video_frames beside it"):
        ZigMaConfig.from_published_yaml(path)
    path.write_text("model:\n  params: {img_dim: 8, in_channels: 4, embed_dim: 16, depth: 2, scan_type: v2}\n")
    assert ZigMaConfig.from_published_yaml(path).depth == 2
    for text, sentence in (("- 1\n- 2", "has no 'params'"), ("a: [", "is no YAML")):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            ZigMaConfig.from_published_yaml(path)
    with pytest.raises(ValueError, match="has no 'params'"):
        published_arguments(None, "args")


def test_a_schedule_says_which_axis_each_layer_mixes():
    orders = order_schedule("video_sst", 6, 2, 3, frames=4)
    assert [len(order) for order in orders] == [6, 6, 4, 6, 6, 4]
    assert [orders[2].tolist(), orders[5].tolist()] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    spatial = [orders[i] for i in (0, 1, 3, 4)]
    for i, order in enumerate(spatial):
        assert torch.equal(order, scan_order("zigzag", i, height=2, width=3))
