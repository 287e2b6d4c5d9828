"""bfloat16 on the CPU: what has to stay float32 does, and results stay near those of float32."""

from __future__ import annotations

import copy

import pytest
import torch

from zigma import ZigMa, ZigMaConfig, load_checkpoint, save_checkpoint
from zigma.mixer import FLOAT32_PARAMETERS

KINDS = {
    "text": {"has_text": True, "d_context": 12, "use_pe": 2},
    "class": {"num_classes": 3, "rms_norm": False},
    "both directions": {"scan_type": "v2"},
    "video": {"scan_type": "video_st", "video_frames": 3},
    "one ssm": {"share_ssm": True},
}
TOLERANCE = {"rtol": 3e-2, "atol": 5e-2}  # of outputs of about unit size


def model_and_inputs(kind: str):
    torch.manual_seed(0)
    model = ZigMa(ZigMaConfig(in_channels=2, embed_dim=32, depth=4, img_dim=(6, 8), **KINDS[kind])).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.adaLN_modulation[1].weight.normal_(std=0.05)  # at their initial zeros the gates hide the mixers
    frames = [model.config.video_frames] * (model.config.video_frames > 0)
    x, t = torch.randn(3, *frames, 2, 6, 8), torch.rand(3)
    y = {"text": torch.randn(3, 5, 12), "class": torch.tensor([0, 2, 1])}.get(model.config.conditioning)
    return model, x, t, y


def short(model: ZigMa) -> set[torch.dtype]:
    return {p.dtype for name, p in model.named_parameters() if name.rpartition(".")[2] in FLOAT32_PARAMETERS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_and_d_stay_float32(kind, tmp_path):
    """However the model comes to bfloat16: made so, moved so or loaded so; and they keep their values, bit for bit."""
    model, *_ = model_and_inputs(kind)
    moved = copy.deepcopy(model).bfloat16()
    save_checkpoint(model, tmp_path / "m.safetensors")
    loaded = load_checkpoint(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    for other in (moved, loaded, ZigMa(model.config, dtype=torch.bfloat16)):
        assert short(other) == {torch.float32}
        rest = {p.dtype for n, p in other.named_parameters() if n.rpartition(".")[2] not in FLOAT32_PARAMETERS}
        assert rest == {torch.bfloat16}
    for other in (moved, loaded, moved.half().float()):
        for name, p in other.named_parameters():
            if name.rpartition(".")[2] in FLOAT32_PARAMETERS:
                assert torch.equal(p, model.get_parameter(name)), name
    assert short(copy.deepcopy(model).double()) == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
def test_velocities_stay_near_those_of_float32(kind):
    model, x, t, y = model_and_inputs(kind)
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        v = model(x, t, y)
        scale = v.std()
        got = half(x.bfloat16(), t, y.bfloat16() if y is not None and y.is_floating_point() else y)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x, t, y)
    assert got.dtype == torch.bfloat16
    for other in (got, cast):
        torch.testing.assert_close(other.float() / scale, v / scale, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_bfloat16_follows_float32(kind):
    """Under autocast every weight's gradient points where that of float32 does."""
    model, x, t, y = model_and_inputs(kind)
    target, grads = torch.randn_like(x), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = (model(x, t, y).float() - target).square().mean()
        loss.backward()
        grads.append({name: p.grad.flatten().double() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, want in grads[0].items():
        if want.norm() > 1e-6:  # a gradient of rounding alone has no direction
            assert torch.cosine_similarity(grads[1][name], want, dim=0) > 0.98, name
