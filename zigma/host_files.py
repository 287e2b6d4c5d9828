"""Files that a host's own savers write: what they keep of a model, in both directions.

Such a saver writes a state dict and metadata of its own, and nothing else that a model might want to say. So the
description travels as tensors: the metadata of a model file as JSON in a tensor of bytes, the token orders beside it.

    model.diffusion_model.*        ZigMa's weights
    zigma.description              bytes: {"zigma.config": ..., ...}, the metadata of a model file
    token_orders.*                 as in a model file
    first_stage_model.*            the autoencoder, if it was saved too
    cond_stage_model.encoder.*     the word-level text encoder, if it was saved too, and beside it
    cond_stage_model.zigma.text_encoder        bytes: its configuration
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .model_file import TEXT_PREFIX, VAE_PREFIX, description_of

if TYPE_CHECKING:
    from .checkpoint import CheckpointFile

__all__ = [
    "DESCRIPTION",
    "TEXT_DESCRIPTION",
    "from_host_layout",
    "host_description",
    "text_to_tensor",
]

log = logging.getLogger(__name__)

DESCRIPTION, TEXT_DESCRIPTION = "zigma.description", "zigma.text_encoder"
_MODEL, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_PIXEL_SPACE = "pixel_space_vae"  # a host's mark for no autoencoder at all


def text_to_tensor(text: str) -> Tensor:
    """Text as the bytes of its UTF-8, uint8 (n,)."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _tensor_to_text(tensor: Tensor) -> str:
    """Raises ValueError: it is not UTF-8 in bytes."""
    if tensor.dtype != torch.uint8:
        raise ValueError(f"a description of {tensor.dtype} instead of bytes")
    return bytes(tensor.tolist()).decode()


def host_description(file: CheckpointFile) -> dict[str, Tensor]:
    """What a host has to save beside the weights, so that its file describes itself."""
    orders, metadata = description_of(file)
    # The text encoder says what it is by itself: whether one is saved is not known here.
    ours = {key: value for key, value in metadata.items() if key.startswith("zigma.") and key != TEXT_DESCRIPTION}
    return {DESCRIPTION: text_to_tensor(json.dumps(ours)), **orders}


def from_host_layout(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as they would stand in a model file, of what a host's savers wrote.

    Args:
        tensors: with DESCRIPTION among them.
        metadata: of the file; a host's own, such as its workflow.

    Raises:
        ValueError: the description is not one.
    """
    stated = json.loads(_tensor_to_text(tensors[DESCRIPTION]))
    if not isinstance(stated, dict) or not all(isinstance(value, str) for value in stated.values()):
        raise ValueError("its description is no set of strings")
    kept, dropped = {}, []
    has_text = _TEXT + TEXT_DESCRIPTION in tensors
    for key, tensor in tensors.items():
        if key == DESCRIPTION:
            continue
        if key == _TEXT + TEXT_DESCRIPTION:
            stated[TEXT_DESCRIPTION] = _tensor_to_text(tensor)
        elif key.startswith(_MODEL):
            kept[key.removeprefix(_MODEL)] = tensor
        elif key.startswith(_VAE):
            if key != _VAE + _PIXEL_SPACE:
                kept[VAE_PREFIX + key.removeprefix(_VAE)] = tensor
        elif has_text and key.startswith(_TEXT + "encoder."):
            kept[TEXT_PREFIX + key.removeprefix(_TEXT + "encoder.")] = tensor
        elif key.startswith(_TEXT):
            dropped.append(key)
        else:
            kept[key] = tensor
    if dropped:
        log.warning(
            "the file has a text encoder that is not ZigMa's (%d tensors, such as %s): it is left out; load it by the "
            "host's own node for text encoders", len(dropped), dropped[0],
        )  # fmt: skip
    return kept, {**metadata, **stated}
