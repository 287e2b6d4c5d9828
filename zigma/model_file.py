"""The parts of a model file: their keys, their description, and the one function that writes them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .atomic_file import write_safetensors
from .mixer import FLOAT32_PARAMETERS

if TYPE_CHECKING:
    from .checkpoint import CheckpointFile

__all__ = ["ORDERS_PREFIX", "TEXT_PREFIX", "VAE_PREFIX", "description_of", "write_checkpoint"]

TEXT_PREFIX, VAE_PREFIX, ORDERS_PREFIX = "text_encoder.", "vae.", "token_orders."


def order_tensors(token_orders: Sequence[Tensor]) -> tuple[dict[str, Tensor], str]:
    """Token orders as a model file has them: the distinct ones, and which of them each layer uses, as JSON."""
    distinct = list({tuple(order.tolist()): None for order in token_orders})
    layers = [distinct.index(tuple(order.tolist())) for order in token_orders]
    tensors = {f"{ORDERS_PREFIX}{k}": torch.tensor(order, dtype=torch.int32) for k, order in enumerate(distinct)}
    return tensors, json.dumps(layers)


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
    more: Mapping[str, str] | None = None, kept: Collection[str] = FLOAT32_PARAMETERS,
) -> None:  # fmt: skip
    """Write what was read, or put together, as a model file that describes itself.

    Args:
        file: tensors may be of any device; file.path is not used.
        path: ends in .safetensors; a file of that name is replaced only when the new one is complete.
        dtype: of the floating-point tensors in the file; None keeps all.
        more: metadata beside what describes the model.
        kept: last parts of the keys of parameters that keep what they are: A and D.

    Raises:
        ValueError: a dtype that the format does not know. OSError: the disk is full, the folder is not writable.
    """
    orders, metadata = description_of(file)
    tensors = dict(file.state_dict)
    tensors |= {TEXT_PREFIX + key: value for key, value in (file.text_state or {}).items()}
    tensors |= {VAE_PREFIX + key: value for key, value in (file.vae_state or {}).items()}
    changed = {
        key: dtype
        for key, value in tensors.items()
        if dtype and value.is_floating_point() and key.rpartition(".")[2] not in kept
    }
    write_safetensors({**tensors, **orders}, path, {**metadata, **(more or {})}, changed)
