"""A trained LoRA where LoRA loaders look for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from safetensors import SafetensorError, safe_open

from ..zigma.atomic_file import replacing
from .schema import schema
from .shown_text import shown

ADAPTER = "zigma.adapter"  # in the metadata of what zigma/training/adapters.py writes


class ZigMaSaveLora(io.ComfyNode):
    """The file of a run, copied into models/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaSaveLora",
            display_name="ZigMa Save LoRA",
            description="Copies a LoRA that ZigMa Train has made into models/loras, where LoRA loaders list it.",
            search_aliases=["save lora", "export lora", "keep lora", "lokr"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "file", force_input=True, tooltip="The file of a ZigMa Train whose method is lora or lokr."
                ),
                io.String.Input(
                    "filename_prefix", default="zigma/%run%",
                    tooltip="Where in models/loras, and how the name begins; a number follows. %run% is the name of "
                    "the run.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is now.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, file: str, filename_prefix: str) -> io.NodeOutput:
        """Check what it is, copy it under a name that is free."""
        source = Path(file)
        _check(source)
        prefix = filename_prefix.replace("%run%", source.parent.name)
        folder, name, number, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_folder_paths("loras")[0])
        path = Path(folder) / f"{name}_{number:05}_.safetensors"
        with replacing(path) as target, source.open("rb") as content:
            shutil.copyfileobj(content, target)
        return shown(str(path), cls)


def _check(source: Path) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"connect the file of a ZigMa Train: got {str(source)!r}, where there is no file")
    try:
        with safe_open(source, framework="pt") as opened:
            known = ADAPTER in (opened.metadata() or {})
    except (SafetensorError, OSError):
        known = False
    if not known:
        raise ValueError(
            f"connect the file of a ZigMa Train whose method is lora or lokr: {source} is no LoRA of one; a model is "
            "saved by ZigMa Save Model"
        )
