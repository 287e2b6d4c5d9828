"""Pictures beside each other with captions, for comparing."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..zigma.sheet import enlarge as enlarged
from ..zigma.sheet import labelled_sheet
from .pictures import as_image, as_pictures, caption_lines
from .schema import schema

MORE = tuple(f"images_{number}" for number in range(2, 9))


class ZigMaPictureSheet(io.ComfyNode):
    """One labelled sheet of many pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaPictureSheet",
            display_name="ZigMa Picture Sheet",
            search_aliases=["image grid", "contact sheet", "labelled grid", "xy plot", "compare images", "captions"],
            description="Puts pictures on one sheet, each with its caption: one seed in several scan orders, several "
            "solvers, several prompts.",
            inputs=[
                io.Image.Input("images", tooltip="Pictures, one or a batch; the first on the sheet."),
                io.String.Input(
                    "captions", default="", multiline=True,
                    tooltip="One line for each picture, in their order; an empty line leaves one without. Nothing at "
                    "all leaves all without.",
                ),
                io.Int.Input(
                    "columns", default=0, min=0, max=64, tooltip="Pictures in a row; 0 chooses by their number."
                ),
                io.String.Input("title", default="", tooltip="A line above the pictures; nothing if empty."),
                io.Int.Input(
                    "enlarge", default=1, min=1, max=16, optional=True,
                    tooltip="How many times to enlarge each picture, by Lanczos resampling; 1 leaves it as it is.",
                ),
                io.Int.Input(
                    "text_size", default=0, min=0, max=200, optional=True,
                    tooltip="Of the captions, in pixels; 0 chooses one that suits the width of the pictures.",
                ),
                *(
                    io.Image.Input(
                        name, optional=True, tooltip="More pictures, from another sampler; they follow those before."
                    )
                    for name in MORE
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The sheet, one picture on white paper.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, images, captions: str, columns: int, title: str, enlarge: int = 1, text_size: int = 0, **more: torch.Tensor
    ) -> io.NodeOutput:
        """Collect the pictures in the order of the inputs, match captions, draw."""
        batches = [images, *(more[name] for name in MORE if more.get(name) is not None)]
        pictures = [enlarged(picture, enlarge) for batch in batches for picture in as_pictures(batch)]
        lines = caption_lines(captions, len(pictures))
        if len(lines) != len(pictures):
            raise ValueError(
                f"write one line of captions for each picture, an empty line for none: got {len(lines)} captions for "
                f"{len(pictures)} pictures"
            )
        size = text_size or max(13, min(48, max(picture.width for picture in pictures) // 30))
        sheet = labelled_sheet(
            pictures, lines, columns=columns or None, title=title.strip(), text_size=size, gap=max(18, size)
        )
        return io.NodeOutput(as_image(sheet))
