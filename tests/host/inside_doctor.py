"""Checks inside a ComfyUI (see inside.py): the doctor's report, and scan backends that were asked for in vain."""

from __future__ import annotations

import os
from types import SimpleNamespace

from host_process import empty, encode, loaded, our_pictures, refused, stock
from inside_patches import other_weights

import comfy.utils  # isort: skip
import torch  # isort: skip


def report(pack, model, steps=20, cfg=2.0, width=0, height=0, **more) -> str:
    output = pack.node("ZigMaModelDoctor").execute(model, steps, cfg, width, height, **more)
    assert output.ui.as_dict()["text"] == (output.result[0],)
    return output.result[0]


def check_a_sound_model_gets_a_full_report(pack):
    model, clip, vae = loaded(pack)
    text = report(pack, model, clip=clip, vae=vae)
    assert text.startswith("No problem found.\n"), text
    parameters = sum(p.numel() for p in model.model.diffusion_model.parameters())
    for words in (
        "MODEL tiny.safetensors", "width 32, depth 2", f"{parameters:,} parameters", "float32", "token orders: zigzag",
        "the file carries: denoiser, text encoder, VAE", "orders in use: as trained\n",
        "patches (LoRA, merge): on 0 of",
        "scan backend: native: ",
        "one evaluation at 32 x 48 pixels, batch 2 (guided): ", "20 steps of euler, cfg 2: ",
        "MEMORY", "GiB free", "mamba-ssm: cannot run here", "torch " + torch.__version__.split("+")[0],
    ):  # fmt: skip
        assert words in text, f"{words}\n{text}"
    assert "at 64 x 32 pixels, batch 1:" in report(pack, model, cfg=1.0, width=32, height=64)
    refused(lambda: report(pack, model, width=40), "set the width to 32: got 40", "multiple of 16 pixels")
    for name in ("class.safetensors", "pixels.safetensors", "bare.safetensors"):
        assert report(pack, loaded(pack, name)[0]).startswith("No problem found.\n"), name


def check_problems_are_named_with_what_to_do(pack):
    model, clip, vae = loaded(pack)
    pixels, _, pixel_vae = loaded(pack, "pixels.safetensors")
    labels = loaded(pack, "class.safetensors")[0]
    assert "leave clip unconnected" in report(pack, labels, clip=clip)
    assert "latents of 4 channels, expected 3" in report(pack, pixels, vae=vae)
    assert report(pack, pixels, vae=pixel_vae).startswith("No problem found.\n")
    narrow = SimpleNamespace(tokenize=lambda text: text, encode_from_tokens=lambda tokens: torch.zeros(1, 77, 768))
    assert "features of width 768, expected 16" in report(pack, model, clip=narrow)
    key = "diffusion_model.blocks.0.mixer.in_proj.weight"
    odd = model.clone()
    odd.patches[key] = [(1.0, ("diff", (torch.zeros(3),)), 1.0, None, None)]
    assert f"use a LoRA of this model: {key}" in report(pack, odd)
    merged = model.clone()
    for name, patch in other_weights(pack).get_key_patches("diffusion_model.").items():
        merged.add_patches({name: patch}, 0.5, 0.5)
    text = report(pack, pack.node("ZigMaScanOrder").execute(merged, "hilbert", "0", "1", 0).result[0])
    assert text.startswith("No problem found.\n")
    count = len(model.model.diffusion_model.state_dict())
    assert f"on {count} of {count} weights" in text and "1 of 2 layers (layer 1: hilbert 0)" in text, text
    broken = loaded(pack)[0]
    weight = comfy.utils.get_attr(broken.model, "diffusion_model.blocks.1.mixer.D")
    weight.data[:3] = float("nan")
    text = report(pack, broken)
    assert text.startswith("PROBLEMS\n") and f"blocks.1.mixer.D (3 NaN, 0 infinite of {weight.numel()})" in text
    assert "its output is not finite in float32" in text


def check_ema_and_raw_are_told_apart(pack):
    from pathlib import Path

    from inside_files import into_models

    name = into_models(Path(__file__).parents[1] / "data" / "published_checkpoint.pt", "doctor.pt")
    for weights, words in (("ema", "running mean (EMA)"), ("raw", "last state (raw)")):
        model = pack.node("ZigMaModelLoader").execute(name, "bfloat16", weights).result[0]
        text = report(pack, model)
        assert words in text and "bfloat16" in text and "computed in: " in text, text
    assert "the file does not say which" in report(pack, loaded(pack)[0])


def check_a_backend_that_cannot_run_is_explained_when_it_is_used(pack):
    """Nodes are there and load all the same; the sentence comes from the sampler, and from the doctor as a problem."""
    kept = os.environ.get("ZIGMA_SCAN_BACKEND")
    dispatch = pack.part("zigma.selective_scan.dispatch")
    try:
        os.environ["ZIGMA_SCAN_BACKEND"] = "mamba-ssm"
        dispatch.forget_choices()
        model, clip, vae = loaded(pack)
        latent = empty(pack, model)
        for call in (
            lambda: our_pictures(pack, model, clip, vae, latent),
            lambda: stock.common_ksampler(
                model, 0, 2, 1.0, "euler", "simple", encode(clip, ""), encode(clip, ""), latent
            ),
        ):
            try:
                call()
            except RuntimeError as error:
                assert "mamba-ssm" in str(error) and "ZIGMA_SCAN_BACKEND" in str(error) and "\n" not in str(error)
                assert "pip install" in str(error), error
            else:
                raise AssertionError("nothing was refused")
        text = report(pack, model)
        assert text.startswith("PROBLEMS\n") and "change or unset ZIGMA_SCAN_BACKEND" in text, text
        os.environ["ZIGMA_SCAN_BACKEND"] = "nonsense"
        dispatch.forget_choices()
        assert "is unknown, choose from" in report(pack, model)
    finally:
        os.environ.pop("ZIGMA_SCAN_BACKEND", None)
        if kept is not None:
            os.environ["ZIGMA_SCAN_BACKEND"] = kept
        dispatch.forget_choices()
    assert report(pack, model).startswith("No problem found.\n")
