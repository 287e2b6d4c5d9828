"""Published checkpoints: weights without a description of ours, and what their tensors and arguments tell.

A published .pt holds `model`, `ema` (state dicts), `opt`, `args` (an OmegaConf configuration), `train_steps` and
`best_fid`; ZigMa, arXiv 2403.13802, and its released code. A bare state dict has only the tensors. Nothing in such a
file is executed, and omegaconf is not needed (see pickle_reader.py).
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ZigMaConfig, published_arguments
from .embedders import sine_positions
from .foreign_files import ForeignFileError, recognise
from .pickle_reader import Record, TensorReference, TorchFile

__all__ = [
    "SD_LATENT_SCALE",
    "UntoldError",
    "derive_config",
    "plain_configuration",
    "read_torch_checkpoint",
    "strip_prefixes",
]

log = logging.getLogger(__name__)

SD_LATENT_SCALE = 0.18215  # of the Stable Diffusion VAE, on whose latents all released ZigMa models work
# What wrappers put before every key: DistributedDataParallel, torch.compile, a host's saved model.
_PREFIXES = re.compile(r"^(?:model\.diffusion_model\.|diffusion_model\.|module\.|_orig_mod\.)+")
_MOST_NODES = 100_000  # of an args tree; a real one has a few hundred


class UntoldError(ValueError):
    """A file that leaves open what its model is: `examples` has the arguments that it wants, each with one value."""

    def __init__(self, examples: dict[str, Any]) -> None:
        self.examples = examples
        super().__init__(
            f"its tensors do not tell {' and '.join(examples)}: give {'it' if len(examples) == 1 else 'them'}, such as "
            + ", ".join(f"{name}={value!r}" for name, value in examples.items())
        )

    def remedy(self, path: Path) -> str:
        """The command that writes a file which says them."""
        options = " ".join(f"--{name.replace('_', '-')} {example}" for name, example in self.examples.items())
        return (
            "write a file that says so, once, with "
            f"`python -m zigma convert {path.name} {path.stem}-complete.safetensors {options}`"
        )


def read_torch_checkpoint(path: str | os.PathLike, weights: str) -> tuple[dict[str, Tensor], dict[str, Any], dict]:
    """The chosen weights of a .pt file, the constructor arguments it states, and facts such as its train_steps.

    Args:
        path: a file of torch.save.
        weights: "ema" or "model"; a bare state dict is both.

    Raises:
        ValueError: it is no such file, or has no such weights.
    """
    with TorchFile(path) as file:
        contents = file.contents
        if not isinstance(contents, dict):
            raise ValueError(f"it holds a {type(contents).__name__} instead of a dictionary")
        arguments: dict[str, Any] = {}
        numbers = {k: contents.get(k) for k in ("train_steps", "best_fid")}
        facts: dict[str, Any] = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
        state = contents
        if not any(isinstance(value, TensorReference) for value in contents.values()):
            facts["weights"] = name = _chosen(contents, weights)
            state = contents[name]
            if contents.get("args") is not None:
                arguments = published_arguments(plain_configuration(contents["args"]), "its args")
        strange = [str(key) for key, value in state.items() if not isinstance(value, TensorReference)]
        if strange:
            raise ValueError(f"its state dict has entries that are no tensors ({', '.join(strange[:3])})")
        if found := recognise(map(str, state)):
            raise ForeignFileError(found)
        return {str(key): file.tensor(value) for key, value in state.items()}, arguments, facts


def _chosen(contents: dict, weights: str) -> str:
    held = [name for name in ("ema", "model", "state_dict") if isinstance(contents.get(name), dict)]
    if not held:
        raise ValueError(f"it has the entries {', '.join(map(str, contents))[:100]} and neither 'ema' nor 'model'")
    if weights in held:
        return weights
    log.warning("the file has no %r weights: its %r weights are used", weights, held[0])
    return held[0]


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without what DistributedDataParallel, torch.compile or a host put before them.

    Raises:
        ValueError: two keys become one.
    """
    stripped: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _PREFIXES.sub("", key)
        if name in stripped:
            raise ValueError(f"its key {name} is there twice, with and without a prefix")
        stripped[name] = value
    return stripped


def plain_configuration(node: Any) -> Any:
    """An OmegaConf tree, as the pickle describes it, as plain dicts, lists and values.

    Raises:
        ValueError: it has more nodes than any configuration, or contains itself.
    """
    count = 0

    def plain(node: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > _MOST_NODES or depth > 50:
            raise ValueError("its args are no configuration: they are nested without end")
        if isinstance(node, Record) and isinstance(node.state, dict):
            content = node.state.get("_content", node.state.get("_val"))
            return plain(content, depth + 1)
        if isinstance(node, dict):
            return {str(key): plain(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [plain(value, depth + 1) for value in node]
        return node

    return plain(node, 0)


def derive_config(state: Mapping[str, Tensor], stated: Mapping[str, Any], given: Mapping[str, Any]) -> ZigMaConfig:
    """The architecture that tensors under the published keys belong to.

    Args:
        state: the tensors.
        stated: arguments that the file states; the shapes stand above them, for the released text model's do not
            mention the text.
        given: arguments that the caller gives; they stand above everything.

    Raises:
        ValueError: what the tensors do not tell is neither stated nor given, and it is named; or they are no ZigMa.
    """
    first, depth = state.get("x_embedder.proj.weight"), _depth(state)
    if first is None or first.dim() != 4 or not depth:
        raise ValueError("its tensors have no x_embedder.proj.weight and blocks.0: it is no ZigMa")
    known = {**stated, **_told_by_shapes(state, first, depth), **given}
    if known.get("scan_type") is None and "blocks.0.mixer.A_b_log" in state:
        known["scan_type"] = "v2"
    if known.get("scan_type") is None and known.get("mixer") == "attention":
        known["scan_type"] = "zigzagN8"  # attention does not know the order
    _derive_grid(state, known, video_stated="video_frames" in known or bool(stated))
    missing = [name for name in ("scan_type", "video_frames", "img_dim") if known.get(name) is None]
    if missing:
        raise UntoldError({name: _EXAMPLES[name] for name in missing})
    return ZigMaConfig.from_published(**known)


_EXAMPLES = {"scan_type": "zigzagN8", "video_frames": 0, "img_dim": 32}


def _depth(state: Mapping[str, Tensor]) -> int:
    layers = {int(match.group(1)) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    return len(layers)


def _told_by_shapes(state: Mapping[str, Tensor], first: Tensor, depth: int) -> dict[str, Any]:
    d = first.shape[0]
    told: dict[str, Any] = {
        "embed_dim": d, "in_channels": first.shape[1], "patch_size": first.shape[2], "depth": depth,
        "rms_norm": "norm_f.bias" not in state, "has_text": "y_embedder.weight" in state,
        "tpe": "temporal_pos_embedding" in state, "share_ssm": "ssm.A_log" in state,
        "mixer": "attention" if "blocks.0.mixer.qkv.weight" in state else "mamba",
    }  # fmt: skip
    if told["has_text"]:
        told["d_context"] = state["y_embedder.weight"].shape[1]
    if "y_embedder.embedding_table.weight" in state:
        told["num_classes"] = state["y_embedder.embedding_table.weight"].shape[0]
    if told["tpe"]:
        told["video_frames"] = state["temporal_pos_embedding"].shape[1]
    mixer = "ssm." if told["share_ssm"] else "blocks.0.mixer."
    parts = {name: state.get(f"{mixer}{name}") for name in ("A_log", "conv1d.weight", "dt_proj.weight")}
    if all(tensor is not None for tensor in parts.values()):
        told["expand"], told["d_state"] = parts["A_log"].shape[0] // d, parts["A_log"].shape[1]
        told["d_conv"], told["dt_rank"] = parts["conv1d.weight"].shape[2], parts["dt_proj.weight"].shape[1]
        told["conv_bias"] = f"{mixer}conv1d.bias" in state
        told["bias"] = "blocks.0.mixer.in_proj.bias" in state
    told["use_pe"] = 2 if "pos_embed" in state else 0
    return told


def _derive_grid(state: Mapping[str, Tensor], known: dict[str, Any], video_stated: bool) -> None:
    """img_dim and video_frames from the length of a position embedding, as far as it determines them."""
    scan_type = known.get("scan_type") or ""
    if "video_" not in scan_type and scan_type != "v2":
        known.setdefault("video_frames", 0)  # the other orders are those of pictures
    elif scan_type == "v2" and video_stated:
        known.setdefault("video_frames", 0)  # stated arguments leave it out for pictures
    if "pos_embed" not in state:
        return
    length, p = state["pos_embed"].shape[1], known["patch_size"]
    if known.get("img_dim") is not None and known.get("video_frames") is None:
        sides = known["img_dim"] if not isinstance(known["img_dim"], int) else (known["img_dim"],) * 2
        tokens = math.prod(side // p for side in sides)
        if tokens and length % tokens == 0:
            known["video_frames"] = 0 if scan_type == "v2" and length == tokens else length // tokens
    if known.get("img_dim") is None and known.get("video_frames") is not None:
        tokens = length // max(known["video_frames"], 1)
        side = math.isqrt(tokens)
        if side * side == tokens:
            known["img_dim"] = side * p
    # A fixed table is told from a learned one by its numbers.
    if known.get("img_dim") is not None and not known.get("video_frames") and known["embed_dim"] % 4 == 0:
        sides = known["img_dim"] if not isinstance(known["img_dim"], int) else (known["img_dim"],) * 2
        height, width = (side // p for side in sides)
        if height * width == length:
            fixed = sine_positions(height, width, known["embed_dim"])
            if torch.allclose(state["pos_embed"].float(), fixed, atol=1e-2):
                known["use_pe"] = 1
