"""A model file as the three things of a graph."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..zigma.assets import available_models
from ..zigma.checkpoint import TORCH_SUFFIXES, read_checkpoint
from .comfy_model import WEIGHT_DTYPES, build_model
from .comfy_text import build_clip
from .comfy_vae import build_vae
from .schema import schema

log = logging.getLogger(__name__)

OWN_FOLDER = "zigma"
# A name that several have is that of the first, as in graphs saved when there were fewer.
FOLDERS = ("diffusion_models", "checkpoints", OWN_FOLDER)
SUFFIXES = (".safetensors", *(suffix for suffix in TORCH_SUFFIXES if suffix != ".bin"))
WEIGHTS = {"ema": "ema", "raw": "model"}


def register_folder() -> None:
    """Tell the host of models/zigma; extra_model_paths.yaml may have told it of further ones."""
    folder_paths.add_model_folder_path(OWN_FOLDER, os.path.join(folder_paths.models_dir, OWN_FOLDER))


def model_files() -> dict[str, Path]:
    """Name in the list -> file: the shipped models, models/zigma, the host's folders.

    Of files that share a name the first in FOLDERS keeps it, others are "name [folder]". A file that is in several
    folders of the host is listed once.
    """
    found: dict[str, tuple[str, Path]] = {}
    known = set()
    for folder in FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            if not name.lower().endswith(SUFFIXES):
                continue
            there = folder_paths.get_full_path(folder, name)
            if there is None:  # a link into nowhere, such as a drive that is not mounted
                continue
            path = Path(there)
            if path.resolve() not in known:
                known.add(path.resolve())
                found[f"{name} [{folder}]" if name in found else name] = (folder, path)
    ours_first = sorted(found.items(), key=lambda item: item[1][0] != OWN_FOLDER)
    return {**available_models(), **{name: path for name, (_, path) in ours_first}}


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
            search_aliases=["zigma", "mamba", "load zigma", "checkpoint loader", "demo model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list(model_files()),
                    tooltip="'demo' comes with the pack; other entries are files in models/zigma, "
                    "models/diffusion_models and models/checkpoints: .safetensors that ZigMa wrote, or a published "
                    ".pt, .pth or .ckpt. Everything else about the model comes from the file.",
                ),
                io.Combo.Input(
                    "weight_dtype", options=list(WEIGHT_DTYPES), default="auto", optional=True,
                    tooltip="What the weights are stored in. auto is what ComfyUI chooses for this machine; fewer bits "
                    "take less memory and round the weights. What is computed in follows from the device.",
                ),
                io.Combo.Input(
                    "weights", options=list(WEIGHTS), default="ema", optional=True,
                    tooltip="Of a published .pt, which holds both: ema, the running mean of the training, draws "
                    "better; raw is the last state of the training. Other files hold one set.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The denoiser. Works with KSampler and every other stock node for models."),
                io.Clip.Output(tooltip="The file's text encoder, for CLIP Text Encode; nothing if the file has none."),
                io.Vae.Output(tooltip="The file's VAE, for VAE Decode and Encode; nothing if the file has none."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, model_name: str | None) -> bool | str:
        """Say before the run that a file is gone. A name from another node is None until that has run."""
        if model_name is None:
            return True
        return True if isinstance(model_name, str) and model_name in model_files() else _gone(model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str, weight_dtype: str = "auto", weights: str = "ema") -> tuple:
        """Load again when the file has changed."""
        path = model_files().get(model_name)
        return (path.stat().st_mtime if path is not None else 0.0, weight_dtype, weights)

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str = "auto", weights: str = "ema") -> io.NodeOutput:
        """Read the file once, build the three."""
        files = model_files()
        if model_name not in files:
            raise ValueError(_gone(model_name))
        file = read_checkpoint(files[model_name], WEIGHTS[weights])
        if weights == "raw" and file.metadata.get("zigma.weights") != "model":
            log.warning("%s holds one set of weights: weights=raw changes nothing", model_name)
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
        return io.NodeOutput(build_model(file, weight_dtype), clip, vae)


def _gone(name: str) -> str:
    return (
        f"got the model {name!r}, but no such file is in models/zigma, models/diffusion_models or models/checkpoints: "
        "put it there, press R to refresh the list, or choose 'demo'"
    )
