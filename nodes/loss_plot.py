"""The losses of a training as a picture."""

from __future__ import annotations

from comfy_api.latest import io

from ..zigma.training.loss_drawing import loss_plot
from .pictures import as_image
from .schema import schema


class ZigMaLossPlot(io.ComfyNode):
    """Loss against steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaLossPlot",
            display_name="ZigMa Loss Plot",
            description="Draws the losses of a training against its steps, as they were and smoothed.",
            search_aliases=["loss curve", "loss graph", "training curve", "plot loss"],
            inputs=[
                io.Custom("ZIGMA_LOSSES").Input("losses", tooltip="Of a ZigMa Train."),
                io.Int.Input("width", default=900, min=200, max=4096, tooltip="Of the picture, in pixels."),
                io.Int.Input("height", default=420, min=150, max=4096, tooltip="Of the picture, in pixels."),
            ],
            outputs=[io.Image.Output(display_name="plot", tooltip="The curve, one picture.")],
        )

    @classmethod
    def execute(cls, losses, width: int, height: int) -> io.NodeOutput:
        """Draw."""
        return io.NodeOutput(as_image(loss_plot(losses, (width, height))))
