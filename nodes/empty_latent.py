"""An empty latent in the shape that a ZigMa model works on."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io

from .comfy_model import as_zigma
from .layer_orders import grid_of
from .schema import schema


class ZigMaEmptyLatent(io.ComfyNode):
    """Channels and scale come from the model, the size too unless it is given."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        sides = {"min": 0, "max": 8192, "step": 8, "default": 0}
        return schema(
            node_id="ZigMaEmptyLatent",
            display_name="ZigMa Empty Latent",
            description="An empty latent with the channels, the size and the frames that the model was trained on.",
            inputs=[
                io.Model.Input("model", tooltip="A ZigMa model: it knows its channels, scale and size."),
                io.Int.Input("width", **sides, tooltip="Of the picture, in pixels; 0 is the width it was trained on."),
                io.Int.Input(
                    "height", **sides, tooltip="Of the picture, in pixels; 0 is the height it was trained on."
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures, or videos, drawn at once."),
                io.Int.Input(
                    "frames", default=0, min=0, max=4096, optional=True,
                    tooltip="Of a video, for models that draw videos; 0 is the number it was trained on. Leave it 0 "
                    "for models that draw pictures.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="For ZigMa Sampler or KSampler.")],
            search_aliases=["empty latent", "latent size", "video frames", "new latent", "zigma size"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, width: int, height: int, batch_size: int, frames: int = 0) -> io.NodeOutput:
        """Zeros; the sampler fills in the noise."""
        network = as_zigma(model)
        config, grid = network.config, grid_of(model, network, width, height)
        sides = [config.patch_size * side for side in grid]
        latent = torch.zeros(
            [batch_size, config.in_channels, *cls.frames_of(config, frames), *sides],
            device=comfy.model_management.intermediate_device(),
        )
        return io.NodeOutput({"samples": latent, "downscale_ratio_spacial": model.model.zigma_file.latent.downscale})

    @staticmethod
    def frames_of(config, frames: int) -> list[int]:
        """The axis of frames that a latent of this model has: none for pictures."""
        own = config.video_frames
        if not own and frames > 1:
            raise ValueError(f"set frames to 0: this model draws pictures, and got {frames} frames")
        if own > 1 and frames == 1:
            raise ValueError(f"set frames to 0, or to 2 or more: this model draws videos (of {own} frames), and got 1")
        return [frames or own] if own else []
