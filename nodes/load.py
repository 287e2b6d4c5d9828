"""Loading a ZigMa model file into a graph."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..zigma.assets import available_models
from ..zigma.checkpoint import read_checkpoint
from .comfy_model import build_model
from .comfy_text import build_clip
from .comfy_vae import build_vae
from .schema import schema

log = logging.getLogger(__name__)

FOLDERS = ("diffusion_models", "checkpoints")


def model_files() -> dict[str, Path]:
    """Name in the list -> file: the shipped models first, then the host's folders."""
    files = dict(available_models())
    for folder in FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            if name.endswith(".safetensors"):
                files.setdefault(name, Path(folder_paths.get_full_path_or_raise(folder, name)))
    return files


class ZigMaModelLoader(io.ComfyNode):
    """MODEL, CLIP and VAE from one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaModelLoader",
            display_name="ZigMa Model Loader",
            description="Loads a ZigMa model file: the denoiser, and the text encoder and VAE if the file carries "
            "them. 'demo' is the emoji model that comes with the pack.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list(model_files()),
                    tooltip="'demo' comes with the pack; other entries are .safetensors files in "
                    "models/diffusion_models and models/checkpoints that ZigMa training or save_checkpoint wrote.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The denoiser. Works with KSampler and every other stock node for models."),
                io.Clip.Output(tooltip="The file's text encoder, for CLIP Text Encode; nothing if the file has none."),
                io.Vae.Output(tooltip="The file's VAE, for VAE Decode and Encode; nothing if the file has none."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str) -> float:
        """Load again when the file has changed."""
        path = model_files().get(model_name)
        return path.stat().st_mtime if path is not None else 0.0

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        """Read the file once, build the three."""
        files = model_files()
        if model_name not in files:
            raise ValueError(
                f"got the model {model_name!r}, but no such file is in models/diffusion_models or models/checkpoints: "
                "put it there, or choose 'demo'"
            )
        file = read_checkpoint(files[model_name])
        clip, vae = build_clip(file), build_vae(file)
        if file.config.has_text and clip is None:
            log.warning(
                "%s has no text encoder: its CLIP output is empty; use one with features of width %d",
                model_name, file.config.d_context,
            )  # fmt: skip
        if vae is None:
            log.warning(
                "%s has no VAE: its VAE output is empty; use VAELoader with the VAE it was trained on", model_name
            )
        return io.NodeOutput(build_model(file), clip, vae)
