"""VAEs from files, and pictures to latents."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..zigma.assets import available_models
from .comfy_vae import load_vae, pixel_space_vae
from .load import model_files
from .schema import schema

__all__ = ["ZigMaVAEEncode", "ZigMaVAELoader", "missing_vae"]

log = logging.getLogger(__name__)

PIXEL_SPACE = "pixel_space"  # the stock loader's name for it
SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")


def vae_files() -> dict[str, Path]:
    """Name in the list -> file: the shipped models', then models/vae, then model files that may carry one."""
    files = dict(available_models())
    for name in folder_paths.get_filename_list("vae"):
        path = folder_paths.get_full_path("vae", name)  # None of a link into nowhere
        if path is not None and name.lower().endswith(SUFFIXES):
            files.setdefault(name, Path(path))
    for name, path in model_files().items():
        files.setdefault(name, path)
    return files


def missing_vae() -> ValueError:
    """What a node says that got None for a VAE."""
    return ValueError(
        "connect a VAE: the model file carries none, so load one with ZigMa VAE Loader or Load VAE (for released ZigMa "
        "models that of Stable Diffusion 1.x, such as vae-ft-ema-560000)"
    )


class ZigMaVAELoader(io.ComfyNode):
    """The VAE of a file, whatever the file is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaVAELoader",
            display_name="ZigMa VAE Loader",
            description="Loads a VAE: a file in TAESD layout, an AutoencoderKL (Stable Diffusion's, in its original "
            "layout or that of diffusers, also narrower ones), or the VAE inside a model file.",
            inputs=[
                io.Combo.Input(
                    "vae_name", options=[*vae_files(), PIXEL_SPACE],
                    tooltip="Files in models/vae and in the folders of models; 'demo' is the VAE of the model that "
                    "comes with the pack; 'pixel_space' is for models that draw pixels without a VAE. Use the one "
                    "that the model was trained on.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="For VAE Decode and VAE Encode, ours and the stock ones.")],
            search_aliases=["load vae", "autoencoder", "taesd", "autoencoderkl", "decoder"],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, vae_name: str) -> float:
        """Load again when the file has changed."""
        path = vae_files().get(vae_name)
        return path.stat().st_mtime if path is not None else 0.0

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        """Read it with the pack's own reader, which executes nothing, and build the host's VAE."""
        if vae_name == PIXEL_SPACE:
            return io.NodeOutput(pixel_space_vae())
        files = vae_files()
        if vae_name not in files:
            raise ValueError(f"put the file into models/vae, or choose 'demo': there is no VAE file {vae_name!r}")
        return io.NodeOutput(load_vae(files[vae_name]))


class ZigMaVAEEncode(io.ComfyNode):
    """The host's VAE encoding, of videos too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaVAEEncode",
            display_name="ZigMa VAE Encode",
            description="Encodes pictures to a latent, or the frames of a video to one latent of a video. For pictures "
            "it equals the stock VAE Encode.",
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip="The pictures. Sides that the VAE does not divide (by 8, mostly) are cropped at both "
                    "edges, as by the stock node; the log says so.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the ZigMa Model Loader, or the one that the model was "
                "trained on."),
                io.Boolean.Input(
                    "frames_as_video", default=False, optional=True,
                    tooltip="On: the pictures are the frames of one video, for models that draw videos. Off: they are "
                    "a batch of pictures.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="For ZigMa Sampler or KSampler, with denoise below 1.")],
            search_aliases=["vae encode", "image to image", "image to latent", "video to latent", "encode frames"],
        )  # fmt: skip

    @classmethod
    def execute(cls, pixels: torch.Tensor, vae, frames_as_video: bool = False) -> io.NodeOutput:
        """Encode (b, h, w, 3) in [0, 1] to (b, c, h, w), or of a video to (1, c, frames, h, w)."""
        if vae is None:
            raise missing_vae()
        unit = vae.spacial_compression_encode()
        height, width = pixels.shape[1:3]
        if min(height, width) < unit:
            raise ValueError(f"use a larger picture: got {width} x {height} pixels, expected at least {unit} x {unit}")
        if height % unit or width % unit:
            log.warning(
                "cropped the pictures from %d x %d to %d x %d pixels: this VAE takes multiples of %d",
                width, height, width // unit * unit, height // unit * unit, unit,
            )  # fmt: skip
        latent = vae.encode(pixels[..., :3])
        if frames_as_video and latent.ndim == 4:
            latent = latent.movedim(0, 1)[None]
        return io.NodeOutput({"samples": latent})
