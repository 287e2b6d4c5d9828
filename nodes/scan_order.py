"""Letting a model's layers read their tokens in other orders."""

from __future__ import annotations

import re

import torch
from comfy_api.latest import io

from ..zigma.scan_orders import available_orders
from ..zigma.order_drawing import draw_order
from ..zigma.sheet import labelled_sheet
from .comfy_model import SCAN_ORDERS, LayerOrder, as_zigma, make_order
from .schema import schema


def parse_numbers(text: str, count: int, what: str) -> list[int]:
    """'0-3, 6' -> [0, 1, 2, 3, 6]; 'all' -> 0 ... count-1.

    Raises:
        ValueError: for other text, or numbers from `count` on.
    """
    if text.strip().lower() in ("all", ""):
        return list(range(count))
    numbers: list[int] = []
    for part in re.split(r"[,\s]+", text.strip(" ,\n")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"got the {what} {text!r}, expected numbers and ranges such as '0-3, 6', or 'all'")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        numbers += range(first, last + 1) if first <= last else range(first, last - 1, -1)
    wrong = [number for number in numbers if number >= count]
    if wrong:
        raise ValueError(f"got the {what} {text!r}, expected numbers from 0 to {count - 1}: there is no {wrong[0]}")
    return numbers


class ZigMaScanOrder(io.ComfyNode):
    """A copy of the MODEL whose layers read in the chosen orders; several in a row build any schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaScanOrder",
            display_name="ZigMa Scan Order",
            description="Changes the order in which layers of a ZigMa model read the patches. A model draws best in "
            "the orders it was trained with; others show what the order does. Chain several nodes for a schedule.",
            inputs=[
                io.Model.Input("model", tooltip="A ZigMa model. It is not changed: the output is a copy."),
                io.Combo.Input(
                    "order", options=list(available_orders()), default="zigzag",
                    tooltip="zigzag turns round at the end of each line, sweep jumps back; bidirectional is the raster "
                    "and its reverse; hilbert stays near; diagonal runs like JPEG; hilbert-published is the table that "
                    "published weights were trained with; random is drawn from the seed.",
                ),
                io.String.Input(
                    "variants", default="0-7",
                    tooltip="Which variants of the order, such as '0-7' or '0, 3': the chosen layers take them in "
                    "turn. Zigzag has eight: four corners, each by rows and by columns.",
                ),
                io.String.Input(
                    "layers", default="all",
                    tooltip="Which layers change, such as 'all', '0-3' or '1, 5'. The others stay as they are.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**32 - 1, tooltip="Of the order 'random'; the others do not use it."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the new orders."),
                io.Image.Output(
                    display_name="drawing", tooltip="The path of every layer on the grid that the model was trained on."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, order: str, variants: str, layers: str, seed: int) -> io.NodeOutput:
        """Write the schedule into the options of a clone."""
        network = as_zigma(model)
        count = available_orders()[order]
        if count > 64 and variants.strip().lower() in ("all", ""):
            raise ValueError(f"got all variants of {order}, which has {count}: expected a few, such as '0-7'")
        indices = parse_numbers(variants, count, "variants")
        chosen = parse_numbers(layers, network.config.depth, "layers")
        options = model.model_options.get("transformer_options", {})
        schedule: list[LayerOrder | None] = list(options.get(SCAN_ORDERS) or [None] * network.config.depth)
        for position, layer in enumerate(chosen):
            schedule[layer] = (order, indices[position % len(indices)], seed if order == "random" else 0)
        changed = model.clone()
        # A new dict: a host may share the old one between clones.
        changed.model_options["transformer_options"] = {**options, SCAN_ORDERS: tuple(schedule)}
        return io.NodeOutput(changed, cls.drawing(network, schedule))

    @staticmethod
    def drawing(network, schedule: list[LayerOrder | None]) -> torch.Tensor:
        """The layers' paths as one IMAGE (1, height, width, 3)."""
        height, width = network.config.grid
        own = network.layer_orders(height, width)
        orders = [own[i] if entry is None else make_order(entry, (height, width)) for i, entry in enumerate(schedule)]
        names = [f"layer {i}: " + ("as trained" if e is None else f"{e[0]} {e[1]}") for i, e in enumerate(schedule)]
        sheet = labelled_sheet([draw_order(order, height, width) for order in orders], names)
        pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
        return pixels.view(1, sheet.height, sheet.width, 3).float() / 255
