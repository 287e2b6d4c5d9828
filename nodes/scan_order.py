"""Letting a model's layers read their tokens in other orders."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..zigma.order_drawing import draw_paths
from ..zigma.order_table import join_numbers
from ..zigma.order_text import parse_numbers, parse_orders, parse_schedule
from ..zigma.scan_orders import available_orders
from .comfy_model import as_zigma
from .layer_orders import (
    SCAN_ORDERS,
    CustomOrder,
    LayerOrder,
    departure,
    grid_of,
    layer_paths,
    report,
    schedule_of,
    settable_layers,
    token_pixels,
)
from .pictures import as_image
from .schema import schema

log = logging.getLogger(__name__)

CUSTOM, TRAINED = "custom", "as trained"
FIRST_EIGHT = "0-7"  # the default variants: as many of them as an order has


class ZigMaScanOrder(io.ComfyNode):
    """A copy of the MODEL whose layers read in the chosen orders; several in a row build any schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        pixels = {"default": 0, "min": 0, "max": 16384, "optional": True}
        return schema(
            node_id="ZigMaScanOrder",
            display_name="ZigMa Scan Order",
            search_aliases=["token order", "scan path", "zigzag", "hilbert", "permutation", "layer schedule"],
            description="Changes the order in which layers of a ZigMa model read the patches. A model draws best in "
            "the orders it was trained with; others show what the order does. Chain several nodes for a schedule, or "
            "write one.",
            inputs=[
                io.Model.Input("model", tooltip="A ZigMa model. It is not changed: the output is a copy."),
                io.Combo.Input(
                    "order", options=[*available_orders(), CUSTOM, TRAINED], default="zigzag",
                    tooltip="zigzag turns round at the end of each line, sweep jumps back; bidirectional is the raster "
                    "and its reverse; hilbert stays near; diagonal runs like JPEG; hilbert-published is the table that "
                    "published weights were trained with; random is drawn from the seed; custom is what you write "
                    "below; as trained gives layers their own order back.",
                ),
                io.String.Input(
                    "variants", default=FIRST_EIGHT,
                    tooltip="Which variants of the order, such as '0-7' or '0, 3': the chosen layers take them in "
                    "turn. Zigzag has eight: four corners, each by rows and by columns. Left at 0-7 it means as many "
                    "as there are.",
                ),
                io.String.Input(
                    "layers", default="all",
                    tooltip="Which layers change, such as 'all', '0-3' or '1, 5'. The others stay as they are. Of a "
                    "video model 'all' means those that mix space.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**32 - 1, tooltip="Of the order 'random'; the others do not use it."
                ),
                io.String.Input(
                    "custom", default="", multiline=True, optional=True,
                    tooltip="Of the order 'custom': the patches by number (row by row from 0), in the order in which "
                    "they are read, with commas or spaces between them, or as a JSON list. Several lines are several "
                    "variants.",
                ),
                io.String.Input(
                    "schedule", default="", multiline=True, optional=True,
                    tooltip="A whole schedule, one line for each group of layers: '0-3: zigzag 0-7', '4: hilbert 0', "
                    "'5: as trained'. If anything is written here, order, variants and layers are not used.",
                ),
                io.Int.Input(
                    "width", **pixels,
                    tooltip="Of the pictures that a custom order is for and that the drawing shows, in pixels; 0 is "
                    "the width that the model was trained on.",
                ),
                io.Int.Input(
                    "height", **pixels,
                    tooltip="Of the pictures that a custom order is for and that the drawing shows, in pixels; 0 is "
                    "the height that the model was trained on.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the new orders."),
                io.Image.Output(
                    display_name="drawing", tooltip="The path of every layer; layers that read alike share a drawing."
                ),
                io.String.Output(
                    display_name="report", tooltip="Which layers depart from the order that the model was trained "
                    "with and how far, and a table of all layers.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, order: str, variants: str, layers: str, seed: int, custom: str = "", schedule: str = "",
        width: int = 0, height: int = 0,
    ) -> io.NodeOutput:  # fmt: skip
        """Write the schedule into the options of a clone."""
        network = as_zigma(model)
        grid = grid_of(model, network, width, height)
        remarks, written = [], None
        if custom.strip():
            unit = token_pixels(model, network)
            what = f"{grid[0]} x {grid[1]} tokens (a picture of {grid[1] * unit} x {grid[0] * unit} pixels)"
            written = parse_orders(custom, grid[0] * grid[1], what)
        made = schedule_of(model, network.config.depth)
        steps = cls.steps(network, order, variants, layers, written, schedule)
        for chosen, kind, indices in steps:
            for position, layer in enumerate(chosen):
                made[layer] = cls.entry(kind, indices[position % len(indices)], seed, written, grid)
        if schedule.strip():
            remarks.append("the schedule is in use; order, variants and layers are not")
        if written is not None and not any(kind == CUSTOM for _, kind, _ in steps):
            remarks.append(f"the custom numbers are not in use: choose the order {CUSTOM!r}")
        changed = model.clone()
        # A new dict: a host may share the old one between clones.
        options = model.model_options.get("transformer_options", {})
        changed.model_options["transformer_options"] = {**options, SCAN_ORDERS: tuple(made)}
        paths = layer_paths(network, made, grid)
        warning = departure(network, paths)
        if warning:
            log.warning("ZigMa Scan Order: %s", warning)
        return io.NodeOutput(changed, as_image(draw_paths(paths)), report(network, paths, remarks))

    @classmethod
    def steps(
        cls, network, order: str, variants: str, layers: str, written: list | None, schedule: str
    ) -> list[tuple[list[int], str, list[int]]]:
        """(layers, kind, variants) for each line of the schedule, or else for the node's own choice."""
        counts = {**available_orders(), CUSTOM: len(written or ()), TRAINED: 1}
        if schedule.strip():
            kinds = {
                kind: lambda text, kind=kind, count=count: chosen_variants(text or FIRST_EIGHT, kind, count)
                for kind, count in counts.items()
            }
            steps = parse_schedule(schedule, lambda text: chosen_layers(text, network), kinds)
            if not steps:
                raise ValueError("write a line such as '0-3: zigzag 0-7' in the schedule: got remarks only")
            return steps
        return [(chosen_layers(layers, network), order, chosen_variants(variants, order, counts[order]))]

    @staticmethod
    def entry(
        kind: str, index: int, seed: int, written: list | None, grid: tuple[int, int]
    ) -> LayerOrder | None:  # fmt: skip
        """What travels with the model for one layer; None for its own order."""
        if kind == TRAINED:
            return None
        if kind == CUSTOM:
            return CustomOrder.of(written[index], index, grid)
        return kind, index, seed if kind == "random" else 0


def chosen_variants(text: str, kind: str, count: int) -> list[int]:
    """The variants of an order that a user asks for; nothing and the default mean the first eight, or all it has.

    Raises:
        ValueError: for variants that it lacks, all of an order with too many, and a custom order that is not written.
    """
    if kind == TRAINED:
        return [0]
    if kind == CUSTOM and not count:
        raise ValueError("write the numbers of the order in the field custom: got an empty text")
    if text.strip() == FIRST_EIGHT:
        return list(range(min(8, count)))
    if count > 64 and text.strip().lower() in ("all", ""):
        raise ValueError(f"got all variants of {kind}, which has {count}: expected a few, such as '0-7'")
    return parse_numbers(text, count, "variants")


def chosen_layers(text: str, network) -> list[int]:
    """The layers that a user asks for; 'all' of a video model are those that mix space.

    Raises:
        ValueError: for layers that there are not, and those whose tokens are not those of one picture.
    """
    allowed = settable_layers(network)
    if not allowed:
        raise ValueError("use another model: the layers of this video model read all frames at once, none reads one")
    if text.strip().lower() in ("all", ""):
        return allowed
    chosen = parse_numbers(text, network.config.depth, "layers")
    through_time = sorted(set(chosen) - set(allowed))
    if through_time:
        raise ValueError(
            f"leave the layers {join_numbers(through_time)} out, which read through time and not over a picture: got "
            f"the layers {text!r}, expected some of {join_numbers(allowed)}"
        )
    return chosen
