"""A LoRA on a model, with a word for one that does not fit."""

from __future__ import annotations

import logging
import os

import comfy.lora
import comfy.lora_convert
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from .comfy_model import as_zigma
from .comfy_patches import misfits
from .schema import schema

__all__ = ["ZigMaLoraLoader", "with_lora"]

log = logging.getLogger(__name__)


class ZigMaLoraLoader(io.ComfyNode):
    """As the stock loader, whose patches these are; but a LoRA of another model is an error, not a line in the log."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaLoraLoader",
            display_name="ZigMa LoRA Loader",
            description="Puts a LoRA on a ZigMa model, as Load LoRA (Model) does, and says so if it was trained for "
            "another model or fits in part only.",
            search_aliases=["zigma lora", "load lora", "lokr", "loha", "adapter"],
            inputs=[
                io.Model.Input("model", tooltip="A ZigMa model. It is not changed: the output is a copy."),
                io.Combo.Input(
                    "lora_name", options=folder_paths.get_filename_list("loras"),
                    tooltip="A file in models/loras that was trained for this model, here or with Train LoRA.",
                ),
                io.Float.Input(
                    "strength_model", default=1.0, min=-100.0, max=100.0, step=0.01,
                    tooltip="How much of it: 0 is the model itself, 1 what it was trained for; below 0 leads away.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA. Several in a row add up.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        """Say before the run that a file is gone. A name from another node is None until that has run."""
        if lora_name is None:
            return True
        if isinstance(lora_name, str) and folder_paths.get_full_path("loras", lora_name) is not None:
            return True
        return f"got the LoRA {lora_name!r}, but no such file is in models/loras: put it there and press R"

    @classmethod
    def fingerprint_inputs(cls, model=None, lora_name: str | None = "", strength_model: float = 1.0) -> float:
        """Load again when the file has changed."""
        path = None if lora_name is None else folder_paths.get_full_path("loras", lora_name)
        return 0.0 if path is None else os.path.getmtime(path)

    @classmethod
    def execute(cls, model, lora_name: str, strength_model: float) -> io.NodeOutput:
        """Load the file, and patch a clone."""
        return io.NodeOutput(with_lora(model, folder_paths.get_full_path_or_raise("loras", lora_name), strength_model))


def with_lora(model, path: str | os.PathLike, strength: float = 1.0):
    """A clone of a host MODEL with the LoRA of a file, found by the weights that the file's keys mean.

    Raises:
        ValueError: the model is no ZigMa, or nothing of the file fits it; what fits in part only is named in the log.
    """
    as_zigma(model)
    file = os.path.basename(path)
    lora = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path), safe_load=True))
    names = _names(model.model)
    patches = comfy.lora.load_lora(lora, names, log_missing=False)
    wrong = misfits(patches, model.model.state_dict())
    fitting = {key: patch for key, patch in patches.items() if key not in wrong}
    if not fitting:
        raise ValueError(_no_fit(file, lora, wrong))
    left = _unread(lora, patches, names)
    if wrong or left:
        log.warning(
            "%s fits in part only: %d weights are patched, %d have another shape in this model%s, %d of its "
            "tensors belong to no weight of it%s",
            file, len(fitting), len(wrong), f" ({wrong[0]})" * bool(wrong), len(left),
            f" ({left[0]})" if left else "",
        )  # fmt: skip
    patched = model.clone()
    patched.add_patches(fitting, strength)
    return patched


def _names(model) -> dict[str, str]:
    """What a LoRA file may call a weight -> its key: as the host knows it, as PEFT writes it, and bare."""
    names = comfy.lora.model_lora_keys_unet(model, {})
    for name, key in list(names.items()):
        if name.startswith("diffusion_model."):
            bare = name.removeprefix("diffusion_model.")
            names |= {f"{prefix}{bare}": key for prefix in ("", "base_model.model.", "transformer.")}
    return names


def _no_fit(name: str, lora: dict[str, Tensor], wrong: list[str]) -> str:
    if wrong:
        return (
            f"choose a LoRA that was trained for this model: {name} is of a ZigMa of another size, none of its "
            f"{len(wrong)} weights has the shape of {wrong[0]} and the others here"
        )
    examples = ", ".join(sorted(lora)[:2])
    return (
        f"choose a LoRA that was trained for this model: none of the {len(lora)} tensors of {name} belongs to a weight "
        f"of a ZigMa (its names are such as {examples}; expected diffusion_model.blocks.0....)"
    )


def _unread(lora: dict[str, Tensor], patches: dict, names: dict[str, str]) -> list[str]:
    """Tensors of a file that no patch came of."""
    read = {f"{name}.{end}" for name, key in names.items() if key in patches for end in _PLAIN}
    biases = {key.removesuffix(".bias") + ".weight" for key in patches if key.endswith(".bias")}
    read |= {f"{name}.{end}" for name, key in names.items() if key in biases for end in _PLAIN}
    for patch in patches.values():
        read |= getattr(patch, "loaded_keys", set())
    return sorted(key for key in lora if key not in read)


# What the host reads beside its adapters, by the ends of the names.
_PLAIN = ("alpha", "dora_scale", "w_norm", "b_norm", "diff", "diff_b", "set_weight")
