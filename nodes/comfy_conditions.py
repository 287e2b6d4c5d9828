"""What a sampling run is given, checked before its first step: latents and conditions, in the host's layouts.

Labels travel in CONDITIONING as {"zigma_y": LongTensor (n,)}, n being 1 or the batch, beside a tensor of ones where a
text's features would be: stock nodes calculate with that one. All zeros there, as ConditioningZeroOut leaves them, are
the null condition.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from ..zigma.conditions import ConditionFacts
from ..zigma.config import ZigMaConfig

__all__ = [
    "LABELS",
    "NO_NULL",
    "check_channels",
    "check_latent",
    "check_text",
    "label_conditioning",
    "model_conditions",
]

log = logging.getLogger(__name__)

LABELS = "zigma_y"
NO_NULL = "zigma_no_null"  # what forward gets in place of a null condition that there is not: the sentence to say so


def label_conditioning(labels: Sequence[int]) -> list[list]:
    """CONDITIONING of these labels, one for each picture of a batch or one for all; none stand for a missing null."""
    slot = torch.ones(1, 1, 1) if labels else torch.zeros(1, 1, 1)
    return [[slot, {LABELS: torch.tensor(list(labels), dtype=torch.long)}]]


def model_conditions(config: ZigMaConfig, facts: ConditionFacts, given: dict[str, Any]) -> dict[str, Any]:
    """What forward takes of one condition of a run, as the host's conds.

    Args:
        config, facts: of the model.
        given: what the host knows of the condition: cross_attn, noise, prompt_type, and what nodes wrote beside it.

    Raises:
        ValueError: it is no condition for this model.
    """
    features, labels = given.get("cross_attn"), given.get(LABELS)
    if config.conditioning == "text":
        if labels is not None:
            raise ValueError(
                "connect CLIP Text Encode or ZigMa Text Conditioning: this model draws from texts, and got a label"
            )
        check_text(config, features)
        return {"c_crossattn": comfy.conds.CONDCrossAttn(features)}
    if config.conditioning == "class":
        return _label_conditions(config, facts, features, labels, given["noise"])
    if given.get("prompt_type") == "negative":
        return {NO_NULL: comfy.conds.CONDConstant("")}
    return {}


def _label_conditions(
    config: ZigMaConfig, facts: ConditionFacts, features: Tensor | None, labels: Tensor | None, noise: Tensor
) -> dict[str, Any]:
    """As `model_conditions`, of a class model."""
    count = config.num_classes
    if (features is not None and not features.any()) or (labels is not None and not len(labels)):
        if facts.has_null:
            return {LABELS: comfy.conds.CONDRegular(torch.tensor([facts.null]))}
        return {NO_NULL: comfy.conds.CONDConstant(
            "set cfg to 1: guidance needs a null condition, and the file of this class model states none"
        )}  # fmt: skip
    if labels is None:
        raise ValueError(
            f"connect ZigMa Label Conditioning: this model draws from labels (0 to {count - 1}), and got a text"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise ValueError(
            f"choose the labels in a ZigMa Label Conditioning with this model connected: got {labels.tolist()}, "
            f"expected 0 to {count - 1}"
        )
    if len(labels) not in (1, len(noise)):
        raise ValueError(
            f"give one label, or one for each picture of the batch: got {len(labels)} labels and {len(noise)} pictures"
        )
    if features is not None and features.shape[1] > 1:
        log.warning("labels cannot be concatenated: the first one is used, the others are left out")
    return {LABELS: comfy.conds.CONDRegular(labels)}


def check_text(config: ZigMaConfig, features: Tensor | None) -> None:
    """That text features (b, m, d) fit a text model.

    Raises:
        ValueError: they have another width, or are none.
    """
    if features is not None and features.dim() == 3 and features.shape[2] == config.d_context:
        return
    clip = "CLIPLoader with CLIP ViT-L/14, type stable_diffusion" if config.d_context == 768 else "the one it came with"
    got = "none" if features is None else f"text features of width {features.shape[-1]}"
    raise ValueError(
        f"encode the prompt with the text encoder that belongs to this model ({clip}): got {got}, expected width "
        f"{config.d_context}"
    )


def check_channels(latent: Tensor, channels: int) -> None:
    """That a latent (b, c, ...) is of this model's kind.

    Raises:
        ValueError: it has other channels.
    """
    if latent.shape[1] != channels:
        kind = ", those of SD3 or Flux," if latent.shape[1] == 16 else ""
        raise ValueError(
            "use ZigMa Empty Latent, or encode the picture with the VAE of this model (that of the ZigMa Model Loader, "
            f"or ZigMa VAE Loader): got a latent of {latent.shape[1]} channels{kind} but this model works on {channels}"
        )


def check_latent(config: ZigMaConfig, downscale: int, latent: Tensor) -> None:
    """That a latent, (b, c, h, w) or of a video (b, c, f, h, w), is what this model draws.

    Raises:
        ValueError: it has other axes, channels, or sides that the patches do not divide.
    """
    shape = tuple(latent.shape)
    if config.video_frames:
        # The host makes a latent of pictures into videos of one frame.
        if len(shape) != 5 or (shape[2] == 1 and config.video_frames > 1):
            raise ValueError(
                "use ZigMa Empty Latent, or ZigMa VAE Encode with frames_as_video: this model draws videos (of "
                f"{config.video_frames} frames), and got a latent of single pictures, shape {shape}"
            )
    elif len(shape) != 4:
        raise ValueError(
            "use ZigMa Empty Latent, or encode single pictures: this model draws pictures, and got a latent of shape "
            f"{shape}, expected (batch, channels, height, width)"
        )
    check_channels(latent, config.in_channels)
    unit = config.patch_size * downscale
    for name, side in (("height", shape[-2]), ("width", shape[-1])):
        if side % config.patch_size:
            below = side * downscale // unit * unit
            tries = " or ".join(str(pixels) for pixels in (below, below + unit) if pixels)
            raise ValueError(
                f"set the {name} to {tries}: got {side * downscale} pixels, expected a multiple of {unit} (one token "
                "of this model)"
            )
