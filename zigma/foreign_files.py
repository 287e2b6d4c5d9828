"""Files of other kinds: what they seem to be by a few tell-tale keys or their first bytes, and what loads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

__all__ = ["ForeignFile", "ForeignFileError", "recognise", "recognise_bytes"]


class ForeignFile(NamedTuple):
    """What a file seems to be, and what to do with it."""

    what: str
    remedy: str


class ForeignFileError(ValueError):
    """A file of another kind, noticed while it is read."""

    def __init__(self, file: ForeignFile) -> None:
        super().__init__(file.what)
        self.file = file


def _loads(node: str, folder: str) -> str:
    return f"load it with the stock node {node}, from models/{folder}"


_CHECKPOINT = _loads("Load Checkpoint", "checkpoints")
_DIFFUSION = _loads("Load Diffusion Model", "diffusion_models")
_CLIP = _loads("Load CLIP", "text_encoders")
_VAE = _loads("Load VAE", "vae")
# The first that matches counts: whole checkpoints before their parts, LoRAs before what they are for.
_KINDS: tuple[tuple[str, ForeignFile], ...] = tuple(
    (pattern, ForeignFile(what, remedy))
    for pattern, what, remedy in (
        (
            r"\.lora_(up|down|A|B|mid)\b|^lora_(unet|te|te1|te2|transformer)_|\.(hada_w1_a|lokr_w1|lokr_w1_a)$",
            "a LoRA", "load a ZigMa model here, and the LoRA behind it with ZigMa LoRA Loader or Load LoRA, from "
            "models/loras",
        ),
        (r"^conditioner\.embedders\.", "a Stable Diffusion XL checkpoint", _CHECKPOINT),
        (r"^cond_stage_model\.transformer\.text_model\.", "a Stable Diffusion 1 checkpoint", _CHECKPOINT),
        (r"^cond_stage_model\.model\.transformer\.", "a Stable Diffusion 2 checkpoint", _CHECKPOINT),
        (r"^model\.diffusion_model\.joint_blocks\.", "a Stable Diffusion 3 checkpoint", _CHECKPOINT),
        (r"^model\.diffusion_model\.double_blocks\.", "a Flux checkpoint", _CHECKPOINT),
        (r"^model\.diffusion_model\.(input_blocks|output_blocks)\.", "a Stable Diffusion checkpoint", _CHECKPOINT),
        (r"^(control_model|controlnet_cond_embedding|controlnet_blocks)\.|^input_hint_block\.", "a ControlNet",
         _loads("Load ControlNet Model", "controlnet")),
        (r"^double_blocks\.", "a Flux model", _DIFFUSION),
        (r"^joint_blocks\.", "a Stable Diffusion 3 model", _DIFFUSION),
        (r"^(input_blocks|output_blocks)\.|^(down_blocks|up_blocks)\.\d+\.attentions\.",
         "a Stable Diffusion U-Net", _DIFFUSION),
        (r"^(transformer_blocks|single_transformer_blocks|layers)\.\d+\.(attn|attn1|attention)\.",
         "another diffusion transformer", _DIFFUSION),
        (r"^(text_model\.|transformer\.text_model\.|encoder\.block\.\d+\.layer\.|model\.layers\.\d+\.self_attn\.)",
         "a text encoder (CLIP, T5 or a language model)", _CLIP),
        (r"^taesd_(encoder|decoder)\.|^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid|conv_in|down_blocks|up_blocks|"
         r"mid_block)\b|^(quant_conv|post_quant_conv)\.", "a VAE", _VAE),
        (r"^(vision_model|visual)\.", "a CLIP vision model", _loads("Load CLIP Vision", "clip_vision")),
        (r"^model\.\d+\.sub\.\d+\.|^(RRDB|conv_first\b)", "an upscaling model",
         _loads("Load Upscale Model", "upscale_models")),
        (r"^(string_to_param|emb_params|clip_l$|clip_g$)", "a textual inversion embedding",
         "put it into models/embeddings and write embedding:its-name in a prompt"),
    )
)  # fmt: skip
_OURS = re.compile(r"(^|\.)(blocks\.0\.mixer\.|x_embedder\.proj\.weight$)")


def recognise(keys: Iterable[str]) -> ForeignFile | None:
    """What a file with these tensors seems to be; None if it may be a ZigMa, or is of no kind known here."""
    keys = list(keys)
    lora, rest = _KINDS[0], _KINDS[1:]
    if any(re.search(lora[0], key) for key in keys):
        return lora[1]
    if any(_OURS.search(key) for key in keys):
        return None
    for pattern, file in rest:
        if any(re.search(pattern, key) for key in keys):
            return file
    return None


def recognise_bytes(path: str | os.PathLike) -> ForeignFile | None:
    """What a file that is no .safetensors seems to be, by its first bytes, whatever its name."""
    with open(path, "rb") as file:
        head = file.read(512)
    size = Path(path).stat().st_size
    if head[:4] == b"GGUF":
        return ForeignFile(
            "it is a GGUF file, which stores other models in few bits",
            "load it with the nodes of ComfyUI-GGUF",
        )
    if not head:
        return ForeignFile("it is empty", "get the file again")
    if head.startswith(b"version https://git-lfs"):
        return ForeignFile("it is the pointer to a large file and not that file", "run `git lfs pull`, or download it")
    if head.lstrip()[:1] == b"<":
        return ForeignFile("it is a web page and not a model", "get the file again: the link may want a log-in")
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return ForeignFile("it is a file of torch.save under another name", "let its name end in .pt")
    if size < 10_000 and head.lstrip()[:1] == b"{":
        return ForeignFile("it is a text and not a model", "get the file again")
    return None
