"""A model with everything that belongs to it as one file, in our own format."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io
from torch import Tensor

from ..zigma.autoencoder import autoencoder_from_state_dict
from ..zigma.checkpoint import CheckpointFile
from ..zigma.model_file import write_checkpoint
from .comfy_model import as_zigma, current_orders
from .comfy_text import text_config_of
from .layer_orders import schedule_of
from .schema import schema
from .shown_text import shown

__all__ = ["ZigMaSaveModel", "whole_file"]

log = logging.getLogger(__name__)

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ZigMaSaveModel(io.ComfyNode):
    """MODEL, CLIP and VAE to one file; a published .pt becomes a .safetensors this way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaSaveModel",
            display_name="ZigMa Save Model",
            description="Writes a ZigMa model with its LoRAs and merges worked in, and the text encoder and VAE if "
            "they are connected, as one .safetensors that says everything about itself.",
            search_aliases=["save zigma", "convert zigma", "export model", "save checkpoint", "pt to safetensors"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A ZigMa model. LoRAs and merges become part of its weights."),
                io.String.Input(
                    "filename_prefix", default="zigma/ZigMa",
                    tooltip="Where in ComfyUI's output folder, and how the name begins; a number follows. Move the "
                    "file to models/zigma to load it.",
                ),
                io.Combo.Input(
                    "dtype", options=list(DTYPES), default="keep",
                    tooltip="What the file's weights are stored in. keep is what the model has in memory and loses "
                    "nothing; 16 bits halve the file and round the weights.",
                ),
                io.Clip.Input(
                    "clip", optional=True,
                    tooltip="The text encoder of a ZigMa Model Loader. Without one the file has none.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the model. Without one the file has none."),
                io.Boolean.Input(
                    "bake_scan_orders", default=False, optional=True,
                    tooltip="Makes the orders of ZigMa Scan Order nodes the model's own. The file then draws only at "
                    "the size it was trained on. Off: the file has the orders that the model was loaded with.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, filename_prefix: str, dtype: str, clip=None, vae=None, bake_scan_orders: bool = False
    ) -> io.NodeOutput:
        """Gather what the parts are in memory, and write it."""
        file = whole_file(model, clip, vae, bake_scan_orders)
        if not bake_scan_orders and any(schedule_of(model, file.config.depth)):
            log.warning("the orders of ZigMa Scan Order nodes are not in the file: switch bake_scan_orders on for that")
        folder, name, number, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )  # fmt: skip
        path = Path(folder) / f"{name}_{number:05}_.safetensors"
        write_checkpoint(file, path, DTYPES[dtype], _graph(cls.hidden))
        return shown(str(path), cls)


def whole_file(model, clip, vae, bake_scan_orders: bool = False) -> CheckpointFile:
    """What a host's MODEL, CLIP and VAE are in memory, with LoRAs and merges worked in; the latter two may be None.

    Raises:
        ValueError: one of them is of another kind, or does not belong to the model.
    """
    as_zigma(model)
    _check_patches(model)
    file = model.model.zigma_file
    if bake_scan_orders and any(schedule_of(model, file.config.depth)):
        file = dataclasses.replace(file, token_orders=current_orders(model))
    return dataclasses.replace(
        file, state_dict=_weights(model, "diffusion_model"),
        text_config=None if clip is None else text_config_of(clip, file.config.d_context),
        text_state=None if clip is None else _text_weights(clip),
        vae_state=None if vae is None or file.latent.pixel_space else _vae_weights(vae, file.latent.channels),
    )  # fmt: skip


def _check_patches(model) -> None:
    if model.weight_wrapper_patches or model.injections:
        raise ValueError(
            "save the LoRA by itself and load it with ZigMa LoRA Loader in front of this node: got a MODEL whose "
            "weights another node makes at use (Train LoRA, say), expected one whose LoRAs are patches of its weights"
        )


def _weights(model, part: str = "") -> dict[str, Tensor]:
    """The weights of a host's MODEL or CLIP with its patches in them; newer hosts apply those when a tensor is read."""
    management, network = comfy.model_management, getattr(model.model, part) if part else model.model
    if hasattr(model, "model_state_dict_for_saving"):
        management.load_models_gpu([model])
        return model.model_state_dict_for_saving(network, f"{part}." if part else "")
    management.load_models_gpu([model], force_patch_weights=True)
    return network.state_dict()


def _text_weights(clip) -> dict[str, Tensor]:
    return {key.removeprefix("encoder."): value for key, value in _weights(clip.patcher).items()}


def _vae_weights(vae, channels: int) -> dict[str, Tensor]:
    state = vae.get_sd()
    try:
        found = autoencoder_from_state_dict(state).latent_channels
    except ValueError as error:
        raise ValueError(f"leave vae unconnected and load it with Load VAE beside this model: {error}") from error
    if found != channels:
        raise ValueError(
            f"connect the VAE of this model: got one with latents of {found} channels, expected {channels}"
        )
    return state


def _graph(hidden) -> dict[str, str]:
    """The graph that wrote the file, as the host's savers keep it, unless the host was told not to."""
    if args.disable_metadata or hidden is None:
        return {}
    kept = {} if hidden.prompt is None else {"prompt": json.dumps(hidden.prompt)}
    return {**kept, **{key: json.dumps(value) for key, value in (hidden.extra_pnginfo or {}).items()}}
