"""Patches of parameters that belong to no layer: A_log, D, pos_embed and the like.

A host patches a parameter when it loads the module that holds it, and passes over modules that hold parameters beside
other modules. A LoRA, a merge or any other patch of such a parameter would be dropped in silence, of any model. Here
they follow when the host's own loading is done, and are put back with what it puts back.
"""

from __future__ import annotations

from typing import NamedTuple

import comfy.float
import comfy.lora
import comfy.utils
import torch
from torch import Tensor, nn

__all__ = ["loose_parameters", "misfits", "patch_loose_parameters"]


class Backup(NamedTuple):
    """What a host keeps of a weight that it has patched."""

    weight: Tensor
    inplace_update: bool


def loose_parameters(model: nn.Module) -> list[str]:
    """The keys of parameters in modules whose submodules have parameters too, which hosts do not patch."""
    return [
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if any(True for child in module.children() for _ in child.parameters())
        for parameter, _ in module.named_parameters(recurse=False)
    ]


def patch_loose_parameters(patcher, device_to: torch.device | None = None, *_) -> None:
    """A callback for the end of a host's loading (ON_LOAD).

    Always in float32, as older hosts patch everything: newer ones may take 16 bits, which A_log is not meant for.
    A key that has a backup is patched already: a host loads a model a second time when it finds room for more of it.
    """
    for key in loose_parameters(patcher.model):
        if key not in patcher.patches or key in patcher.backup:
            continue
        with torch.inference_mode(False), torch.no_grad():  # training may use what is patched
            weight = comfy.utils.get_attr(patcher.model, key)
            patcher.backup[key] = Backup(weight.to(patcher.offload_device), inplace_update=False)
            wide = weight.to(device_to or weight.device, torch.float32, copy=True)
            patched = comfy.lora.calculate_weight(patcher.patches[key], wide, key)
            comfy.utils.set_attr_param(patcher.model, key, comfy.float.stochastic_rounding(patched, weight.dtype))


def misfits(patches: dict, state: dict[str, Tensor]) -> list[str]:
    """Keys of a host's patches whose shape is not the weight's: it logs them, and leaves them out.

    Args:
        patches: key -> a patch, as the host's reader of LoRA files makes it.
        state: key -> weight.
    """
    return [key for key, patch in patches.items() if not _fits(patch, tuple(state[key].shape))]


def _fits(patch, shape: tuple[int, ...]) -> bool:
    if isinstance(patch, list):  # another model's weight, of a merge
        return tuple(patch[0][0].shape) == shape
    if isinstance(patch, tuple) and len(patch) == 2 and patch[0] in ("diff", "set"):
        return tuple(patch[1][0].shape) == shape
    if getattr(patch, "name", None) == "lora" and patch.weights[3] is None:  # no middle factor, as of convolutions
        up, down = patch.weights[0].flatten(1), patch.weights[1].flatten(1)
        return up.shape[0] == shape[0] and down.shape[1] == torch.Size(shape[1:]).numel() and up.shape[1] == len(down)
    if getattr(patch, "name", None) == "lokr" and patch.weights[7] is None:
        w1, w2, _, w1_a, w1_b, w2_a, w2_b, *_ = patch.weights
        (o1, i1), (o2, i2) = _sides(w1, w1_a, w1_b), _sides(w2, w2_a, w2_b)
        return (o1 * o2, i1 * i2) == (shape[0], torch.Size(shape[1:]).numel())
    return True  # of other kinds the host alone knows what they come to


def _sides(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
    """Rows and columns of a factor that is whole, or a product of two itself; 0 if a part of it is missing."""
    if whole is not None:
        return whole.flatten(1).shape
    return (0, 0) if a is None or b is None else (a.shape[0], b.flatten(1).shape[1])
