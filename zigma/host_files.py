"""Files that a host writes: what its own savers keep of a model, in both directions; and what our saver writes there.

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

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .atomic_file import write_safetensors
from .mixer import FLOAT32_PARAMETERS

if TYPE_CHECKING:
    from .checkpoint import CheckpointFile

__all__ = [
    "DESCRIPTION",
    "TEXT_DESCRIPTION",
    "description_of",
    "from_host_layout",
    "host_description",
    "order_tensors",
    "text_to_tensor",
    "write_checkpoint",
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


def order_tensors(token_orders: Sequence[Tensor]) -> tuple[dict[str, Tensor], str]:
    """Token orders as a model file has them: the distinct ones, and which of them each layer uses, as JSON."""
    distinct = list({tuple(order.tolist()): None for order in token_orders})
    layers = [distinct.index(tuple(order.tolist())) for order in token_orders]
    return {f"token_orders.{k}": torch.tensor(o, dtype=torch.int32) for k, o in enumerate(distinct)}, json.dumps(layers)


def description_of(file: CheckpointFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The token orders and the metadata that describe a model in its file, whatever file it was read from."""
    # What a host wrote of the graph that saved the file is not true of another.
    metadata = {key: value for key, value in file.metadata.items() if key not in ("prompt", "workflow")}
    for key in ("zigma.text_encoder", "zigma.token_orders"):
        metadata.pop(key, None)
    metadata["zigma.config"] = file.config.to_json()
    metadata["zigma.latent"] = json.dumps(dataclasses.asdict(file.latent))
    if file.text_config is not None:
        metadata["zigma.text_encoder"] = file.text_config.to_json()
    orders: dict[str, Tensor] = {}
    if file.token_orders is not None:
        orders, metadata["zigma.token_orders"] = order_tensors(file.token_orders)
    return orders, metadata


def write_checkpoint(
    file: CheckpointFile, path: str | os.PathLike, dtype: torch.dtype | None = None,
    more: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write what was read, or put together, as a model file that describes itself.

    Args:
        file: tensors may be of any device; file.path is not used.
        path: ends in .safetensors; a file of that name is replaced only when the new one is complete.
        dtype: of the floating-point tensors in the file, but A and D keep what they are; None keeps all.
        more: metadata beside what describes the model.

    Raises:
        ValueError: a dtype that the format does not know. OSError: the disk is full, the folder is not writable.
    """
    orders, metadata = description_of(file)
    tensors = dict(file.state_dict)
    tensors |= {f"text_encoder.{key}": value for key, value in (file.text_state or {}).items()}
    tensors |= {f"vae.{key}": value for key, value in (file.vae_state or {}).items()}
    changed = {
        key: dtype
        for key, value in tensors.items()
        if dtype and value.is_floating_point() and key.rpartition(".")[2] not in FLOAT32_PARAMETERS
    }
    write_safetensors({**tensors, **orders}, path, {**metadata, **(more or {})}, changed)


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
                kept["vae." + key.removeprefix(_VAE)] = tensor
        elif has_text and key.startswith(_TEXT + "encoder."):
            kept["text_encoder." + key.removeprefix(_TEXT + "encoder.")] = tensor
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
