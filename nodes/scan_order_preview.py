"""Looking at the orders that a model's layers read in."""

from __future__ import annotations

from comfy_api.latest import io
from PIL import Image

from ..zigma.order_drawing import draw_paths
from ..zigma.order_text import parse_numbers
from .comfy_model import as_zigma
from .layer_orders import grid_of, layer_paths, report, schedule_of, token_pixels
from .pictures import as_image, as_pictures
from .schema import schema


class ZigMaScanOrderPreview(io.ComfyNode):
    """The paths of a MODEL's layers as a drawing and a table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        pixels = {"default": 0, "min": 0, "max": 16384}
        return schema(
            node_id="ZigMaScanOrderPreview",
            display_name="ZigMa Scan Order Preview",
            search_aliases=["draw scan path", "show token order", "continuity", "jumps", "zigzag preview"],
            description="Draws the paths in which the layers of a ZigMa model read the patches, with the orders that "
            "ZigMa Scan Order nodes gave it, on squared paper or over a picture.",
            inputs=[
                io.Model.Input("model", tooltip="A ZigMa model, with or without other scan orders."),
                io.String.Input(
                    "layers", default="all",
                    tooltip="Which layers to draw, such as 'all', '0-3' or '1, 5'. Layers that read alike share a "
                    "drawing.",
                ),
                io.Int.Input(
                    "width", **pixels,
                    tooltip="Of the pictures that the model is to draw, in pixels; 0 is the width of the given "
                    "picture, or else that of the training.",
                ),
                io.Int.Input(
                    "height", **pixels,
                    tooltip="Of the pictures that the model is to draw, in pixels; 0 is the height of the given "
                    "picture, or else that of the training.",
                ),
                io.Int.Input(
                    "size", default=0, min=0, max=4096,
                    tooltip="The longer side of each drawing, in pixels; 0 chooses one at which it can be read.",
                ),
                io.Int.Input(
                    "columns", default=0, min=0, max=64, tooltip="Drawings in a row; 0 chooses by their number."
                ),
                io.Image.Input(
                    "image", optional=True,
                    tooltip="A picture to draw the paths over: the first of a batch. It is cut from the middle to "
                    "whole patches, as VAE Encode does, or to width and height in proportion.",
                ),
                io.Float.Input(
                    "opacity", default=0.85, min=0.05, max=1.0, step=0.05, optional=True,
                    tooltip="Of the paths over a picture; 1 hides what is below them.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="drawing", tooltip="One drawing for each order, with its layers, jumps and continuity."
                ),
                io.String.Output(
                    display_name="report", tooltip="Which layers depart from the trained order and how far, and a "
                    "table of the layers: order, jumps, continuity, longest step, distance of neighbours.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, layers: str, width: int, height: int, size: int, columns: int, image=None, opacity: float = 0.85
    ) -> io.NodeOutput:
        """Find each layer's order on the grid, draw, tabulate."""
        network = as_zigma(model)
        chosen = parse_numbers(layers, network.config.depth, "layers")
        unit, remarks, over = token_pixels(model, network), [], None
        if image is not None:
            first = as_pictures(image[:1])[0]
            over = cut_to_patches(first, width, height, unit)
            width, height = width or first.width // unit * unit, height or first.height // unit * unit
            if over.size != first.size:
                remarks.append(
                    f"the picture of {first.width} x {first.height} pixels is cut to {over.width} x {over.height}"
                )
            if len(image) > 1:
                remarks.append(f"the first of {len(image)} pictures is drawn over")
        grid = grid_of(model, network, width, height)
        paths = layer_paths(network, schedule_of(model, network.config.depth), grid)
        paths = [paths[layer] for layer in dict.fromkeys(chosen)]
        remarks.append(
            f"{grid[0]} x {grid[1]} tokens of {unit} x {unit} pixels: pictures of {grid[1] * unit} x {grid[0] * unit}"
        )
        drawing = draw_paths(
            paths, size=size or None, over=over, opacity=1.0 if over is None else opacity, columns=columns or None
        )
        return io.NodeOutput(as_image(drawing), report(network, paths, remarks))


def cut_to_patches(picture: Image.Image, width: int, height: int, unit: int) -> Image.Image:
    """The middle of a picture, in the proportions of width x height; a side that is 0 is as many whole patches as fit.

    Raises:
        ValueError: a picture that is smaller than one patch.
    """
    if min(picture.size) < unit:
        raise ValueError(
            f"give a picture of {unit} x {unit} pixels (one patch of this model) and more: got "
            f"{picture.width} x {picture.height}"
        )
    given = bool(width or height)
    width, height = width or picture.width // unit * unit, height or picture.height // unit * unit
    scale = min(picture.width / width, picture.height / height) if given else 1.0
    sides = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (picture.width - sides[0]) // 2, (picture.height - sides[1]) // 2
    return picture.crop((left, top, left + sides[0], top + sides[1]))
