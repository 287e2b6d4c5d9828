"""Tiny random models of the kinds that the host tests ask for."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from zigma.assets import available_models
from zigma.autoencoder import TinyAutoencoder, autoencoder_from_state_dict
from zigma.autoencoder_kl import AutoencoderKL
from zigma.checkpoint import LatentFormat, read_checkpoint, save_checkpoint
from zigma.conditions import ConditionFacts
from zigma.config import ZigMaConfig
from zigma.model import ZigMa
from zigma.text import TextEncoderConfig, WordTextEncoder

PUBLISHED = Path(__file__).resolve().parents[1] / "data" / "published_checkpoint.pt"
BADGES = Path(__file__).resolve().parents[2] / "workflows" / "badges"


def random_model(**fields) -> ZigMa:
    """Of random weights throughout: at its initial zeros a model would not look at its condition."""
    torch.manual_seed(0)
    model = ZigMa(ZigMaConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return model


def write_models(base: Path) -> None:
    """Fill the models folder of a host's base directory."""
    folder = base / "models" / "diffusion_models"
    (base / "models" / "vae").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    text = WordTextEncoder(TextEncoderConfig(("red", "green", "apple", "fox"), length=6, width=16))
    autoencoder = TinyAutoencoder(4)
    fields = {"embed_dim": 32, "depth": 2, "patch_size": 2, "use_pe": 2, "has_text": True, "d_context": 16}

    def model(**more) -> ZigMa:
        return random_model(**{**fields, **more})

    latent = LatentFormat(4, scale=(0.5, 1.0, 2.0, 1.5), shift=(0.1, 0.0, -0.2, 0.3),
                          rgb_factors=[[0.1, 0.2, 0.3]] * 4, rgb_bias=(0.0, 0.1, 0.2))  # fmt: skip
    full = model(in_channels=4, img_dim=(4, 6))
    save_checkpoint(full, folder / "tiny.safetensors", text_encoder=text, autoencoder=autoencoder, latent=latent)
    save_checkpoint(full, folder / "bare.safetensors", latent=latent)
    kinds = {
        "both_ways": {"scan_type": "v2", "rms_norm": False}, "shared": {"share_ssm": True, "bias": True},
        "attention": {"mixer": "attention"}, "places": {"use_pe": 1}, "hilbert": {"scan_type": "hilbertN8"},
        "legacy": {"legacy_permutation": True},
    }  # fmt: skip
    for name, more in kinds.items():
        kind = model(in_channels=4, img_dim=(4, 6), **more)
        path = folder / f"kind_{name}.safetensors"
        save_checkpoint(kind, path, text_encoder=text, autoencoder=autoencoder, latent=latent)
    classes = model(in_channels=4, img_dim=(4, 6), has_text=False, d_context=0, num_classes=5)
    parts = {"autoencoder": autoencoder, "latent": latent}
    save_checkpoint(classes, folder / "class.safetensors", **parts)
    facts = ConditionFacts(null=4, label_names=("fox", "owl", "tench, Tinca tinca", "red panda", "nothing"))
    save_checkpoint(classes, folder / "class_null.safetensors", **parts, condition=facts)
    untrained = ConditionFacts(null=False)
    save_checkpoint(full, folder / "untrained.safetensors", **parts, text_encoder=text, condition=untrained)
    video = model(in_channels=4, img_dim=(4, 6), scan_type="video_sst", video_frames=3, tpe=True)
    save_checkpoint(video, folder / "video.safetensors", **parts, text_encoder=text)
    nothing = model(in_channels=4, img_dim=(4, 6), has_text=False, d_context=0)
    save_checkpoint(nothing, folder / "unconditional.safetensors", **parts)
    pixels = model(in_channels=3, img_dim=(4, 6), patch_size=1)
    save_checkpoint(pixels, folder / "pixels.safetensors", text_encoder=text, latent=LatentFormat(3, downscale=1))
    save_file(autoencoder.state_dict(), base / "models" / "vae" / "tiny_vae.safetensors")
    for name, quantised in (("narrow", True), ("narrow_plain", False)):
        narrow = AutoencoderKL((32, 64), 1, 6, quantised=quantised)
        save_file(narrow.state_dict(), base / "models" / "vae" / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes(b"<html>not found</html>")
    write_clip(base / "clip.safetensors")
    write_workflow_models(base)


def write_clip(path: Path) -> None:
    """A tiny random CLIP text model, some ids and what transformers makes of them; nothing where that is missing."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError:
        return
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, projection_dim=32,
        vocab_size=49408, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    clip = CLIPTextModel(config).eval().requires_grad_(False)
    ids = torch.tensor([[49406, 320, 736, 3240, *[49407] * 73]])  # "a red fox", padded as the published features were
    state = {key.removeprefix("text_model."): value for key, value in clip.state_dict().items()}
    state = {f"text_model.{key}": value for key, value in state.items()}
    save_file({**state, "ids": ids, "features": clip(ids).last_hidden_state}, path)


def write_workflow_models(base: Path) -> None:
    """Tiny ones under the names of the files that workflows and help pages ask for, and that are not shipped."""
    own, vaes, loras = (base / "models" / name for name in ("zigma", "vae", "loras"))
    for folder in (own, loras / "zigma"):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(BADGES / "apple.png", base / "input" / "example.png")  # a fresh host has another one of that name
    shutil.copy(PUBLISHED, own / "landscape1024_0210000.pt")
    torch.manual_seed(0)
    save_file(AutoencoderKL((32, 32, 32, 32), 1, 4).state_dict(), vaes / "sd-vae-ft-ema.safetensors")
    if available_models():
        write_examples(own)
        for name in ("zigma-lora.safetensors", "zigma/first_00001_.safetensors"):
            write_lora(available_models()["demo"], loras / name)


def write_examples(folder: Path) -> None:
    """Models of classes, of no condition and of videos that know nothing; on the demo's latents: they draw colours."""
    demo = read_checkpoint(available_models()["demo"])
    parts = {"autoencoder": autoencoder_from_state_dict(demo.vae_state), "latent": demo.latent}
    fields = {"in_channels": 8, "embed_dim": 32, "depth": 2, "img_dim": (8, 8), "use_pe": 2}
    facts = ConditionFacts(null=4, label_names=("apple", "fish", "heart", "moon", "nothing"))
    classes = random_model(**fields, num_classes=5)
    save_checkpoint(classes, folder / "zigma-classes.safetensors", **parts, condition=facts)
    text = WordTextEncoder(TextEncoderConfig(("red", "green", "apple", "fox"), length=6, width=16))
    video = random_model(**fields, scan_type="video_sst", video_frames=4, tpe=True, has_text=True, d_context=16)
    save_checkpoint(video, folder / "zigma-video.safetensors", **parts, text_encoder=text)
    save_checkpoint(random_model(**fields), folder / "zigma-unconditional.safetensors", **parts)


def write_lora(model: Path, path: Path, rank: int = 4, size: float = 0.15) -> None:
    """Random, for the projections into each mixer; `size` is its norm beside that of the weight."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for key, weight in load_file(model).items():
        if key.endswith("mixer.in_proj.weight"):
            down = torch.randn(rank, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], rank, generator=generator)
            up *= size * weight.float().norm() / (up @ down).norm()
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, path)
